"""JumpReLU: a latent is on where its pre-activation passes a threshold of its own.

    p = (x - b_dec) W_enc + b_enc        z = p * 1[p > threshold]        x_hat = z W_dec + b_dec

Loss: FVU of the batch + coefficient * mean L0 / target. The step has no gradient, so thresholds and encoder learn
through a window of `bandwidth` around the threshold (straight-through estimator, rectangle kernel). The coefficient
is not
tuned: it rises while L0 is above `target_l0` and falls while it is below, so training ends at the L0 that was asked
for.
Source: Rajamanoharan et al. 2024, arXiv:2407.14435. Differs: the gradient of the step also reaches the encoder
(Anthropic, January 2025); the coefficient follows L0; thresholds start at the quantile of the data that gives
`start_l0` times the target.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sae.base import SAE, Config, ConfigError, Loss, State
from sae.ksparse import pre_activations
from sae.losses import fvu
from sae.parallel import ALONE, Mesh
from sae.sparse import to_sparse


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(Config):
    target_l0: float
    """Mean active latents for each token that training ends at."""
    bandwidth: float = 1.5
    """Width of the window around the threshold in which the step has a gradient; activations have norm sqrt(d_in)."""
    start_l0: float = 1.5
    """L0 at the start, in units of target_l0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target_l0 < self.d_sae:
            raise ConfigError(
                f"target_l0={self.target_l0} is out of range: expected 0 < target_l0 < d_sae={self.d_sae}. "
                "Lower it or raise d_sae."
            )


class JumpReLUSAE(SAE):
    architecture = "jumprelu"
    biases = ("b_enc", "b_dec", "threshold")
    by_latent = ("W_enc", "W_dec", "b_enc", "threshold")
    cfg: JumpReLUConfig
    coefficient: Tensor
    last_l0: Tensor

    def __init__(self, cfg: JumpReLUConfig, mesh: Mesh = ALONE) -> None:
        super().__init__(cfg, mesh)
        self.threshold = nn.Parameter(torch.zeros(self.n_held))
        self.register_buffer("coefficient", torch.tensor(0.01))
        self.register_buffer("last_l0", torch.tensor(float(cfg.target_l0)))

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        with torch.no_grad():
            pre = pre_activations(self, x).float()
            return to_sparse(pre * (pre > self.threshold))

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        pre = pre_activations(self, x).float()
        z, on = _Jump.apply(pre, self.threshold, self.cfg.bandwidth)
        error = target - self.mesh.sum_latents((z @ self.W_dec).float()) - self.b_dec
        main = fvu(error, target, self.mesh)
        l0 = self.mesh.mean_rows(self.mesh.sum_latents(on.sum(dim=1).mean()))
        self.last_l0.copy_(l0.detach())
        terms = {"fvu": main.detach(), "l0": l0.detach(), "coefficient": self.coefficient.clone()}
        return Loss(main + state.penalty * self.coefficient * l0 / self.cfg.target_l0, terms, (on > 0).any(dim=0))

    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        super().initialise(x, seed)
        share = min(self.cfg.start_l0 * self.cfg.target_l0 / self.d_sae, 0.5)
        with torch.no_grad():
            pre = pre_activations(self, x).float()
            self.threshold.copy_(pre.kthvalue(max(round((1 - share) * len(pre)), 1), dim=0).values.clamp(min=0.0))

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        del state
        self.threshold.data.clamp_(min=0.0)
        too_many = (self.last_l0 / self.cfg.target_l0).log().clamp(-1.0, 1.0)
        self.coefficient.mul_(torch.exp(0.01 * too_many)).clamp_(1e-6, 1e2)


class _Jump(torch.autograd.Function):
    """(p * 1[p > t], 1[p > t]); near t the step has slope 1 / bandwidth in p and -1 / bandwidth in t."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        on = (pre > threshold).to(pre.dtype)
        ctx.save_for_backward(pre, threshold, on)
        ctx.bandwidth = bandwidth
        return pre * on, on

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_on: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold, on = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype) / ctx.bandwidth
        step = near * (grad_z * threshold + grad_on)  # z jumps by the threshold where the latent turns on
        return grad_z * on + step, -step.sum(dim=0), None
