"""Parts of losses: pure functions, each with its paper."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae.parallel import ALONE, Mesh


def fvu(error: Float[Tensor, "n d"], target: Float[Tensor, "n d"], mesh: Mesh = ALONE) -> Float[Tensor, ""]:
    """Squared error over the squared distance of the target from its batch mean: near 1 at the start.

    Of the whole batch, of which the mesh may have a part of the rows here. No gradient reaches the target.
    """
    with torch.no_grad():
        variance, mean = torch.var_mean(target, dim=0, correction=0)
        spread = mesh.sum_rows((variance + (mean - mesh.mean_rows(mean)).square()).sum() * len(target))
    return mesh.sum_rows(_SquaredSum.apply(error)) / spread


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
