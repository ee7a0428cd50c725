"""Adam on the rows of a dictionary, every array read and written once: a step is bound by memory alone.

Decoder rows of norm 1 lose the part of their gradient along themselves before the update and return to norm 1 after it,
in the same pass, which also writes the copy in low precision that products use.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sae.dense import FLOAT8, LARGEST, SCALE

TILE, ENTRIES_PER_THREAD = 2048, 16
"""Entries of a program for rows shorter than that, and entries of a thread."""
STRIP = 16
"""Tiles that a program of `squares` adds up."""


def adam_rows(
    w: Float[Tensor, "d_sae d"],
    g: Float[Tensor, "d_sae d"],
    m: Float[Tensor, "d_sae d"],
    v: Float[Tensor, "d_sae d"],
    low: Float[Tensor, "d_sae d"] | None,
    hyper: Float[Tensor, "4"],
    betas: tuple[float, float],
    eps: float,
    unit: bool,
) -> None:
    """One step of `torch.optim.Adam` in place on w, m, v and `low`, the copy of w in its own precision (in eight bits
    as `sae.dense.to_float8` makes it).

    hyper, on the device in float32: learning rate, 1 - beta1^t, 1 - beta2^t, a factor of the gradient (clipping).
    unit: w has rows of norm 1, and keeps them.
    """
    assert all(x is None or x.is_contiguous() for x in (w, g, m, v, low))
    d_sae, d = w.shape
    rows, block, warps = _tile(d)
    _adam[(triton.cdiv(d_sae, rows),)](
        w,
        g,
        m,
        v,
        low,
        hyper,
        d_sae,
        d,
        1 - betas[0],
        betas[1],
        1 - betas[1],
        eps,
        UNIT=unit,
        SCALE=SCALE if low is not None and low.dtype == FLOAT8 else None,
        LARGEST=LARGEST,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )


def squares(g: Float[Tensor, "d_sae d"]) -> Float[Tensor, ""]:
    """Sum of squares of g, in float32, the same at each call (torch's own sum of so many is slower)."""
    assert g.is_contiguous()
    d_sae, d = g.shape
    rows, block, warps = _tile(d)
    parts = torch.empty(triton.cdiv(d_sae, rows * STRIP), dtype=torch.float32, device=g.device)
    _squares[(len(parts),)](g, parts, d_sae, d, STRIP=STRIP, ROWS=rows, BLOCK=block, num_warps=warps)
    return parts.sum()


def _tile(d: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program: all columns, and several rows where they are short."""
    block = triton.next_power_of_2(d)
    rows = max(TILE // block, 1)
    return rows, block, min(max(rows * block // (32 * ENTRIES_PER_THREAD), 1), 16)


@triton.jit
@no_type_check
def _adam(
    w,
    g,
    m,
    v,
    low,
    hyper,
    n_rows,
    d,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * d + column[None, :]
    inside = (row < n_rows)[:, None] & (column < d)[None, :]
    lr, correction1 = tl.load(hyper), tl.load(hyper + 1)
    correction2, factor = tl.load(hyper + 2), tl.load(hyper + 3)

    grad = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(w + at, mask=inside, other=0.0)
    first = tl.load(m + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    if UNIT:
        grad -= tl.sum(grad * weight, axis=1)[:, None] * weight
    grad *= factor
    first += one_minus_beta1 * (grad - first)
    second = beta2 * second + one_minus_beta2 * grad * grad
    weight -= lr / correction1 * first / (tl.sqrt(second) / tl.sqrt(correction2) + eps)
    if UNIT:
        square = tl.where(row < n_rows, tl.sum(weight * weight, axis=1), 1.0)
        weight /= tl.sqrt(square)[:, None]
    tl.store(w + at, weight, mask=inside)
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    if low is not None:
        if SCALE is not None:
            weight = tl.minimum(tl.maximum(weight * SCALE, -LARGEST), LARGEST)
        tl.store(low + at, weight, mask=inside)


@triton.jit
@no_type_check
def _squares(g, parts, n_rows, d, STRIP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(0, STRIP):
        row = (tl.program_id(0) * STRIP + step) * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * d + column[None, :]
        inside = (row < n_rows)[:, None] & (column < d)[None, :]
        grad = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        total += grad * grad
    tl.store(parts + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))
