"""Dense products without gradient. On a CPU oneDNN makes them: on AMD processors in less than half the time of MKL,
which torch takes for float32 unless told otherwise."""

import torch
from jaxtyping import Float
from torch import Tensor


def product(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    bias: Float[Tensor, " m"] | None = None,
    out: torch.dtype | None = None,
) -> Float[Tensor, "n m"]:
    """a @ b.T + bias, in the dtype of a, which is also that of b and bias; or `out` (no bias). Any strides."""
    if a.device.type == "cpu" and a.dtype in (torch.float32, torch.bfloat16) and _has_onednn():
        made = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return made if out is None else made.to(out)
    if out not in (None, a.dtype):
        return torch.mm(a, b.T, out_dtype=out)
    return a @ b.T if bias is None else torch.addmm(bias, a, b.T)


def precision(x: Tensor) -> torch.dtype:
    """What wide products of x are made in: autocast's dtype where that is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
