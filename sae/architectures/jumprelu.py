"""JumpReLU: a latent is on where its pre-activation passes a threshold of its own.

    p = (x - b_dec) W_enc + b_enc        z = p * 1[p > threshold]        x_hat = z W_dec + b_dec

Loss: FVU of the batch + coefficient * penalty / target_l0. The penalty is the mean L0 ("step") or the mean of
sum tanh(tanh_scale * z) ("tanh"), and may be joined by relu(threshold - p), summed over dead latents, which brings them
back. The step has no gradient, so thresholds and encoder learn through a window of `bandwidth` around the threshold
(straight-through estimator, rectangle kernel). The coefficient is not tuned: see `sae.controller`.
Source: Rajamanoharan et al. 2024, arXiv:2407.14435; tanh and the loss of dead latents: Anthropic, "Circuits updates",
January 2025. Differs: the gradient of the step also reaches the encoder (Anthropic); the coefficient follows L0, which
makes a penalty that is quadratic in the distance from a target needless; thresholds start at the quantile of the data
that gives `start_l0` times the target; only dead latents, not all that are off, are in the loss that revives them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae import entries
from sae.base import SAE, ConfigError, Dead, Loss, State
from sae.controller import Controller, PenaltyConfig
from sae.jump import jumped
from sae.ksparse import centred
from sae.losses import fvu
from sae.parallel import ALONE, Mesh
from sae.select import above
from sae.sparse import to_table

LOSSES = ("step", "tanh")


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(PenaltyConfig):
    start_l0: float = 5.0
    bandwidth: float = 1.5
    """Width of the window around the threshold in which the step has a gradient; activations have norm sqrt(d_in)."""
    loss: str = "step"
    """What is made small: "step" (L0) or "tanh"."""
    tanh_scale: float = 4.0
    """How steeply "tanh" tells latents that are on from those that are off."""
    dead_weight: float = 0.0
    """Weight of the loss that revives dead latents, in units of `weight`; Anthropic takes 3e-6. 0 turns it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ConfigError(f"loss={self.loss!r} is unknown: expected one of {', '.join(LOSSES)}.")
        if not (self.bandwidth > 0 and self.tanh_scale > 0 and self.dead_weight >= 0):
            raise ConfigError(
                f"bandwidth={self.bandwidth}, tanh_scale={self.tanh_scale}, dead_weight={self.dead_weight}: expected "
                "the first two above 0 and the last at least 0."
            )


class JumpReLUSAE(SAE):
    architecture = "jumprelu"
    biases = ("b_enc", "b_dec", "threshold")
    by_latent = ("W_enc", "W_dec", "b_enc", "threshold")
    cfg: JumpReLUConfig

    def __init__(self, cfg: JumpReLUConfig, mesh: Mesh = ALONE) -> None:
        super().__init__(cfg, mesh)
        self.threshold = nn.Parameter(torch.zeros(self.n_held))
        self.controller = Controller(cfg, start=0.01)

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return to_table(above(centred(self, x), self.encoder, self.b_enc, self.threshold), self.n_held)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        cfg, mesh, rows = self.cfg, self.mesh, centred(self, x)
        with torch.autocast(x.device.type, enabled=False):
            pre = entries.encode(self, rows, self.b_enc, self.threshold.detach() - cfg.bandwidth / 2)
            z, n_on, fired = jumped(pre, self.threshold, cfg.bandwidth)
            main = fvu(mesh.sum_latents(pre.decode(z, self, self.W_dec)) + self.b_dec - target, target, mesh)
            l0 = penalty = mesh.mean_rows(mesh.sum_latents(n_on / len(x)))
            if cfg.loss == "tanh":
                soft = torch.tanh(cfg.tanh_scale * z.float()).sum()
                penalty = mesh.mean_rows(mesh.sum_latents(soft / len(x)))
            terms = {"fvu": main.detach(), "l0": l0.detach(), "coefficient": self.controller.coefficient.clone()}
            total = main + self.controller.term(penalty, l0, state.penalty)
            if cfg.dead_weight and state.dead is not None:
                terms["below"] = (missing := self._missing(x, state.dead)).detach()
                total = total + state.penalty * cfg.dead_weight / self.d_in * missing
            return Loss(total, terms, fired)

    def _missing(self, x: Float[Tensor, "n d_in"], dead: Dead) -> Float[Tensor, ""]:
        """What dead latents lack to their thresholds, summed over them, a mean over rows."""
        x = x.float() - self.mesh.into_latents(self.b_dec)
        pre = x @ self.W_enc.T[dead.latents].T + self.b_enc[dead.latents]
        missing = torch.relu(self.threshold[dead.latents] - pre).mean(dim=0) @ dead.real.float()
        return self.mesh.mean_rows(self.mesh.sum_latents(missing))

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        super().initialise(x, seed)
        self.threshold.copy_(entries.quantile(self.W_enc.T, centred(self, x), self.cfg.start_share))

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        self.threshold.clamp_(min=0.0)
        self.controller.follow(state.penalty)
