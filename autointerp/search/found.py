"""What every search gives back: features in order, each with its numbers, and what these numbers mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from activations.errors import InputError
from data.store import Store
from data.store.search import ALL, Facts, Filters, has_labels

if TYPE_CHECKING:
    from sae.base import SAE

LIMIT = 20
CANDIDATES = 50
"""Features whose loss effect is measured, unless the caller says otherwise."""
RANKS = {
    "words": ("words",),
    "meaning": ("cosine",),
    "token": ("firings", "value"),
    "prompt": ("activation", "rarity", "loss"),
    "feature": ("cosine", "phi", "jaccard"),
}
"""Ways to ask, and the orders that each has, the usual one first."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One feature that was found."""

    facts: Facts
    numbers: dict[str, float]
    """What `Found.definitions` explains."""
    token: str | None = None
    """The token that these numbers are about, where they are about one."""

    @property
    def feature(self) -> int:
        return self.facts.feature


@dataclass(frozen=True, kw_only=True)
class Found:
    """An answer."""

    address: str
    """The dictionary; a feature's own address is this, a slash and its number."""
    hook: str
    by: str
    """The way it was asked, of `RANKS`."""
    query: str
    rank: str
    """What it is ordered by."""
    hits: list[Hit]
    total: int | None
    """Features that fit, of which `hits` are the first; None where every feature has its place in the order."""
    definitions: dict[str, str]
    """Of the numbers of the hits."""
    notes: list[str] = field(default_factory=list)
    """What a reader has to know besides: a text that was cut, another way of counting."""
    next_step: str = ""
    """What to try; empty when something was found."""


def found(
    store: Store,
    *,
    by: str,
    query: str,
    rank: str,
    hits: Sequence[Hit],
    total: int | None,
    definitions: Mapping[str, str],
    filters: Filters,
    otherwise: str,
    notes: Sequence[str] = (),
) -> Found:
    """The answer; otherwise: what to try when there is no hit and no filter that could be dropped."""
    next_step = ""
    if not hits:
        next_step = otherwise if filters == ALL else f"Leave out a filter. {otherwise}"
    return Found(
        address=store.place.address,
        hook=store.meta.get("hook", ""),
        by=by,
        query=query,
        rank=rank,
        hits=list(hits),
        total=total,
        definitions=dict(definitions),
        notes=list(notes),
        next_step=next_step,
    )


def check_rank(rank: str, by: str) -> None:
    """Raise InputError for an order that this way of asking does not have."""
    if rank not in RANKS[by]:
        raise InputError(f"rank={rank!r} is no order of a search by {by}: expected {' or '.join(RANKS[by])}.")


def check_limit(limit: int) -> None:
    """Raise InputError for a limit that would show nothing."""
    if limit < 1:
        raise InputError(f"limit={limit} is too small: expected at least 1.")


def check_text(text: str) -> str:
    """`text` without blanks around it. Raises InputError when nothing is left, or it is no text."""
    if not text.strip():
        raise InputError("There is nothing to search for: expected a text, a token or a feature number.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{text!r} is no valid text: expected characters that UTF-8 can write.") from None
    return text.strip()


def check_labels(store: Store) -> None:
    """Raise InputError, with the command that makes them, when the store has no labels."""
    if not has_labels(store):
        address = store.place.address
        raise InputError(f"{address} has no labels yet: make some with `sae label {address} --explainer lexical`.")


def check_dictionary(store: Store, sae: "SAE") -> None:
    """Raise InputError, with the command that mends it, when the store is of another dictionary."""
    if store.n_features != sae.d_sae:
        address = store.place.address
        raise InputError(
            f"The store of {address} has {store.n_features} features, its dictionary {sae.d_sae}: build it again with "
            f"`sae index {address} --overwrite`."
        )
