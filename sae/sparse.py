"""Sparse codes: (values, indices) of a few latents a row, and the three products of training that touch only those.

With k of d_sae latents active, decoding and both weight gradients cost k / d_sae of their dense form; only the
encoder's forward product stays dense. All are products with a sparse matrix in CSR form, which both CPU and GPU
libraries have.
Names: n rows, k places a row, m = d_sae. An unused place holds value 0 and any index.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# Torch says once a process that sparse CSR tensors are in beta; what we use of them is tested against the dense form.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def to_dense(values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], d_sae: int) -> Float[Tensor, "n d_sae"]:
    """The dense form of sparse codes."""
    return values.new_zeros(values.shape[0], d_sae).scatter_add(1, indices, values)


def to_sparse(z: Float[Tensor, "n d_sae"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The sparse form of dense codes; k is the largest L0 of the rows, at least 1."""
    k = max(int((z != 0).sum(dim=1).max()), 1) if len(z) else 1
    indices = z.abs().topk(k, dim=1).indices
    return z.gather(1, indices), indices


def fired(values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], d_sae: int) -> Bool[Tensor, " d_sae"]:
    """Latents with a value other than 0 anywhere in the batch."""
    count = torch.zeros(d_sae, device=values.device)
    return count.index_add_(0, indices.flatten(), (values != 0).flatten().to(count.dtype)) > 0


def decode(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], W_dec: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "n d"]:
    """sum_j values[:, j] * W_dec[indices[:, j]], with gradients to values and W_dec."""
    return _Decode.apply(values, indices, W_dec)


def selected(
    pre: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
    x: Float[Tensor, "n d"],
    W_enc: Float[Tensor, "d d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d"],
) -> Float[Tensor, "n k"]:
    """`pre`, the chosen entries of (x - b_dec) @ W_enc + b_enc, tied to its parameters for the backward pass.

    The dense product is made without gradient; this gives the chosen entries the gradient they would have had. Entries
    that are exactly 0 (a ReLU's) get none.
    """
    return _Selected.apply(pre, indices, x, W_enc, b_enc, b_dec)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        return _csr(values, indices, W_dec.shape[0]) @ W_dec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = _dots(grad, W_dec, indices) if ctx.needs_input_grad[0] else None
        grad_W = _csr_transposed(values, indices, W_dec.shape[0]) @ grad if ctx.needs_input_grad[2] else None
        return grad_values, None, grad_W


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor
    ) -> Tensor:
        ctx.save_for_backward(pre, indices, x, W_enc, b_enc, b_dec)
        return pre.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor, Tensor, Tensor]:
        pre, indices, x, W_enc, b_enc, b_dec = ctx.saved_tensors
        grad = grad * (pre != 0)
        grad_b = torch.zeros_like(b_enc).index_add_(0, indices.flatten(), grad.flatten())
        # d/dW_enc[:, i] = sum_n grad[n, i] (x[n] - b_dec), one sparse product and a rank-one correction.
        grad_W = _csr_transposed(grad, indices, len(b_enc)) @ x - torch.outer(grad_b, b_dec)
        return None, None, None, grad_W.T, grad_b, -(W_enc @ grad_b)


def _csr(values: Tensor, indices: Tensor, n_columns: int) -> Tensor:
    n, k = values.shape
    starts = torch.arange(0, n * k + 1, k, device=values.device)
    return torch.sparse_csr_tensor(starts, indices.flatten(), values.flatten(), (n, n_columns), check_invariants=False)


def _csr_transposed(values: Tensor, indices: Tensor, n_columns: int) -> Tensor:
    """The transpose of the sparse matrix, by a counting sort of its entries by latent."""
    n, k = values.shape
    latents = indices.flatten()
    order = latents.argsort(stable=True)
    starts = torch.zeros(n_columns + 1, dtype=torch.long, device=values.device)
    starts[1:] = torch.bincount(latents, minlength=n_columns).cumsum(0)
    rows = order.div(k, rounding_mode="floor")
    return torch.sparse_csr_tensor(starts, rows, values.flatten()[order], (n_columns, n), check_invariants=False)


def _dots(a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    """a[n] . b[indices[n, j]] for each place, without the dense a @ b.T."""
    pattern = _csr(torch.zeros(indices.shape, dtype=a.dtype, device=a.device), indices, b.shape[0])
    return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values().view(indices.shape)
