"""The feature families of a dictionary of a run, in `families.json` beside it: what they hold together, and by chance.

Controls. independent: the same latents, each firing as often, on rows drawn anew for each of them; what is found then
is found in nothing. stand-in: the parent's place taken by a latent outside the family that fires about as often.
With another dictionary, also how latents split: each latent of the wider one belongs to the one of the narrower that is
nearest by decoder row (saerch's `nn_hierarchy`).
Source: O'Neill et al. 2024, arXiv:2408.00657, sec. 4.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix
from torch import Tensor
from torch.nn.functional import normalize

from activations.errors import InputError
from activations.files import write_json
from activations.model import pick_device
from activations.run import Run, dictionary_folder, versions
from sae.base import SAE
from sae.coactivation import counted, firings, independent
from sae.evals.matching import similar
from sae.evals.metric import Metric
from sae.evals.reconstruction import evaluation_part
from sae.families import Family, FamilySettings, entering, families
from sae.files import load_sae

FILE = "families.json"
HELD = {
    "together": "share of a child's firings on which the parent fires too, mean over children and families",
    "coverage": "share of the parent's firings on which a child fires, mean over families",
    "ratio": "R: n_ij / min(n_i, n_j) of parent and children, mean, over that of all pairs of children (each with "
    "itself too); mean over families",
}
"""What is measured of a family, with its definition."""
_CHUNK = 1024


def find_families(
    address: str | Path,
    settings: FamilySettings = FamilySettings(),  # noqa: B008  (immutable)
    *,
    all_rows: bool = False,
    n_rows: int = 500_000,
    against: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Write the families of a dictionary (RUN, RUN/ID or its folder), and return the file's path.

    all_rows: count firings on rows that were trained on too; else on held-out documents, where there are some.
    n_rows: at most so many. against: another dictionary of the same rows, for how latents split. seed: of the controls.
    Raises InputError where the dictionary reads several hooks, lies in no run, or nothing fires often enough.
    """
    folder = dictionary_folder(address)
    sae = load_sae(folder, device=str(pick_device(device)))
    cache = Run.open(folder.parent.parent).activations(sae.only_hook("The search for families"))
    part = "all" if all_rows else evaluation_part(cache)
    fires = firings(sae, cache, part, n_rows=n_rows)
    latents = entering(fires, settings)
    if not len(latents):
        raise InputError(
            f"No latent fires on {settings.min_firings} rows or more of {fires.shape[0]:,} ({part} documents), and on "
            f"less than {settings.max_density:.0%}: lower --min-firings, or count on all rows (--all-rows)."
        )
    found = families(fires, settings)
    split = {} if against is None else splits(sae, load_sae(against, device=str(sae.W_dec.device)), str(against), seed)
    by_latent = fires.tocsc()
    held = [_held(by_latent, family.parent, family) for family in found]
    density = by_latent.getnnz(axis=0) / fires.shape[0]
    metrics = {**measured(fires, found, held, settings, part, seed), **split.pop("metrics", {})}
    record = {
        "rows": fires.shape[0],
        "part": part,
        "settings": asdict(settings),
        "latents": len(latents),
        "versions": versions(),
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
        "families": [_shown(*each, density) for each in zip(found, held, strict=True)],
        **split,
    }
    write_json(folder / FILE, record)
    return folder / FILE


def measured(
    fires: csr_matrix,
    found: Sequence[Family],
    held: Sequence[tuple[float, float, float]],
    settings: FamilySettings,
    part: str,
    seed: int,
) -> dict[str, Metric]:
    """How many families, of how many latents, how they hold together (`held`), each with its control."""
    by_latent, latents = fires.tocsc(), entering(fires, settings)
    by_chance = families(independent(fires, np.random.default_rng(seed)), settings)
    rows = f"families, on {fires.shape[0]:,} rows of {part} documents"
    share_in = "share of the latents that entered that are in a family"
    alone = "the same when every latent fires as often, on rows of its own"

    def members(of: Sequence[Family]) -> float:
        inside = {latent for family in of for latent in (family.parent, *family.children)}
        return len(inside) / len(latents)

    def entered(value: float, definition: str, of_seed: int | None = None) -> Metric:
        of = f"latents, on {fires.shape[0]:,} rows of {part} documents"
        return Metric(value=value, n=len(latents), of=of, definition=definition, seed=of_seed)

    made = {
        "families.n": entered(len(found), "number of families"),
        "control.independent.families.n": entered(len(by_chance), alone, seed),
        "families.members": entered(members(found), share_in),
        "control.independent.families.members": entered(members(by_chance), alone, seed),
    }
    if not found:
        return made
    stand_ins = [_held(by_latent, _stand_in(by_latent, latents, family), family) for family in found]
    for i, (name, definition) in enumerate(HELD.items()):
        for prefix, values in (("", held), ("control.stand_in.", stand_ins)):
            made[f"{prefix}families.{name}"] = Metric(
                value=float(np.mean([value[i] for value in values])),
                n=len(found),
                of=rows,
                definition=definition if not prefix else "the same with a latent of like density in the parent's place",
            )
    return made


@torch.no_grad()
def splits(sae: SAE, other: SAE, name: str, seed: int = 0) -> dict[str, Any]:
    """{"splits": {latent of the narrower: [[latent of the wider, cosine], ...]}, "against": name, "metrics": ...}.

    Raises InputError when the two give back rows of different widths.
    """
    if sae.d_out != other.d_out:
        raise InputError(f"{name} gives back rows of {other.d_out} values, not {sae.d_out}: name one of the same hook.")
    small, large = (sae, other) if sae.d_sae < other.d_sae else (other, sae)
    signed = sae.signed or other.signed
    above, below = (normalize(each.W_dec.float(), dim=1) for each in (small, large))
    random = torch.randn(above.shape, generator=torch.Generator().manual_seed(seed)).to(above)
    cosines, nearest = _nearest(below, above, signed)
    by_chance, _ = _nearest(below, normalize(random, dim=1), signed)
    under: dict[int, list[tuple[int, float]]] = {latent: [] for latent in range(small.d_sae)}
    for latent, (at, cosine) in enumerate(zip(nearest.tolist(), cosines.tolist(), strict=True)):
        under[at].append((latent, round(cosine, 4)))
    several = float(np.mean([len(group) > 1 for group in under.values()]))
    of = f"latents, {small.d_sae:,} of one and {large.d_sae:,} of the other ({name} against this)"
    cosine = "cosine of a latent of the wider with its nearest of the narrower, mean"
    made = {
        "splits.several": Metric(
            value=several, n=small.d_sae, of=of, definition="share of the narrower's latents nearest to 2 or more"
        ),
        "splits.cosine": Metric(value=float(cosines.mean()), n=large.d_sae, of=of, definition=cosine),
        "control.random.splits.cosine": Metric(
            value=float(by_chance.mean()), n=large.d_sae, of=of, definition="the same with random rows", seed=seed
        ),
    }
    return {"against": name, "narrower": "this" if small is sae else "the other", "splits": under, "metrics": made}


def _nearest(rows: Tensor, others: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(similarity, number) of the nearest of `others` to each row."""
    best = [similar(part, others, signed).max(dim=1) for part in rows.split(_CHUNK)]
    return torch.cat([part.values for part in best]), torch.cat([part.indices for part in best])


def _held(by_latent: csc_matrix, parent: int, family: Family) -> tuple[float, float, float]:
    """together, coverage and ratio (see `measured`) of the family's children below `parent`."""
    children = by_latent[:, list(family.children)].tocsr()
    on_parent = children[by_latent[:, [parent]].nonzero()[0]]
    each, n_parent = children.getnnz(axis=0), on_parent.shape[0]
    with_parent = np.asarray(on_parent.sum(axis=0)).ravel()
    pairs = (
        (both.data / np.minimum(each[both.row + first], each[both.col])).sum() for first, both in counted(children)
    )
    among = (2 * sum(pairs) + len(each)) / len(each) ** 2
    ratio = (with_parent / np.minimum(each, n_parent)).mean() / among
    return float((with_parent / each).mean()), float((on_parent.getnnz(axis=1) > 0).sum() / n_parent), float(ratio)


def _stand_in(by_latent: csc_matrix, latents: np.ndarray, family: Family) -> int:
    """The latent outside the family that fires most nearly as often as its parent, of those that entered."""
    outside = latents[~np.isin(latents, [family.parent, *family.children])]
    if not len(outside):
        return family.children[0]
    each = by_latent.getnnz(axis=0)
    return int(outside[np.abs(each[outside] - each[family.parent]).argmin()])


def _shown(family: Family, held: tuple[float, float, float], density: np.ndarray) -> dict[str, Any]:
    """The family as the file has it. held: of `_held`."""
    children = [
        {"latent": latent, "under": under, "density": round(float(density[latent]), 6)}
        for latent, under in zip(family.children, family.under, strict=True)
    ]
    measures = {name: round(value, 4) for name, value in zip(HELD, held, strict=True)}
    parent = {"parent": family.parent, "density": round(float(density[family.parent]), 6), "round": family.round}
    return {**parent, **measures, "children": children}
