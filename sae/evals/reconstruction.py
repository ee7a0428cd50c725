"""Reconstruction and sparsity on cached activations, without the language model."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from activations.cache import CachedActivations, held_out_mask
from sae.base import SAE
from sae.evals.metric import Metric


class Rows(NamedTuple):
    """Some ordinary tokens of the cache."""

    x: Float[Tensor, "n d_in"]
    docs: Int[Tensor, " n"]
    """The document that each is of."""


class Sums(NamedTuple):
    """Of a document's tokens: float64, an entry a document; sums of squares are about the cache's mean."""

    n: Tensor
    error: Tensor
    power: Tensor
    cosine: Tensor
    l0: Tensor
    norm_ratio: Tensor


@torch.no_grad()
def reconstruction(sae: SAE, cache: CachedActivations, *, batch: int = 4096) -> dict[str, Metric]:
    """FVU, cosine, norms and L0 over ordinary tokens of held-out documents (of all documents when none is held out).

    Intervals take documents for the units, since tokens of one are alike: the linearised standard error of a ratio of
    sums over documents. None where there is a single document.
    """
    device = sae.W_dec.device
    part = evaluation_part(cache)
    centre = cache.mean.to(device)
    n_docs = 1 + max(int(cache.tokens(i).docs.max()) for i in range(cache.n_shards))
    sums = Sums(*torch.zeros(len(Sums._fields), n_docs, dtype=torch.float64, device=device))
    offset = torch.zeros(sae.d_in, dtype=torch.float64, device=device)
    hat_power, dots = torch.zeros(2, dtype=torch.float64, device=device)
    l0_counts = torch.zeros(sae.d_sae + 1, dtype=torch.long, device=device)
    for rows in rows_of(cache, part, batch):
        x, docs = rows.x.to(device, torch.float32), rows.docs.to(device)
        values, indices = sae.encode_sparse(x)
        x_hat = torch.nn.functional.embedding_bag(indices, sae.W_dec, per_sample_weights=values, mode="sum") + sae.b_dec
        l0 = (values != 0).sum(dim=1)
        each = Sums(
            n=torch.ones_like(l0),
            error=(x - x_hat).square().sum(dim=1),
            power=(x - centre).square().sum(dim=1),
            cosine=cosine_similarity(x, x_hat, dim=1),
            l0=l0,
            norm_ratio=x_hat.norm(dim=1) / x.norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny),
        )
        for total, values_ in zip(sums, each, strict=True):
            total.index_add_(0, docs, values_.double())
        offset += (x - centre).double().sum(dim=0)
        hat_power += x_hat.square().sum(dim=1).double().sum()
        dots += (x * x_hat).sum(dim=1).double().sum()
        l0_counts += torch.bincount(l0, minlength=len(l0_counts))
    sums = Sums(*(total[sums.n > 0].cpu() for total in sums))
    n = int(sums.n.sum())
    tokens = f"ordinary tokens of {len(sums.n):,} {part} documents"
    # Of the squares about the cache's mean, to those about the mean of the rows that were read.
    variance = sums.power.sum() - offset.square().sum().cpu() / n
    fvu = _ratio(sums.error, sums.power * (variance / sums.power.sum()))
    ev = (1 - fvu[0], None if fvu[2] is None else 1 - fvu[2], None if fvu[1] is None else 1 - fvu[1])
    several = torch.cumsum(l0_counts, 0).cpu()

    def quantile(share: float) -> float:
        return float(torch.searchsorted(several, share * n))

    def metric(value: tuple[float, float | None, float | None], definition: str) -> Metric:
        return Metric(value=value[0], n=n, of=tokens, definition=definition, lo=value[1], hi=value[2])

    def plain(value: float, definition: str) -> Metric:
        return metric((value, None, None), definition)

    return {
        "fvu": metric(fvu, "sum |x - x_hat|^2 / sum |x - mean(x)|^2"),
        "explained_variance": metric(ev, "1 - FVU"),
        "cosine": metric(_ratio(sums.cosine, sums.n), "mean cosine of x and x_hat"),
        "l0": metric(_ratio(sums.l0, sums.n), "mean number of latents that are not 0"),
        "l0_median": plain(quantile(0.5), "median number of latents that are not 0"),
        "l0_q95": plain(quantile(0.95), "number of latents that are not 0: 95 % quantile"),
        "norm_ratio": metric(_ratio(sums.norm_ratio, sums.n), "mean |x_hat| / |x|"),
        "shrinkage": plain(
            float(hat_power / dots) if float(dots) else 1.0,
            "relative reconstruction bias: sum |x_hat|^2 / sum x . x_hat; 1 is unbiased, below 1 shrinks",
        ),
    }


def evaluation_part(cache: CachedActivations) -> str:
    """Which documents metrics are taken on: "held-out" where there are some, else "all"."""
    return "held-out" if any(bool(held_out_mask(cache, i).any()) for i in range(cache.n_shards)) else "all"


def rows_of(cache: CachedActivations, part: str, batch: int) -> Iterator[Rows]:
    """The ordinary tokens of a part of the documents, in the cache's order, at most `batch` at a time."""
    for i in range(cache.n_shards):
        mask = held_out_mask(cache, i) if part == "held-out" else cache.mask(i)
        docs = cache.tokens(i).docs[mask].long()
        yield from map(Rows, cache.rows(i)[mask].split(batch), docs.split(batch))


def _ratio(above: Tensor, below: Tensor) -> tuple[float, float | None, float | None]:
    """sum above / sum below over documents, with its 95 % interval."""
    value, n = float(above.sum() / below.sum()), len(above)
    if n < 2:
        return value, None, None
    residuals = (above - value * below).square().sum()
    half = 1.96 * float((residuals * n / (n - 1)).sqrt() / below.sum())
    return value, value - half, value + half
