"""Parts of losses: pure functions, each with its paper."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae.parallel import ALONE, Mesh

_MOST_TILT = 30.0
"""Where the exponent of a row's weight stops, so that a stray row makes no infinity."""


def fvu(error: Float[Tensor, "n d"], target: Float[Tensor, "n d"], mesh: Mesh = ALONE) -> Float[Tensor, ""]:
    """Squared error over the squared distance of the target from its batch mean: near 1 at the start.

    Of the whole batch, of which the mesh may have a part of the rows here. No gradient reaches the target.
    """
    with torch.no_grad():
        variance, mean = torch.var_mean(target, dim=0, correction=0)
        spread = mesh.sum_rows((variance + (mean - mesh.mean_rows(mean)).square()).sum() * len(target))
    return mesh.sum_rows(_SquaredSum.apply(error)) / spread


def tilted(error: Float[Tensor, "n d"], tilt: float, mesh: Mesh = ALONE) -> Float[Tensor, "n d"]:
    """error with each row multiplied so that its square counts softmax(tilt * l / mean l) * n times, l that square.

    Rows that are reconstructed badly count more; 0 leaves all as they are. No gradient reaches the factors.
    Source: Li et al. 2021, "Tilted Empirical Risk Minimization", arXiv:2007.01162. Differs: l is taken over its mean,
    so that the tilt has no unit.
    """
    if not tilt:
        return error
    with torch.no_grad():
        squares = error.square().sum(dim=1)
        weights = (tilt * squares / mesh.mean_rows(squares.mean())).clamp(max=_MOST_TILT).exp()
        factors = (weights / mesh.mean_rows(weights.mean())).sqrt()
    return error * factors[:, None]


class _SquaredSum(torch.autograd.Function):
    """x.square().sum(), with one pass over x forward and one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.linalg.vector_norm(x).square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * (2 * grad)
