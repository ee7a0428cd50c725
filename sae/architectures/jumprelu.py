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
from sae.dense import product
from sae.jump import jump, jump_backward
from sae.ksparse import centred
from sae.losses import fvu
from sae.parallel import ALONE, Mesh
from sae.select import above
from sae.sparse import Ragged, dots_at, encoder_gradients, row_sums, to_table, transposed


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
            W_enc = self.low.get("W_enc", self.W_enc)
            return to_table(above(centred(self, x), W_enc, self.b_enc, self.threshold), self.n_held)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        x = centred(self, x)
        with torch.autocast(x.device.type, enabled=False):
            reconstruct = _SparseReconstruct if x.device.type == "cpu" else _Reconstruct
            centre = self.mesh.into_latents(self.b_dec)
            decoded, l0, fired = reconstruct.apply(
                x, self.W_enc, self.b_enc, self.W_dec, centre, self.threshold, self.low, self.cfg.bandwidth
            )
            main = fvu(self.mesh.sum_latents(decoded) + self.b_dec - target, target, self.mesh)
            l0 = self.mesh.mean_rows(self.mesh.sum_latents(l0))
            self.last_l0.copy_(l0.detach())
            terms = {"fvu": main.detach(), "l0": l0.detach(), "coefficient": self.coefficient.clone()}
            return Loss(main + state.penalty * self.coefficient * l0 / self.cfg.target_l0, terms, fired)

    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        super().initialise(x, seed)
        share = min(self.cfg.start_l0 * self.cfg.target_l0 / self.d_sae, 0.5)
        with torch.no_grad():
            pre = product(centred(self, x), self.W_enc.T, self.b_enc).float()
            self.threshold.copy_(pre.kthvalue(max(round((1 - share) * len(pre)), 1), dim=0).values.clamp(min=0.0))

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        del state
        self.threshold.data.clamp_(min=0.0)
        too_many = (self.last_l0 / self.cfg.target_l0).log().clamp(-1.0, 1.0)
        self.coefficient.mul_(torch.exp(0.01 * too_many)).clamp_(1e-6, 1e2)


class _Reconstruct(torch.autograd.Function):
    """(z W_dec, mean L0, which latents fired) from x - b_dec, through dense latents: the latents' part."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor,
        low: dict[str, Tensor],
        bandwidth: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        del b_dec  # here for its gradient, as the centre of x
        W_enc, W_dec = (low.get(name, W).to(x.dtype) for name, W in (("W_enc", W_enc), ("W_dec", W_dec)))
        pre = product(x, W_enc.T, b_enc.to(x.dtype))
        z, counts = jump(pre, threshold)
        ctx.save_for_backward(x, W_enc, W_dec, pre, z, threshold)
        ctx.bandwidth = bandwidth
        fired = counts > 0
        ctx.mark_non_differentiable(fired)
        return product(z, W_dec.T).float(), counts.sum() / len(x), fired

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_l0: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W_enc, W_dec, pre, z, threshold = ctx.saved_tensors
        low = grad.to(x.dtype)
        grad_pre, grad_b_enc, grad_threshold = jump_backward(
            pre, threshold, product(low, W_dec), grad_l0 / len(x), ctx.bandwidth
        )
        grad_W_dec = product(z.T, low.T, out=torch.float32)
        grad_W_enc = product(grad_pre.T, x.T, out=torch.float32).T
        grad_b_dec = -(W_enc @ grad_b_enc.to(x.dtype)).float()
        return None, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, grad_threshold, None, None


class _SparseReconstruct(torch.autograd.Function):
    """As `_Reconstruct`, from the few entries that are on or near their threshold: a CPU's way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor,
        low: dict[str, Tensor],
        bandwidth: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        del low, b_dec  # kept on GPUs only; here for its gradient, as the centre of x
        pre = above(x, W_enc, b_enc, threshold - bandwidth / 2)
        at = threshold.index_select(0, pre.columns)
        on = pre.values > at
        z = _kept(pre, on)
        ctx.save_for_backward(x, W_enc, threshold, W_dec, *pre, at, on, *z)
        ctx.bandwidth = bandwidth
        fired = torch.bincount(z.columns, minlength=len(threshold)) > 0
        ctx.mark_non_differentiable(fired)
        return row_sums(z, W_dec), on.sum() / len(x), fired

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_l0: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, threshold, W_dec, *entries = ctx.saved_tensors
        pre, z, grad = Ragged(*entries[:3]), Ragged(*entries[5:]), grad.contiguous()
        at, on = entries[3:5]
        grad_z = dots_at(grad, W_dec, pre)
        near = ((pre.values - at).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        step = near * (grad_z * at + grad_l0 / len(x))
        grad_threshold = torch.zeros_like(threshold).index_add_(0, pre.columns, step, alpha=-1)
        grad_pre = pre._replace(values=grad_z * on + step)
        grad_W_enc, grad_b_enc, grad_b_dec = encoder_gradients(grad_pre, x.float(), W_enc)
        grad_W_dec = row_sums(transposed(z, len(W_dec)), grad)
        return None, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, grad_threshold, None, None


def _kept(entries: Ragged, keep: Tensor) -> Ragged:
    """Those entries alone for which `keep`."""
    before = torch.zeros(len(keep) + 1, dtype=torch.long, device=keep.device)
    torch.cumsum(keep, 0, out=before[1:])
    return Ragged(entries.values.masked_select(keep), entries.columns.masked_select(keep), before[entries.starts])
