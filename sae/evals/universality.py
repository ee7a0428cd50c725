"""Whether two dictionaries, of other hooks or other models, found the same: latents that fire alike on the same tokens,
and whether the decoder rows of such pairs lie alike in their spaces.

Pairs: each latent of the other dictionary takes the one of this dictionary that correlates most with it (Pearson, over
tokens); of several that take the same one the best stays; r <= 0.1 is no pair. SVCCA and RSA compare the two lists of
decoder rows; the control pairs them at random.
Source: Lan et al. 2024, arXiv:2410.06981. Differs: no filter by words, since it wants a tokeniser and a list.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from activations.cache import CachedActivations
from activations.errors import InputError
from sae.base import SAE
from sae.evals.metric import Metric
from sae.sparse import to_dense

MOST_LATENTS = 8192
"""Latents of each side that are correlated: those that fire most often."""
LEAST_R = 0.1
PAIRS_OF_RSA = 1000
SHUFFLES = 200
VARIANCE = 0.99


class Correlations(NamedTuple):
    """Of the latents that are not the same on all tokens."""

    r: Float[Tensor, "a b"]
    a: Int[Tensor, " a"]
    """The latents of the rows."""
    b: Int[Tensor, " b"]
    n: int
    """Tokens read."""


def universality(
    sae: SAE,
    cache: CachedActivations,
    other: SAE,
    other_cache: CachedActivations,
    name: str,
    *,
    n_rows: int = 100_000,
    seed: int = 0,
) -> dict[str, Metric]:
    """Correlations of latents, SVCCA and RSA of the pairs' decoder rows, each with its share of random pairings above.

    n_rows: tokens read. Raises InputError unless the two caches hold the same tokens in the same order.
    """
    found_r = correlations(sae, cache, other, other_cache, n_rows=n_rows)
    n, best = found_r.n, found_r.r.amax(dim=0) if found_r.r.numel() else torch.zeros(1)
    a, b = pairs(found_r)
    mine, theirs = sae.W_dec.float().cpu()[a], other.W_dec.float().cpu()[b]
    of_tokens = f"ordinary tokens, against {name}"
    found = {
        "universality.correlation": Metric(
            value=float(best.mean()),
            n=n,
            of=of_tokens,
            definition="correlation of a latent of the other with the one here that fires most alike, mean",
        ),
        "universality.pairs": Metric(
            value=len(a) / len(best),
            n=n,
            of=of_tokens,
            definition=f"share of the other's latents in a one-to-one pair of correlation above {LEAST_R}",
        ),
    }
    if len(a) < 3:
        return found
    rng = np.random.default_rng(seed)
    for measure, function in (("svcca", Svcca(mine, theirs)), ("rsa", Rsa(mine, theirs, rng))):
        value = function(None)
        null = np.array([function(rng.permutation(function.n)) for _ in range(SHUFFLES)])
        of = f"pairs of latents, against {name}"
        found[f"universality.{measure}"] = Metric(
            value=value, n=function.n, of=of, definition=function.definition, seed=seed
        )
        found[f"control.shuffled.universality.{measure}"] = Metric(
            value=float(null.mean()),
            n=function.n,
            of=of,
            definition=f"the same with the pairing shuffled, mean of {SHUFFLES}",
            seed=seed,
        )
        found[f"universality.{measure}_p"] = Metric(
            value=float((1 + (null >= value).sum()) / (1 + SHUFFLES)),
            n=SHUFFLES,
            of="shufflings of the pairing",
            definition="(1 + those that reach the value) / (1 + all)",
            seed=seed,
        )
    return found


@torch.no_grad()
def correlations(
    sae: SAE, cache: CachedActivations, other: SAE, other_cache: CachedActivations, *, n_rows: int, batch: int = 2048
) -> Correlations:
    """Pearson, of each latent with each of the other: of those that fire most often, `MOST_LATENTS` of each side.

    Raises InputError unless the two caches hold the same tokens in the same order.
    """
    device = sae.W_dec.device
    kept = [_busiest(each).to(device) for each in (sae, other)]
    sums = [torch.zeros(len(each), dtype=torch.float64, device=device) for each in kept]
    squares = [torch.zeros_like(each) for each in sums]
    products = torch.zeros(len(kept[0]), len(kept[1]), device=device)
    n = 0
    for i in range(min(cache.n_shards, other_cache.n_shards)):
        ids = cache.tokens(i).ids
        if not torch.equal(ids, other_cache.tokens(i).ids):
            raise InputError("The two runs hold other tokens: collect both from one corpus with one tokenizer.")
        mask = cache.mask(i) & other_cache.mask(i)
        for x, y in zip(cache.rows(i)[mask].split(batch), other_cache.rows(i)[mask].split(batch), strict=True):
            x, y = x[: n_rows - n], y[: n_rows - n]
            if not len(x):
                break
            each = [
                to_dense(*d.encode_sparse(rows.to(device, torch.float32)), d.d_sae)[:, chosen]
                for d, rows, chosen in ((sae, x, kept[0]), (other, y, kept[1]))
            ]
            for z, total, square in zip(each, sums, squares, strict=True):
                total += z.sum(dim=0, dtype=torch.float64)
                square += z.square().sum(dim=0, dtype=torch.float64)
            products += each[0].T @ each[1]
            n += len(x)
    spreads = [
        (square / n - (total / n).square()).clamp(min=0).sqrt() for total, square in zip(sums, squares, strict=True)
    ]
    means = [total / n for total in sums]
    products /= n
    r = (products - torch.outer(*means).float()) / torch.outer(*spreads).float()
    changing = [(spread > 0).nonzero().squeeze(1) for spread in spreads]
    return Correlations(
        r[changing[0][:, None], changing[1]].cpu(),
        a=kept[0][changing[0]].cpu(),
        b=kept[1][changing[1]].cpu(),
        n=n,
    )


def pairs(found: Correlations) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """(latents of the first, latents of the other), one to one, the most alike first."""
    if not found.r.numel():
        return found.a[:0], found.b[:0]
    best, takes = found.r.max(dim=0)
    order = best.argsort(descending=True, stable=True)
    order = order[best[order] > LEAST_R]
    firsts = np.unique(takes[order].numpy(), return_index=True)[1]  # of equal ones the first: the best
    order = order[torch.as_tensor(np.sort(firsts))]
    return found.a[takes[order]], found.b[order]


class Svcca:
    """Mean canonical correlation of two lists of rows, each reduced to the components of 99 % of its variance."""

    definition = "SVCCA of the pairs' decoder rows: mean canonical correlation"

    def __init__(self, a: Float[Tensor, "n _da"], b: Float[Tensor, "n _db"]) -> None:
        self.n = len(a)
        self._bases = [self._basis(each) for each in (a, b)]

    def __call__(self, order: Int[np.ndarray, " n"] | None) -> float:
        a, b = self._bases
        b = b if order is None else b[torch.as_tensor(order)]
        return float(torch.linalg.svdvals(a.T @ b).clamp(max=1).mean())

    @staticmethod
    def _basis(rows: Tensor) -> Tensor:
        u, s, _ = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
        shares = s.square().cumsum(0) / s.square().sum()
        return u[:, : int((shares < VARIANCE).sum()) + 1]


class Rsa:
    """Spearman correlation of two matrices of similarities (Pearson between rows), over pairs of rows."""

    definition = "RSA of the pairs' decoder rows: Spearman correlation of the rows' correlations"

    def __init__(self, a: Float[Tensor, "n _da"], b: Float[Tensor, "n _db"], rng: np.random.Generator) -> None:
        chosen = np.sort(rng.permutation(len(a))[:PAIRS_OF_RSA])
        self.n = len(chosen)
        self._lower = np.tril_indices(self.n, -1)
        self._a, self._b = (self._ranks(each[chosen]) for each in (a, b))

    def __call__(self, order: Int[np.ndarray, " n"] | None) -> float:
        b = self._b if order is None else self._b[np.ix_(order, order)]
        return float(np.corrcoef(self._a[self._lower], b[self._lower])[0, 1])

    def _ranks(self, rows: Tensor) -> Float[np.ndarray, "n n"]:
        ranks = np.zeros((self.n, self.n))
        ranks[self._lower] = rankdata(np.corrcoef(rows.numpy())[self._lower])
        return ranks + ranks.T


def _busiest(sae: SAE) -> Int[Tensor, " m"]:
    if sae.d_sae <= MOST_LATENTS:
        return torch.arange(sae.d_sae)
    assert sae.statistics is not None, "a dictionary without statistics"
    return sae.statistics.density.topk(MOST_LATENTS).indices.sort().values.cpu()
