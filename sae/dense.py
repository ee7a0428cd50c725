"""Dense products without gradient, as fast as the machine makes them.

On a CPU they are oneDNN's: on AMD processors these take less than half the time of MKL's, which are torch's own choice
for float32.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

FLOAT8, SCALE, LARGEST = torch.float8_e4m3fn, 64.0, 448.0
"""Eight bits with three of mantissa; what weights are multiplied by in it (rows of norm 1 have entries of 1 / sqrt(d),
which would be too small), and its largest number. Activations have entries near 1 and need no factor."""
CACHED, AT_ONCE = 1 << 22, 1 << 27
"""Numbers of a product that stay in the last cache of a CPU until they are read; that a GPU makes before they are."""


def product(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    bias: Float[Tensor, " m"] | None = None,
    out: torch.dtype | None = None,
) -> Float[Tensor, "n m"]:
    """a @ b.T + bias in the precision of a; out: the result's own (without bias). Strides are free.

    b may be a copy of weights in eight bits (`to_float8` with SCALE): then a is rounded to eight bits too.
    """
    bias = None if bias is None else bias.to(a.dtype)
    if b.dtype == FLOAT8:
        return _product8(a, b, bias)
    b = b.to(a.dtype)
    if a.device.type == "cpu" and a.dtype in (torch.float32, torch.bfloat16) and _has_onednn():
        made = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return made if out is None else made.to(out)
    if out not in (None, a.dtype):
        return torch.mm(a, b.T, out_dtype=out)
    return a @ b.T if bias is None else torch.addmm(bias, a, b.T)


def pieces(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], bias: Float[Tensor, " m"]
) -> Iterator[Float[Tensor, "_rows m"]]:
    """The rows of `product`, in order, a few at a time: bounded memory, and a CPU finds them in its cache."""
    b, bias = b if b.dtype == FLOAT8 else b.to(a.dtype), bias.to(a.dtype)  # once for all pieces
    for rows in a.split(max((CACHED if a.device.type == "cpu" else AT_ONCE) // len(b), 256)):
        yield product(rows, b, bias)


def to_float8(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale * x in eight bits; what is too large becomes the largest number."""
    return (x * scale).clamp_(-LARGEST, LARGEST).to(FLOAT8)


def _product8(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    a8 = to_float8(a)
    if not a.is_cuda:
        made = a8.float() @ b.float().T / SCALE
        return (made if bias is None else made + bias).to(a.dtype)
    one, back = (torch.full((), value, device=a.device) for value in (1.0, 1 / SCALE))
    return torch._scaled_mm(a8, b.T, one, back, bias=bias, out_dtype=a.dtype, use_fast_accum=True)


def precision(x: Tensor) -> torch.dtype:
    """What wide products of x are made in: autocast's dtype where that is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
