"""Zipf's law for how often latents fire: what Mutual Choice and Feature Choice share. Nothing waits for the device.

Ordered by how often they fire, latents follow f(rank) = exp(c) / (rank + beta)^alpha but for the rarest, which fire too
seldom: those are dying, and AuxK is for them, before they are dead.
Source: arXiv:2411.02124, which has no code. The fit and the bound below are ours.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base import Dead

DYING = 0.5
"""A latent that fires less than this share of what the law expects is dying."""
DYING_PART = 8
"""At most one of so many latents counts as dying, the worst: bounds what AuxK costs."""


def expected(frequency: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """How often each latent would fire by the law, from how often it does; all 0 if none does.

    alpha >= 0 and c are those of least squares on the logarithms of the more frequent half, beta the best of the powers
    of two.
    """
    m = len(frequency)
    ordered, latents = frequency.sort(descending=True, stable=True)
    rank = torch.arange(1, m + 1, device=frequency.device, dtype=frequency.dtype)
    beta = 2.0 ** torch.arange(-1, max(m, 2).bit_length(), device=frequency.device, dtype=frequency.dtype)
    fitted = ((rank <= (m + 1) // 2) & (ordered > 0)).to(frequency.dtype)
    weight = fitted / fitted.sum().clamp(min=1.0)
    y, t = ordered.clamp(min=1e-30).log(), (rank + beta[:, None]).log()
    y_mean, t_mean = (weight * y).sum(), (weight * t).sum(dim=1, keepdim=True)
    variance = (weight * (t - t_mean).square()).sum(dim=1, keepdim=True).clamp(min=1e-12)
    slope = ((weight * (t - t_mean) * (y - y_mean)).sum(dim=1, keepdim=True) / variance).clamp(max=0.0)
    law = y_mean + slope * (t - t_mean)
    best = (weight * (law - y).square()).sum(dim=1).argmin()
    by_rank = law.index_select(0, best[None])[0].exp() * (ordered[0] > 0)
    return torch.empty_like(by_rank).scatter_(0, latents, by_rank)


def dying(frequency: Float[Tensor, " m"]) -> Dead:
    """Latents that fire less than the law expects, in a place of one size."""
    wanted = expected(frequency)
    ratio = torch.where(wanted > 0, frequency / wanted.clamp(min=1e-30), 1.0)
    worst = ratio.topk(max(len(ratio) // DYING_PART, 1), largest=False)
    real = worst.values < DYING
    return Dead(worst.indices, real, real.sum().to(frequency.dtype))


def quotas(wanted: Float[Tensor, " m"], total: int, n: int) -> Int[Tensor, " m"]:
    """How many of n rows each latent gets: 1 each (as far as they go), and of the rest a share as `wanted`; `total` in
    all, less what would be more than n for one."""
    m = len(wanted)
    base = min(total / m, 1.0)
    share = torch.where(wanted.sum() > 0, wanted / wanted.sum().clamp(min=1e-30), 1 / m)
    exact = base + (total - base * m) * share.double()
    floor = exact.floor()
    left = total - floor.sum()
    rank = (exact - floor).argsort(descending=True, stable=True).argsort()
    return (floor + (rank < left)).clamp(max=n).long()
