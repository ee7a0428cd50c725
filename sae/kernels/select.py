"""The k largest of each row, reading the row once.

A first kernel takes the maximum of each group of `C` neighbouring columns. The k-th largest of these maxima is a lower
bound of the k-th largest entry, and every entry that reaches the bound lies in a group whose maximum does: about k
groups, which a second kernel reads again, keeps what reaches the bound, and finds the exact k-th largest among that.
Rows with very many such entries (ties, large values side by side) go back to their groups instead: slower, same result.

Entries are compared as integers: the bits of non-negative floats rise with their value. NaN counts as larger than
infinity, so it is chosen and seen.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAXIMA_TILE, MAXIMA_WARPS = 8192, 4
"""Columns and warps of a program of the first kernel."""
CHOOSE_ENTRIES, CHOOSE_TILE = 1024, 512
"""Maxima that a warp of the second kernel holds at once (32 registers a thread), and entries that it reads at once."""
WHOLE_ROW, ROW_ENTRIES = 16_384, 1024
"""Longest row that `topk_dense` holds in registers (longer ones are read again for each bit), and
entries that a warp of theirs holds at once."""

_DTYPES = {
    torch.bfloat16: (torch.int16, tl.bfloat16),
    torch.float16: (torch.int16, tl.float16),
    torch.float32: (torch.int32, tl.float32),
}


def topk(
    pre: Float[Tensor, "n d_sae"], k: int, signed: bool = False
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest positive entries of each row (values in float32, indices ascending); of equals the lowest indices.

    signed: by magnitude, with their sign. Places that a row cannot fill come last and hold value 0 and index 0.
    """
    assert pre.is_contiguous()
    assert 0 < k <= pre.shape[1]
    n, d_sae = pre.shape
    bits, dtype = _bits(pre)
    # Eight groups for each chosen entry keep what reaches the bound close to k; 32 bytes is what memory gives at least.
    group = min(max(_power_of_2_below(d_sae // (8 * k)), 16), 64)
    n_groups = triton.cdiv(d_sae, group)
    maxima = torch.empty(n, n_groups, dtype=bits.dtype, device=pre.device)
    tile = min(MAXIMA_TILE // group, triton.next_power_of_2(n_groups))
    while tile > 32 and -n_groups % tile > n_groups // 8:
        tile //= 2
    spans = triton.cdiv(n_groups, tile)
    values = torch.empty(n, k, dtype=torch.float32, device=pre.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=pre.device)
    capacity = min(max(triton.next_power_of_2(4 * k), 256), 4096)
    n_groups_2 = triton.next_power_of_2(n_groups)
    warps = min(max(max(n_groups_2, capacity) // CHOOSE_ENTRIES, 1), 16)
    hits = torch.empty(n, n_groups, dtype=torch.int32, device=pre.device)
    found = torch.empty(n, 2, capacity, dtype=torch.int32, device=pre.device)
    if n:
        _maxima[(n * spans,)](
            bits, maxima, d_sae, n_groups, spans, SIGNED=signed, TILE=tile, GROUP=group, num_warps=MAXIMA_WARPS
        )
        _choose[(n,)](
            bits,
            maxima,
            hits,
            found,
            values,
            indices,
            d_sae,
            n_groups,
            k,
            SIGNED=signed,
            DTYPE=dtype,
            SLACK=0 if bits.dtype == torch.int16 else 1 << 15,
            GROUPS=n_groups_2,
            GROUP=group,
            TILE=CHOOSE_TILE * warps // group,
            CAPACITY=capacity,
            PLACES=triton.next_power_of_2(k),
            num_warps=warps,
        )
    return values, indices


def topk_dense(
    pre: Float[Tensor, "n d_sae"],
    k: int,
    signed: bool,
    columns: Int[Tensor, " m"],
    real: Bool[Tensor, " m"],
) -> Float[Tensor, "n m"]:
    """The columns of pre that are named, all but the k largest positive entries of a row (signed: by magnitude) set to
    0; equals of the k-th stay. Columns that are not `real` are 0."""
    assert pre.is_contiguous()
    assert 0 < k <= len(columns)
    n, m = len(pre), len(columns)
    out = torch.empty(n, m, dtype=pre.dtype, device=pre.device)
    bits, dtype = _bits(pre)
    block = min(triton.next_power_of_2(m), WHOLE_ROW)
    if n:
        _row[(n,)](
            bits,
            _bits(out)[0],
            columns,
            real,
            pre.shape[1],
            m,
            k,
            SIGNED=signed,
            DTYPE=dtype,
            WHOLE=m <= block,
            BLOCK=block,
            num_warps=min(max(block // ROW_ENTRIES, 1), 16),
        )
    return out


def _bits(x: Tensor) -> tuple[Tensor, tl.dtype]:
    integer, dtype = _DTYPES[x.dtype]
    return x.view(integer), dtype


def _power_of_2_below(n: int) -> int:
    return 1 << max(n.bit_length() - 1, 0)


@triton.jit
@no_type_check
def _key(bits, SIGNED: tl.constexpr, DTYPE: tl.constexpr):
    """What entries are compared by; at most 0 for those that are never chosen. Bits as int32."""
    if SIGNED:
        return bits & (0x7FFFFFFF if DTYPE == tl.float32 else 0x7FFF)
    else:
        return bits


@triton.jit
@no_type_check
def _value(bits, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        return (bits << 16).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return bits.to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _kth(key, k, low, high, SLACK: tl.constexpr):
    """The k-th largest key if it is in low..high (else low), or a lower bound less than SLACK below it; 1 <= low."""
    while high - low > SLACK:
        middle = high - (high - low) // 2
        enough = tl.sum((key >= middle).to(tl.int32), axis=0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
@no_type_check
def _maxima(bits, out, d_sae, n_groups, spans, SIGNED: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr):
    row = (tl.program_id(0) // spans).to(tl.int64)
    group = (tl.program_id(0) % spans) * TILE + tl.arange(0, TILE)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(bits + row * d_sae + column, mask=column < d_sae, other=0)
    x = x.to(tl.int32)
    if SIGNED:
        x = x & (0x7FFFFFFF if out.dtype.element_ty == tl.int32 else 0x7FFF)
    tl.store(out + row * n_groups + group, tl.maximum(tl.max(x, axis=1), 0), mask=group < n_groups)


@triton.jit
@no_type_check
def _entries(bits, hits, start, n_hits, d_sae, TILE: tl.constexpr, GROUP: tl.constexpr):
    """(bits, columns) of the entries of TILE groups, in ascending order."""
    slot = start + tl.arange(0, TILE)
    group = tl.load(hits + slot, mask=slot < n_hits, other=0)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(bits + column, mask=(slot < n_hits)[:, None] & (column < d_sae), other=0)
    return x.to(tl.int32), column


@triton.jit
@no_type_check
def _places(take):
    """(running number from 0 in row-major order, total) of what is taken."""
    each = take.to(tl.int32)
    rows = tl.sum(each, axis=1)
    before = tl.cumsum(rows, axis=0) - rows
    return before[:, None] + tl.cumsum(each, axis=1) - 1, tl.sum(rows, axis=0)


@triton.jit
@no_type_check
def _choose_from_found(
    found, count, values, indices, k, low, high, SIGNED: tl.constexpr, DTYPE: tl.constexpr, CAPACITY: tl.constexpr
):
    slot = tl.arange(0, CAPACITY)
    x = tl.load(found + slot, mask=slot < count, other=0)
    column = tl.load(found + CAPACITY + slot, mask=slot < count, other=0)
    key = _key(x, SIGNED, DTYPE)
    kth = _kth(key, k, low, high, 0)
    n_ties = k - tl.sum((key > kth).to(tl.int32), axis=0)
    rank = tl.cumsum((key == kth).to(tl.int32), axis=0)
    take = (key > kth) | ((key == kth) & (rank <= n_ties))
    place = tl.cumsum(take.to(tl.int32), axis=0) - 1
    tl.store(values + place, _value(x, DTYPE), mask=take)
    tl.store(indices + place, column.to(tl.int64), mask=take)


@triton.jit
@no_type_check
def _choose_from_groups(
    bits,
    hits,
    n_hits,
    values,
    indices,
    d_sae,
    k,
    low,
    high,
    SIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The long way, for more entries at or above `low` than are kept apart: a pass over their groups for each bit."""
    while low < high:
        middle = high - (high - low) // 2
        enough = _reached_in_groups(bits, hits, n_hits, d_sae, middle, SIGNED, DTYPE, TILE, GROUP) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    n_ties = k - _reached_in_groups(bits, hits, n_hits, d_sae, low + 1, SIGNED, DTYPE, TILE, GROUP)
    done = n_hits * 0
    for start in range(0, n_hits, TILE):
        x, column = _entries(bits, hits, start, n_hits, d_sae, TILE, GROUP)
        key = _key(x, SIGNED, DTYPE)
        rank, total = _places(key == low)
        take = (key > low) | ((key == low) & (rank < n_ties))
        n_ties -= total
        place, total = _places(take)
        place += done
        tl.store(values + place, _value(x, DTYPE), mask=take & (place < k))
        tl.store(indices + place, column.to(tl.int64), mask=take & (place < k))
        done += total


@triton.jit
@no_type_check
def _reached_in_groups(
    bits,
    hits,
    n_hits,
    d_sae,
    bound,
    SIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    count = n_hits * 0
    for start in range(0, n_hits, TILE):
        x, _ = _entries(bits, hits, start, n_hits, d_sae, TILE, GROUP)
        count += tl.sum(tl.sum((_key(x, SIGNED, DTYPE) >= bound).to(tl.int32), axis=1), axis=0)
    return count


@triton.jit
@no_type_check
def _choose(
    bits,
    maxima,
    hits,
    found,
    values,
    indices,
    d_sae,
    n_groups,
    k,
    SIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    SLACK: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
    PLACES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    bits += row * d_sae
    hits += row * n_groups
    found += row * 2 * CAPACITY
    values += row * k
    indices += row * k

    group = tl.arange(0, GROUPS)
    best = tl.load(maxima + row * n_groups + group, mask=group < n_groups, other=0).to(tl.int32)
    high = tl.max(best, axis=0)
    low = _kth(best, k, high * 0 + 1, high, SLACK)
    hit = best >= low
    n_hits = tl.sum(hit.to(tl.int32), axis=0)
    tl.store(hits + tl.cumsum(hit.to(tl.int32), axis=0) - 1, group, mask=hit)
    tl.debug_barrier()

    count = n_hits * 0
    for start in range(0, n_hits, TILE):
        x, column = _entries(bits, hits, start, n_hits, d_sae, TILE, GROUP)
        take = _key(x, SIGNED, DTYPE) >= low
        place, total = _places(take)
        place += count
        tl.store(found + place, x, mask=take & (place < CAPACITY))
        tl.store(found + CAPACITY + place, column, mask=take & (place < CAPACITY))
        count += total
    tl.debug_barrier()

    used = tl.minimum(count, k)
    if count <= CAPACITY:
        _choose_from_found(found, count, values, indices, k, low, high, SIGNED, DTYPE, CAPACITY)
    else:
        _choose_from_groups(bits, hits, n_hits, values, indices, d_sae, k, low, high, SIGNED, DTYPE, TILE, GROUP)
    place = tl.arange(0, PLACES)
    unused = (place >= used) & (place < k)
    tl.store(values + place, tl.zeros([PLACES], tl.float32), mask=unused)
    tl.store(indices + place, tl.zeros([PLACES], tl.int64), mask=unused)


@triton.jit
@no_type_check
def _named(bits, columns, real, start, m, BLOCK: tl.constexpr):
    """Bits of BLOCK of the named columns of a row, as int32; 0 for those that are not real."""
    at = start + tl.arange(0, BLOCK)
    column = tl.load(columns + at, mask=at < m, other=0)
    used = tl.load(real + at, mask=at < m, other=0) != 0
    return tl.load(bits + column, mask=used & (at < m), other=0).to(tl.int32)


@triton.jit
@no_type_check
def _reached(bits, columns, real, m, bound, SIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """How many entries of a row of any length are at least `bound`."""
    count = bound * 0
    for start in range(0, m, BLOCK):
        x = _named(bits, columns, real, start, m, BLOCK)
        count += tl.sum((_key(x, SIGNED, DTYPE) >= bound).to(tl.int32), axis=0)
    return count


@triton.jit
@no_type_check
def _row(
    bits,
    out,
    columns,
    real,
    width,
    m,
    k,
    SIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    bits += row * width
    out += row * m
    x = _named(bits, columns, real, 0, m, BLOCK)
    key = _key(x, SIGNED, DTYPE)
    high = tl.maximum(tl.max(key, axis=0), 0)
    column = tl.arange(0, BLOCK)
    if WHOLE:
        low = _kth(key, k, high * 0 + 1, high, 0)
        tl.store(out + column, tl.where(key >= low, x, 0), mask=column < m)
    else:
        for start in range(BLOCK, m, BLOCK):
            more = _named(bits, columns, real, start, m, BLOCK)
            high = tl.maximum(high, tl.max(_key(more, SIGNED, DTYPE), axis=0))
        low = high * 0 + 1
        while low < high:
            middle = high - (high - low) // 2
            enough = _reached(bits, columns, real, m, middle, SIGNED, DTYPE, BLOCK) >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        for start in range(0, m, BLOCK):
            entry = _named(bits, columns, real, start, m, BLOCK)
            kept = tl.where(_key(entry, SIGNED, DTYPE) >= low, entry, 0)
            tl.store(out + start + column, kept, mask=start + column < m)
