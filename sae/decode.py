"""Decoding sparse codes, with gradient: only the rows of W_dec that were chosen are read and written."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sae import sparse


def decode(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], W: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "n d"]:
    """sum_j values[:, j] * W[indices[:, j]], in float32. Values of 0 get no gradient."""
    decoded: Tensor = _Decode.apply(values, indices, W)
    return decoded


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W)
        return sparse.decode(values, indices, W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, W = ctx.saved_tensors
        order, starts = sparse.by_latent(indices, len(W), values)
        return sparse.dots(grad, W, indices, values), None, sparse.rows(values, order, starts, grad)[0]
