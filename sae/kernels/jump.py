"""JumpReLU on dense pre-activations, one pass forward and one backward; see `sae.architectures.jumprelu`.

A program takes a block of columns of some of the rows, so that sums over rows end in one partial sum for each such
part; the parts are then added in order.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

ROWS, BLOCK, WARPS = 8, 256, 4
PROGRAMS = 4096
"""Programs wanted, at least: rows are split into parts until there are so many."""


def jump(
    pre: Float[Tensor, "n d_sae"], threshold: Float[Tensor, " d_sae"]
) -> tuple[Float[Tensor, "n d_sae"], Float[Tensor, " d_sae"]]:
    """(pre where it is above the threshold, else 0; in how many rows it is, for each latent)."""
    assert pre.is_contiguous()
    n, d_sae = pre.shape
    z = torch.empty_like(pre)
    rows, n_parts = _parts(n, d_sae)
    counts = torch.empty(n_parts, d_sae, dtype=torch.float32, device=pre.device)
    _jump[(triton.cdiv(d_sae, BLOCK), n_parts)](
        pre, threshold, z, counts, n, d_sae, rows, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS
    )
    return z, counts.sum(dim=0)


def jump_backward(
    pre: Float[Tensor, "n d_sae"],
    threshold: Float[Tensor, " d_sae"],
    dz: Float[Tensor, "n d_sae"],
    l0_weight: Float[Tensor, ""],
    bandwidth: float,
) -> tuple[Float[Tensor, "n d_sae"], Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """Gradients of (pre, encoder bias, threshold) from that of z and l0_weight, that of each firing. Writes into dz."""
    assert all(x.is_contiguous() for x in (pre, dz))
    n, d_sae = pre.shape
    rows, n_parts = _parts(n, d_sae)
    parts = torch.empty(2, n_parts, d_sae, dtype=torch.float32, device=pre.device)
    _jump_backward[(triton.cdiv(d_sae, BLOCK), n_parts)](
        pre, threshold, dz, l0_weight, parts[0], parts[1], n, d_sae, rows, bandwidth, ROWS=ROWS, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    sums = parts.sum(dim=1)
    return dz, sums[0], sums[1]


def _parts(n: int, d_sae: int) -> tuple[int, int]:
    """(rows of a part, parts)."""
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(d_sae, BLOCK))
    rows = triton.cdiv(triton.cdiv(n, wanted), 4 * ROWS) * 4 * ROWS
    return rows, triton.cdiv(n, rows) if n else 0


@triton.jit
@no_type_check
def _jump(pre, threshold, z, counts, n, d_sae, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * rows
    bound = tl.load(threshold + column, mask=column < d_sae, other=0.0)
    count = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + rows, n), ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * d_sae + column[None, :]
        inside = (row < n)[:, None] & (column < d_sae)[None, :]
        x = tl.load(pre + at, mask=inside, other=0.0)
        on = (x.to(tl.float32) > bound[None, :]) & inside
        tl.store(z + at, tl.where(on, x, 0.0), mask=inside)
        count += on.to(tl.float32)
    tl.store(counts + tl.program_id(1).to(tl.int64) * d_sae + column, tl.sum(count, axis=0), mask=column < d_sae)


@triton.jit
@no_type_check
def _jump_backward(
    pre,
    threshold,
    dz,
    l0_weight,
    bias_parts,
    threshold_parts,
    n,
    d_sae,
    rows,
    bandwidth,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * rows
    bound = tl.load(threshold + column, mask=column < d_sae, other=0.0)
    weight = tl.load(l0_weight)
    bias = tl.zeros([ROWS, BLOCK], tl.float32)
    steps = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + rows, n), ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * d_sae + column[None, :]
        inside = (row < n)[:, None] & (column < d_sae)[None, :]
        x = tl.load(pre + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dz + at, mask=inside, other=0.0).to(tl.float32)
        near = (tl.abs(x - bound[None, :]) < bandwidth / 2) & inside
        step = tl.where(near, (grad * bound[None, :] + weight) / bandwidth, 0.0)
        grad = tl.where(x > bound[None, :], grad, 0.0) + step
        tl.store(dz + at, grad, mask=inside)
        bias += grad
        steps -= step
    at = tl.program_id(1).to(tl.int64) * d_sae + column
    tl.store(bias_parts + at, tl.sum(bias, axis=0), mask=column < d_sae)
    tl.store(threshold_parts + at, tl.sum(steps, axis=0), mask=column < d_sae)
