"""Triton kernels for what training does to sparse codes on a GPU; tests compare each with a plain PyTorch twin.

    select   the k largest of each row                       sae.select
    codes    the products that touch only chosen latents     sae.sparse
    adam     Adam on dictionary rows, which may have norm 1  torch.optim.Adam
    jump     JumpReLU, forward and backward                  sae.architectures.jumprelu

All are deterministic (no floating-point atomics), never wait for the device and can be captured in a CUDA graph.
Matrices must be contiguous. Triton is optional: import a kernel's module only where `available` says so.
Constants at the top of each file (tiles, warps) were chosen by `tests/benchmarks/kernels.py`.
"""

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def available(tensor: Tensor) -> bool:
    """Whether the kernels can work on this tensor: it lies on a GPU and Triton is installed."""
    return tensor.is_cuda and _triton()


@cache
def _triton() -> bool:
    return find_spec("triton") is not None
