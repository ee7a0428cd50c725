"""JumpReLU's step, forward and backward: on dense pre-activations (on a GPU `sae.kernels.jump` does the same), and on
entries of them."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae import kernels
from sae.entries import Entries


def jump(
    pre: Float[Tensor, "n d_sae"], threshold: Float[Tensor, " d_sae"]
) -> tuple[Float[Tensor, "n d_sae"], Float[Tensor, " d_sae"]]:
    """(pre where it is above the threshold, else 0; in how many rows it is, for each latent)."""
    if kernels.available(pre):
        from sae.kernels.jump import jump as kernel

        return kernel(pre, threshold)
    on = pre > threshold
    return pre * on, on.sum(dim=0, dtype=torch.float32)


def jump_backward(
    pre: Float[Tensor, "n d_sae"],
    threshold: Float[Tensor, " d_sae"],
    dz: Float[Tensor, "n d_sae"],
    l0_weight: Float[Tensor, ""],
    bandwidth: float,
) -> tuple[Float[Tensor, "n d_sae"], Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """Gradients of (pre, encoder bias, threshold) from that of z and l0_weight, that of each firing. Overwrites dz.

    Near the threshold, within half a bandwidth, the step counts as a ramp of slope 1 / bandwidth.
    """
    if kernels.available(pre):
        from sae.kernels.jump import jump_backward as kernel

        return kernel(pre, threshold, dz, l0_weight, bandwidth)
    near = (pre - threshold).abs() < bandwidth / 2
    step = (dz * threshold + l0_weight) * near / bandwidth  # z jumps by the threshold where the latent turns on
    dp = torch.where(pre > threshold, dz, 0.0) + step
    return dp.to(pre.dtype), dp.sum(dim=0, dtype=torch.float32), -step.sum(dim=0, dtype=torch.float32)


class Jumped(NamedTuple):
    """Latents of `jumped`, at the entries of its pre-activations."""

    z: Float[Tensor, "..."]
    n_on: Float[Tensor, ""]
    """How many are not 0, of all rows."""
    fired: Bool[Tensor, " _held"]


def jumped(entries: Entries, threshold: Float[Tensor, " d_sae"], bandwidth: float) -> Jumped:
    """Pre-activations where they are above the threshold, with the gradient that `jump_backward` says.

    Entries must be there from half a bandwidth below the threshold on.
    """
    if entries.sparse:
        z, n_on = _SparseJump.apply(entries.values, entries.at(threshold), bandwidth)
        return Jumped(z, n_on, entries.fired(z, len(threshold)))
    return Jumped(*_DenseJump.apply(entries.values, threshold, bandwidth))


class _DenseJump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor, Tensor]:
        z, counts = jump(pre, threshold)
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        fired = counts > 0
        ctx.mark_non_differentiable(fired)
        return z, counts.sum(), fired

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_on: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        grad_pre, _, grad_threshold = jump_backward(pre, threshold, grad_z.contiguous(), grad_on, ctx.bandwidth)
        return grad_pre, grad_threshold, None


class _SparseJump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, at: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        on = pre > at
        near = ((pre - at).abs() < bandwidth / 2) / bandwidth
        ctx.save_for_backward(at, on, near)
        return pre * on, on.sum().to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_on: Tensor) -> tuple[Tensor | None, ...]:
        at, on, near = ctx.saved_tensors
        step = near * (grad_z * at + grad_on)
        return grad_z * on + step, -step, None
