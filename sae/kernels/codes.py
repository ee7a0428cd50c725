"""Products with sparse codes, (values, indices) of k latents a row: only rows of chosen latents are read.

Each row of a matrix is read by many programs, a slice of columns at a time, and all programs of a slice run before
those of the next: the slice of the whole matrix stays in the L2 cache, from which most of the reads then come.
Places with value 0 (unused ones) are not read.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

DECODE_ENTRIES, DECODE_BLOCK, DECODE_WARPS = 16, 128, 1
DOTS_ENTRIES, DOTS_BLOCK, DOTS_WARPS = 16, 64, 1
DOTS_SPAN = 128
"""Columns that a program of `dots` sums; None: whole rows, one after the other instead of slice by slice."""
ROWS_ENTRIES, ROWS_BLOCK, ROWS_WARPS = 8, 256, 1
SEGMENT = 128
"""Entries of one latent, in sorted order, that are summed apart where a latent has very many."""


def decode(
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
    W: Float[Tensor, "d_sae d"],
    starts: Int[Tensor, " _rows_and_1"] | None = None,
) -> Float[Tensor, "_rows d"]:
    """sum_j values[:, j] * W[indices[:, j]], in float32.

    starts: of a flat table (k = 1), whose entries starts[r] to starts[r + 1] are those of row r.
    """
    assert all(x is None or x.is_contiguous() for x in (values, indices, W, starts))
    n, k = values.shape
    n, d = n if starts is None else len(starts) - 1, W.shape[1]
    out = torch.empty(n, d, dtype=torch.float32, device=W.device)
    block = _block(d, DECODE_BLOCK)
    if n:
        _decode[(n, triton.cdiv(d, block))](
            values, indices, starts, W, out, k, d, ENTRIES=DECODE_ENTRIES, BLOCK=block, num_warps=DECODE_WARPS
        )
    return out


def dots(
    g: Float[Tensor, "_rows d"],
    W: Float[Tensor, "d_sae d"],
    indices: Int[Tensor, "n k"],
    values: Float[Tensor, "n k"] | None = None,
    starts: Int[Tensor, " _rows_and_1"] | None = None,
) -> Float[Tensor, "n k"]:
    """g[row] . W[index] for each place in float32; 0 where `values`, if given, is 0, and behind the last row of
    `starts` (as in `decode`)."""
    assert all(x is None or x.is_contiguous() for x in (g, W, indices, values, starts))
    n, k = indices.shape
    d = g.shape[1]
    block = _block(d, DOTS_BLOCK)
    span = triton.cdiv(d, block) * block if DOTS_SPAN is None else max(DOTS_SPAN, block)
    make = torch.empty if starts is None else torch.zeros
    parts = make(triton.cdiv(d, span), n, k, dtype=torch.float32, device=g.device)
    if n:
        _dots[(len(g), len(parts))](
            g,
            W,
            indices,
            values,
            starts,
            parts,
            n * k,
            k,
            d,
            ENTRIES=DOTS_ENTRIES,
            BLOCK=block,
            SPAN=span,
            num_warps=DOTS_WARPS,
        )
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


def by_latent(
    indices: Int[Tensor, "n k"], d_sae: int, values: Float[Tensor, "n k"] | None = None
) -> tuple[Int[Tensor, " n_times_k"], Int[Tensor, " d_sae_plus_1"]]:
    """(order, starts): entries order[starts[i] : starts[i + 1]] of the flat codes are those of latent i, ascending.

    Where `values` is given, entries of value 0 are spread evenly over all latents, whatever their index: they add
    nothing anywhere, and thousands of them on one latent would make that one slow.
    """
    latents = indices.flatten()
    if values is not None:
        spread = torch.arange(len(latents), device=latents.device) % d_sae
        latents = torch.where(values.flatten() == 0, spread, latents)
    numbers = torch.arange(d_sae, device=latents.device)
    if d_sae <= 1 << 16:
        # A radix sort takes a pass for each byte of the key.
        latents, numbers = (latents - (1 << 15)).short(), (numbers - (1 << 15)).short()
    else:
        latents, numbers = latents.int(), numbers.int()
    latents, order = latents.sort(stable=True)
    starts = torch.searchsorted(latents, numbers)
    return order, torch.nn.functional.pad(starts, (0, 1), value=len(latents))


def rows(
    coefficients: Float[Tensor, "n k"],
    order: Int[Tensor, " n_times_k"],
    starts: Int[Tensor, " d_sae_plus_1"],
    y: Float[Tensor, "_rows d"],
    row_of: Int[Tensor, " n_times_k"] | None = None,
) -> tuple[Float[Tensor, "d_sae d"], Float[Tensor, " d_sae"]]:
    """For each latent the sum over its entries of coefficient * y[row of the entry], and of coefficient; in float32.
    order, starts: of `by_latent`. row_of: the row of y that an entry stands for, if not its own. Latents without
    entries get zeros.

    Sums of long lists are made of sums of aligned segments, so that one hot latent keeps no program busy for long.
    """
    assert all(x is None or x.is_contiguous() for x in (coefficients, order, starts, y, row_of))
    n, k = coefficients.shape
    d, d_sae = y.shape[1], len(starts) - 1
    out = torch.empty(d_sae, d, dtype=torch.float32, device=y.device)
    sums = torch.empty(d_sae, dtype=torch.float32, device=y.device)
    if not n:
        return out.zero_(), sums.zero_()
    block = _block(d, ROWS_BLOCK)
    n_segments = n * k // SEGMENT
    segments = torch.empty(n_segments, d, dtype=torch.float32, device=y.device)
    segment_sums = torch.empty(n_segments, dtype=torch.float32, device=y.device)
    tiles = {"K": k, "ENTRIES": ROWS_ENTRIES, "BLOCK": block, "SEGMENT": SEGMENT, "num_warps": ROWS_WARPS}
    if n_segments:
        # The end of the latent to which the first entry of each segment belongs.
        first = torch.arange(0, n_segments * SEGMENT, SEGMENT, device=y.device)
        ends = starts[torch.searchsorted(starts, first, right=True)]
        _segments[(n_segments, triton.cdiv(d, block))](
            coefficients, order, ends, row_of, y, segments, segment_sums, d, **tiles
        )
    _rows[(d_sae, triton.cdiv(d, block))](
        coefficients, order, starts, row_of, y, segments, segment_sums, out, sums, d, **tiles
    )
    return out, sums


def _block(d: int, preferred: int) -> int:
    """A power of two of columns; smaller than preferred where that would leave a large part of the last block empty."""
    while preferred > 64 and -d % preferred > d // 8:
        preferred //= 2
    return preferred


@triton.jit
@no_type_check
def _places_of(row, starts, k):
    """(first place, number of places) of a row."""
    if starts is None:
        return row * k, k
    else:
        first = tl.load(starts + row)
        return first, (tl.load(starts + row + 1) - first).to(tl.int32)


@triton.jit
@no_type_check
def _decode(values, indices, starts, W, out, k, d, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    first, n_places = _places_of(row, starts, k)
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for start in range(0, n_places, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        value = tl.load(values + first + place, mask=place < n_places, other=0.0)
        latent = tl.load(indices + first + place, mask=place < n_places, other=0)
        w = tl.load(W + latent[:, None] * d + column[None, :], mask=(value != 0)[:, None] & inside[None, :], other=0.0)
        total += value[:, None] * w.to(tl.float32)
    tl.store(out + row * d + column, tl.sum(total, axis=0), mask=inside)


@triton.jit
@no_type_check
def _dots(
    g, W, indices, values, starts, parts, n_all, k, d, ENTRIES: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    begin, n_places = _places_of(row, starts, k)
    first = tl.program_id(1) * SPAN
    part = tl.program_id(1).to(tl.int64) * n_all + begin
    for start in range(0, n_places, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        used = place < n_places
        if values is not None:
            used = used & (tl.load(values + begin + place, mask=used, other=0.0) != 0)
        latent = tl.load(indices + begin + place, mask=used, other=0)
        total = tl.zeros([ENTRIES, BLOCK], tl.float32)
        for offset in range(0, SPAN, BLOCK):
            column = first + offset + tl.arange(0, BLOCK)
            inside = column < d
            x = tl.load(g + row * d + column, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(W + latent[:, None] * d + column[None, :], mask=used[:, None] & inside[None, :], other=0.0)
            total += x[None, :] * w.to(tl.float32)
        tl.store(parts + part + place, tl.sum(total, axis=1), mask=place < n_places)


@triton.jit
@no_type_check
def _row(entry, row_of, K: tl.constexpr, mask):
    if row_of is None:
        return (entry // K).to(tl.int64)
    else:
        return tl.load(row_of + entry, mask=mask, other=0).to(tl.int64)


@triton.jit
@no_type_check
def _segments(
    coefficients,
    order,
    ends,
    row_of,
    y,
    segments,
    segment_sums,
    d,
    K: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Sums of the segments that lie within one latent; others are left as they are and read by nobody."""
    segment = tl.program_id(0)
    first = segment * SEGMENT
    if tl.load(ends + segment) >= first + SEGMENT:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < d
        total = tl.zeros([BLOCK], tl.float32)
        weights = tl.zeros([ENTRIES], tl.float32)
        for start in range(0, SEGMENT, ENTRIES):
            entry = tl.load(order + first + start + tl.arange(0, ENTRIES)).to(tl.int32)
            c = tl.load(coefficients + entry)
            row = _row(entry, row_of, K, entry >= 0)
            x = tl.load(y + row[:, None] * d + column[None, :], mask=(c != 0)[:, None] & inside[None, :], other=0.0)
            total += tl.sum(c[:, None] * x.to(tl.float32), axis=0)
            weights += c
        tl.store(segments + segment.to(tl.int64) * d + column, total, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(segment_sums + segment, tl.sum(weights, axis=0))


@triton.jit
@no_type_check
def _rows(
    coefficients,
    order,
    starts,
    row_of,
    y,
    segments,
    segment_sums,
    out,
    sums,
    d,
    K: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    latent = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    first = tl.load(starts + latent).to(tl.int32)
    end = tl.load(starts + latent + 1).to(tl.int32)
    # Whole segments first_segment..last_segment are taken from their sums; entries before and after them one by one.
    first_segment = (first + SEGMENT - 1) // SEGMENT
    last_segment = tl.maximum(end // SEGMENT, first_segment)
    hot = last_segment > first_segment
    n_before = tl.where(hot, first_segment * SEGMENT, end) - first
    gap = (last_segment - first_segment) * SEGMENT
    n_single = end - first - gap

    total = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([ENTRIES], tl.float32)
    for start in range(0, n_single, ENTRIES):
        number = start + tl.arange(0, ENTRIES)
        entry = first + number + tl.where(number < n_before, 0, gap)
        entry = tl.load(order + entry, mask=number < n_single, other=0).to(tl.int32)
        c = tl.load(coefficients + entry, mask=number < n_single, other=0.0)
        row = _row(entry, row_of, K, number < n_single)
        x = tl.load(y + row[:, None] * d + column[None, :], mask=(c != 0)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(c[:, None] * x.to(tl.float32), axis=0)
        weights += c
    for start in range(first_segment, last_segment, ENTRIES):
        segment = start + tl.arange(0, ENTRIES)
        real = segment < last_segment
        x = tl.load(
            segments + segment.to(tl.int64)[:, None] * d + column[None, :],
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(x, axis=0)
        weights += tl.load(segment_sums + segment, mask=real, other=0.0)
    weight = tl.sum(weights, axis=0)
    tl.store(out + latent.to(tl.int64) * d + column, total, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(sums + latent, weight)
