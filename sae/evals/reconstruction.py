"""Reconstruction and sparsity on cached activations, without the language model."""

from collections.abc import Iterator
from itertools import count, takewhile
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from activations.cache import Activations, CachedActivations, held_out_mask
from sae.base import SAE
from sae.evals.metric import Metric, over_hooks
from sae.rows import parts_given_back


class Rows(NamedTuple):
    """Some ordinary tokens of the cache."""

    x: Float[Tensor, "n columns"]
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


class AtHook:
    """What is summed of one of the hooks that a dictionary gives back."""

    def __init__(self, cache: CachedActivations, n_docs: int, device: torch.device) -> None:
        self.centre = cache.mean.to(device)
        self.sums = Sums(*torch.zeros(len(Sums._fields), n_docs, dtype=torch.float64, device=device))
        self.offset = torch.zeros(cache.d_in, dtype=torch.float64, device=device)
        self.hat_power, self.dots = torch.zeros(2, dtype=torch.float64, device=device)

    def add(
        self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"], l0: Int[Tensor, " n"], docs: Int[Tensor, " n"]
    ) -> None:
        each = Sums(
            n=torch.ones_like(l0),
            error=(x - x_hat).square().sum(dim=1),
            power=(x - self.centre).square().sum(dim=1),
            cosine=cosine_similarity(x, x_hat, dim=1),
            l0=l0,
            norm_ratio=x_hat.norm(dim=1) / x.norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny),
        )
        for total, values in zip(self.sums, each, strict=True):
            total.index_add_(0, docs, values.double())
        self.offset += (x - self.centre).double().sum(dim=0)
        self.hat_power += x_hat.square().sum(dim=1).double().sum()
        self.dots += (x * x_hat).sum(dim=1).double().sum()

    def metrics(self, part: str) -> dict[str, Metric]:
        sums = Sums(*(total[self.sums.n > 0].cpu() for total in self.sums))
        n = int(sums.n.sum())
        tokens = f"ordinary tokens of {len(sums.n):,} {part} documents"
        # Of the squares about the cache's mean, to those about the mean of the rows that were read.
        variance = sums.power.sum() - self.offset.square().sum().cpu() / n
        fvu = _ratio(sums.error, sums.power * (variance / sums.power.sum()))
        ev = (1 - fvu[0], None if fvu[2] is None else 1 - fvu[2], None if fvu[1] is None else 1 - fvu[1])
        bias = float(self.hat_power / self.dots) if float(self.dots) else 1.0

        def metric(value: tuple[float, float | None, float | None], definition: str) -> Metric:
            return Metric(value=value[0], n=n, of=tokens, definition=definition, lo=value[1], hi=value[2])

        return {
            "fvu": metric(fvu, "sum |x - x_hat|^2 / sum |x - mean(x)|^2"),
            "explained_variance": metric(ev, "1 - FVU"),
            "cosine": metric(_ratio(sums.cosine, sums.n), "mean cosine of x and x_hat"),
            "l0": metric(_ratio(sums.l0, sums.n), "mean number of latents that are not 0"),
            "norm_ratio": metric(_ratio(sums.norm_ratio, sums.n), "mean |x_hat| / |x|"),
            "shrinkage": metric(
                (bias, None, None),
                "relative reconstruction bias: sum |x_hat|^2 / sum x . x_hat; 1 is unbiased, below 1 shrinks",
            ),
        }


@torch.no_grad()
def reconstruction(sae: SAE, rows: Activations, *, batch: int = 4096) -> dict[str, Metric]:
    """FVU, cosine, norms and L0 over ordinary tokens of held-out documents (of all documents when none is held out).

    rows: as the dictionary was trained on (`sae.rows`): one hook, or several side by side; then of each hook that it
    gives back, and their mean.
    Intervals take documents for the units, since tokens of one are alike: the linearised standard error of a ratio of
    sums over documents. None where there is a single document.
    """
    device = sae.W_dec.device
    part = evaluation_part(rows)
    gives = parts_given_back(sae, rows)
    widths = [each.d_in for each in gives]
    n_docs = 1 + max(int(rows.tokens(i).docs.max()) for i in _shards(rows))
    hooks = [AtHook(each, n_docs, device) for each in gives]
    l0_counts = torch.zeros(sae.d_sae + 1, dtype=torch.long, device=device)
    for read in rows_of(rows, part, batch):
        row, docs = read.x.to(device, torch.float32), read.docs.to(device)
        x, target = row[:, : sae.d_in], row[:, sae.d_in :] if sae.target == "hook" else row
        values, indices = sae.encode_sparse(x)
        x_hat = torch.nn.functional.embedding_bag(indices, sae.W_dec, per_sample_weights=values, mode="sum")
        x_hat = x_hat + sae.offset(x)
        l0 = (values != 0).sum(dim=1)
        for hook, y, y_hat in zip(hooks, target.split(widths, dim=1), x_hat.split(widths, dim=1), strict=True):
            hook.add(y, y_hat, l0, docs)
        l0_counts += torch.bincount(l0, minlength=len(l0_counts))
    of_hooks = {each.hook: hook.metrics(part) for each, hook in zip(gives, hooks, strict=True)}
    l0s = [metrics.pop("l0") for metrics in of_hooks.values()]  # the same at all of them
    several = torch.cumsum(l0_counts, 0).cpu()

    def quantile(share: float, definition: str) -> Metric:
        value = float(torch.searchsorted(several, share * l0s[0].n))
        return Metric(value=value, n=l0s[0].n, of=l0s[0].of, definition=definition)

    return {
        **over_hooks(of_hooks),
        "l0": l0s[0],
        "l0_median": quantile(0.5, "median number of latents that are not 0"),
        "l0_q95": quantile(0.95, "number of latents that are not 0: 95 % quantile"),
    }


def evaluation_part(rows: Activations) -> str:
    """Which documents metrics are taken on: "held-out" where there are some, else "all"."""
    return "held-out" if any(bool(held_out_mask(rows, i).any()) for i in _shards(rows)) else "all"


def rows_of(rows: Activations, part: str, batch: int) -> Iterator[Rows]:
    """The ordinary tokens of a part of the documents, in the cache's order, at most `batch` at a time."""
    for i in _shards(rows):
        mask = held_out_mask(rows, i) if part == "held-out" else rows.mask(i)
        docs = rows.tokens(i).docs[mask].long()
        yield from map(Rows, rows.rows(i)[mask].split(batch), docs.split(batch))


def _shards(rows: Activations) -> Iterator[int]:
    return takewhile(rows.has, count())


def _ratio(above: Tensor, below: Tensor) -> tuple[float, float | None, float | None]:
    """sum above / sum below over documents, with its 95 % interval."""
    value, n = float(above.sum() / below.sum()), len(above)
    if n < 2:
        return value, None, None
    residuals = (above - value * below).square().sum()
    half = 1.96 * float((residuals * n / (n - 1)).sqrt() / below.sum())
    return value, value - half, value + half
