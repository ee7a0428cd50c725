"""JumpReLU's step on dense pre-activations, forward and backward; on a GPU `sae.kernels.jump` does the same."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae import kernels


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
