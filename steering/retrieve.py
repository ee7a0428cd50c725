"""Steered semantic search: latents of a query's embedding are raised or lowered, and the corpus is searched with that.

    x' = x + decode(z') - decode(z)        z = encode(x), z' the same but for the latents that are set

So what the dictionary cannot say of the query (the error) stays in it. Rows are ranked by their cosine with x'. Beside
the search without edits stand random latents, raised until the query has moved as far.
Source: O'Neill et al. 2024, arXiv:2408.00657, sec. 5, and its code (saerch, search_eval.py: the edit is added to the
query). Differs: there a language model guesses from the results which latent was raised; here it is counted how far the
ranking went to the rows on which the latent fires.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from tqdm import tqdm

from activations.cache import CachedActivations
from activations.errors import InputError
from sae.base import SAE
from sae.evals.logistic import auc
from sae.evals.metric import Metric, mean_of


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is done to one latent of the query; amounts in units of the latent's largest value on the corpus."""

    latent: int
    amount: float
    relative: bool = False
    """Add the amount to what the latent is, instead of setting it."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    row: int
    """Of the run's cache."""
    doc: int
    cosine: float
    """With the query that was searched with."""
    similarity: float
    """With the query as it was asked."""
    latents: dict[int, float]
    """What the changed latents are on this row, in units of their largest value."""


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    query: dict[int, float]
    """The query's latents, the largest first, in units of their largest value on the corpus; without those that fire on
    none of its rows."""
    base: list[Hit]
    """Nearest to the query as it was asked."""
    steered: list[Hit]
    """Nearest to the changed query; empty when nothing is changed."""
    metrics: dict[str, Metric]


@torch.no_grad()
def retrieve(
    sae: SAE,
    cache: CachedActivations,
    x: Float[Tensor, " d_in"],
    changes: Sequence[Change] = (),
    *,
    n: int = 10,
    n_controls: int = 20,
    seed: int = 0,
    skip: int | None = None,
    batch: int = 4096,
) -> Retrieved:
    """The n rows of the cache nearest to x, and those nearest to x with its latents changed, with what the change did.

    n_controls: random latents that are raised instead, each by itself. skip: a row that is no result (the query's own).
    Memory: a number for each row and query, of which there are 2 + n_controls.
    Raises InputError for a latent that is none, or never fires, and a dictionary without statistics.
    """
    unit = largest(sae)
    _check(changes, unit)
    x = x.to(sae.W_dec.device, torch.float32)
    z = sae.encode(x[None])[0]
    latents = [change.latent for change in changes]
    queries = x[None]
    if changes:
        moved = changed(sae, x, changes)
        fires_somewhere = (unit > 0).cpu().numpy()
        fires_somewhere[latents] = False
        at_random = np.random.default_rng(seed).permutation(np.flatnonzero(fires_somewhere))[:n_controls]
        away = normalize(sae.W_dec[torch.from_numpy(at_random).to(x.device)].float(), dim=1) * (moved - x).norm()
        queries = torch.cat([queries, moved[None], x + away])
    rows, docs, scores, values = _scores(sae, cache, queries, latents, skip, batch)
    values /= unit[latents].cpu().numpy()
    best = np.argsort(-scores, axis=0, kind="stable")[:n]

    def hits(query: int) -> list[Hit]:
        return [
            Hit(
                row=int(rows[i]),
                doc=int(docs[i]),
                cosine=float(scores[i, query]),
                similarity=float(scores[i, 0]),
                latents=dict(zip(latents, values[i].tolist(), strict=True)),
            )
            for i in best[:, query]
        ]

    order = z.abs().argsort(descending=True)[: int((z != 0).sum())].tolist()
    of_query = {i: float(z[i] / unit[i]) for i in order if unit[i]}
    similarities = cosine_similarity(queries, x[None]).cpu().numpy()
    return Retrieved(
        query=of_query,
        base=hits(0),
        steered=hits(1) if changes else [],
        metrics=_metrics(scores, similarities, values, best, latents, seed) if changes else {},
    )


def changed(sae: SAE, x: Float[Tensor, " d_in"], changes: Sequence[Change]) -> Float[Tensor, " d_in"]:
    """x with its latents changed; below 0 only where latents have signs. Raises InputError as `retrieve` does."""
    unit = largest(sae)
    _check(changes, unit)
    before = sae.encode(x[None])
    after = before.clone()
    for change in changes:
        value = change.amount * unit[change.latent] + (before[0, change.latent] if change.relative else 0.0)
        after[0, change.latent] = value if sae.signed else value.clamp(min=0)
    return (x + sae.decode(after, x[None]) - sae.decode(before, x[None]))[0]


def largest(sae: SAE) -> Float[Tensor, " d_sae"]:
    """The largest size of each latent on the cached rows. Raises InputError when that is not known."""
    if sae.statistics is None:
        raise InputError("This dictionary has no statistics.safetensors: train it with `sae train`.")
    return torch.maximum(sae.statistics.max, -sae.statistics.min).to(sae.W_dec.device, torch.float32)


def _check(changes: Sequence[Change], unit: Tensor) -> None:
    for change in changes:
        if not 0 <= change.latent < len(unit):
            raise InputError(f"There is no latent {change.latent}: expected 0 to {len(unit) - 1}.")
        if not unit[change.latent]:
            raise InputError(f"Latent {change.latent} never fires on the cached rows: choose another.")
    if len({change.latent for change in changes}) < len(changes):
        raise InputError("A latent is changed twice: name each once.")


def _scores(
    sae: SAE, cache: CachedActivations, queries: Tensor, latents: Sequence[int], skip: int | None, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, document, cosine with each query, value of each latent) of every ordinary row of the cache."""
    unit_queries = normalize(queries, dim=1).T
    parts: list[tuple[np.ndarray, ...]] = []
    with tqdm(total=cache.n_rows, desc="searching", unit="row", unit_scale=True, disable=None) as bar:
        for i in range(cache.n_shards):
            mask = cache.mask(i).clone()
            if skip is not None and 0 <= skip - cache.offset(i) < len(mask):
                mask[skip - cache.offset(i)] = False
            numbers = mask.nonzero().flatten()
            for places in numbers.split(batch):
                x = cache.rows(i)[places].to(queries.device, torch.float32)
                near = normalize(x, dim=1) @ unit_queries
                columns = (places + cache.offset(i), cache.tokens(i).docs[places], near, _of(sae, x, latents))
                parts.append(tuple(column.cpu().numpy() for column in columns))
            bar.update(len(mask))
    rows, docs, scores, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    return rows, docs, scores, values


def _of(sae: SAE, x: Float[Tensor, "n d_in"], latents: Sequence[int]) -> Float[Tensor, "n m"]:
    """Values of these latents alone; the dense form of a wide dictionary would be far larger."""
    if not latents:
        return x[:, :0]
    values, indices = sae.encode_sparse(x)
    return torch.stack([(values * (indices == latent)).sum(dim=1) for latent in latents], dim=1)


def _metrics(
    scores: np.ndarray,
    similarities: np.ndarray,
    values: np.ndarray,
    best: np.ndarray,
    latents: Sequence[int],
    seed: int,
) -> dict[str, Metric]:
    """base, steered and control.random of each measure. Columns of `scores`: as asked, changed, and the controls."""
    top = f"rows nearest to the query, of {len(scores):,}"
    made: dict[str, Metric] = {}

    def measure(name: str, each: np.ndarray, *, n: int, of: str, definition: str) -> None:
        for i, prefix in enumerate(("base", "steered")):
            made[f"{prefix}.{name}"] = Metric(value=float(each[i]), n=n, of=of, definition=definition)
        if len(each) > 2:
            made[f"control.random.{name}"] = mean_of(
                each[2:],
                of=f"random latents, raised until the query has moved as far; {of}",
                definition=definition,
                seed=seed,
            )

    measure("similarity", similarities, n=1, of="query", definition="cosine of the query searched with and that asked")
    kept = np.take_along_axis(scores[:, :1], best, axis=0).mean(axis=0)
    measure("kept", kept, n=len(best), of=top, definition="cosine of a result with the query as it was asked, mean")
    shared = np.array([np.isin(column, best[:, 0]).mean() for column in best.T])
    measure("shared", shared, n=len(best), of=top, definition="share of the results that are those of the query asked")
    for i, latent in enumerate(latents):
        fires = values[:, i] != 0
        on = np.array([fires[column].mean() for column in best.T])
        measure(
            f"latent_{latent}.fires",
            on,
            n=len(best),
            of=top,
            definition=f"share of the results on which latent {latent} fires; of all rows {fires.mean():.4f}",
        )
        if 0 < fires.sum() < len(fires):
            ranked = np.array([auc(column, fires) for column in scores.T])
            measure(
                f"latent_{latent}.auc",
                ranked,
                n=len(scores),
                of="rows",
                definition=f"share of pairs of a row on which latent {latent} fires and one on which it does not that "
                "are ranked in this order",
            )
    return made
