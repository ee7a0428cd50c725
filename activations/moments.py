"""Mean and spread of rows, taken shard by shard and merged: exact whatever the order of the shards.

Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", the parallel form of Welford's.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

CHUNK = {"cpu": 1 << 11, "cuda": 1 << 16}
"""Rows reduced at once in float32: about what a processor's cache holds, and what fills a GPU."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean, squared deviations from it and norms of some rows; tensors, so that a GPU need not be waited for."""

    n: Float64[Tensor, ""]
    mean: Float64[Tensor, " d"]
    m2: Float64[Tensor, " d"]
    """Sum over the rows of (x - mean)^2."""
    norms: Float64[Tensor, ""]
    """Sum of the rows' norms."""

    @property
    def mean_norm(self) -> float:
        return float(self.norms / self.n)


def moments(rows: Float[Tensor, "rows d"], norms: Float[Tensor, " rows"], mask: Bool[Tensor, " rows"]) -> Moments:
    """Moments of the rows that `mask` keeps. Sums run in float32 within a chunk and in float64 over chunks."""
    step = CHUNK.get(rows.device.type, 1 << 16)
    parts = zip(rows.split(step), norms.split(step), mask.split(step), strict=True)
    return merge(_of_chunk(*part) for part in parts)


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of all rows together, from those of disjoint parts."""
    each = list(parts)
    n, means = torch.stack([part.n for part in each]), torch.stack([part.mean for part in each])
    total = n.sum()
    mean = (n[:, None] * means).sum(dim=0) / total.clamp(min=1)
    between = (n[:, None] * (means - mean).square()).sum(dim=0)
    within = torch.stack([part.m2 for part in each]).sum(dim=0)
    return Moments(n=total, mean=mean, m2=within + between, norms=torch.stack([part.norms for part in each]).sum())


def _of_chunk(rows: Tensor, norms: Tensor, mask: Tensor) -> Moments:
    # Products with a 0/1 weight and not rows[mask], whose size a GPU would have to tell the host first.
    weight = mask.float()
    x = torch.where(mask[:, None], rows.float(), 0.0)
    n = weight.sum().double()
    mean = ((weight @ x).double() / n.clamp(min=1)).float()
    return Moments(
        n=n,
        mean=mean.double(),
        m2=(weight @ (x - mean).square()).double(),
        norms=torch.where(mask, norms, 0.0).sum().double(),
    )
