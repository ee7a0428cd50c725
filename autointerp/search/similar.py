"""Search by another feature: whose decoder row points the same way, or which fires together with it.

The store keeps the ten best of each. Where more are wanted, cosines come from the decoder, over all features. The codes
themselves are not kept: where an older store has no list of what fires together, or filters leave too little of it, all
features are counted on the windows of the store's random sample, which is coarser.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from activations.errors import InputError
from autointerp.search.found import LIMIT, Found, Hit, check_dictionary, check_limit, check_rank, found
from data.store import Store
from data.store.search import ALL, FEWEST, Filters, facts_of, together
from sae.base import SAE

_PIECE = 16384
_DEFINITIONS = {
    "cosine": "cosine of the decoder rows",
    "phi": "correlation of the two firing or not, over {of}",
    "jaccard": "{of} on which both fire as a share of those on which either does",
    "n": "{of} on which both fire",
}


def by_feature(
    store: Store,
    load: Callable[[], SAE],
    number: int,
    *,
    rank: str = "cosine",
    filters: Filters = ALL,
    limit: int = LIMIT,
) -> Found:
    """Features like feature `number`.

    rank: 'cosine' of the decoder rows (|cosine| for latents of either sign, shown with its own), 'phi' or 'jaccard' of
    firing on the same tokens. load: gives the dictionary; called only where the stored cosines do not suffice.
    Raises InputError for a number that is no feature's.
    """
    check_limit(limit)
    check_rank(rank, "feature")
    if not 0 <= number < store.n_features:
        raise InputError(f"There is no feature {number}: expected 0 to {store.n_features - 1}.")
    of, notes = "tokens", list[str]()
    near = _stored(store, number, rank)
    hits = _hits(store, near, filters, limit)
    if rank == "cosine" and len(hits) < limit:
        hits = _hits(store, _cosines(store, load(), number), filters, limit)
    elif len(hits) < limit and (filters != ALL or not near):
        near, n = _windows(store, number, rank)
        hits, of = _hits(store, near, filters, limit), "windows"
        notes.append(f"Counted on the {n:,} windows of the random sample, over all features.")
    shown = ["cosine"] if rank == "cosine" else ["phi", "jaccard", "n"]
    return found(
        store,
        by="feature",
        query=str(number),
        rank=rank,
        hits=hits,
        total=None,
        definitions={name: _DEFINITIONS[name].format(of=of) for name in shown},
        filters=filters,
        otherwise="No feature passes."
        if rank == "cosine"
        else f"None fires with it on {FEWEST} tokens or windows or more: try --rank cosine.",
        notes=notes,
    )


Near = list[tuple[int, dict[str, float]]]
"""Features with their numbers, the nearest first."""


def _stored(store: Store, number: int, rank: str) -> Near:
    """What the store keeps."""
    if rank == "cosine":
        return [(near.feature, {"cosine": near.cosine}) for near in store.feature(number).neighbours]
    profile = store.profile(number)
    if profile is None:
        return []
    pairs = profile.by_phi if rank == "phi" else profile.by_jaccard
    return [(pair.feature, {"phi": pair.phi, "jaccard": pair.jaccard, "n": float(pair.n)}) for pair in pairs]


@torch.no_grad()
def _cosines(store: Store, sae: SAE, number: int) -> Near:
    """Every other feature by its cosine, by size if signed; ties by number."""
    check_dictionary(store, sae)
    one: Float[Tensor, " d"] = normalize(sae.W_dec[number].float(), dim=0)
    cosines = torch.cat([normalize(rows.float(), dim=1) @ one for rows in sae.W_dec.split(_PIECE)]).cpu()
    order = (cosines.abs() if store.signed else cosines).argsort(descending=True, stable=True).tolist()
    values = cosines.tolist()
    return [(feature, {"cosine": values[feature]}) for feature in order if feature != number]


def _windows(store: Store, number: int, rank: str) -> tuple[Near, int]:
    """(every feature that is on in the same windows, windows of the sample)."""
    pairs, n = together(store, number)
    pairs.sort(key=lambda pair: (-(pair.phi if rank == "phi" else pair.jaccard), pair.feature))
    return [(pair.feature, {"phi": pair.phi, "jaccard": pair.jaccard, "n": float(pair.n)}) for pair in pairs], n


def _hits(store: Store, near: Sequence[tuple[int, dict[str, float]]], filters: Filters, limit: int) -> list[Hit]:
    """The first that pass the filters."""
    hits: list[Hit] = []
    first, size = 0, 8 * limit
    while first < len(near) and len(hits) < limit:
        part = near[first : first + size]
        facts = facts_of(store, [feature for feature, _ in part], filters)
        hits += [Hit(facts=facts[feature], numbers=numbers) for feature, numbers in part if feature in facts]
        first, size = first + size, 4 * size
    return hits[:limit]
