"""What holds a penalty at the L0 that was asked for: one coefficient, which follows L0.

    loss = FVU + coefficient * penalty / target_l0        coefficient *= exp(0.01 log(L0 / aim)) each step

It rises while L0 is above the aim and falls while it is below, so training ends at the target whatever the penalty:
only that more of it means fewer active latents is used. The aim is target_l0; over `sparsity_warmup` it falls to that
from start_l0 times as much. A fixed weight turns this off, and is what warms up.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.base import Config, ConfigError

RATE = 0.01
"""How much of the distance of L0 from the target, in logarithms, a step adds to the coefficient's."""


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig(Config):
    """What every architecture with a penalty has."""

    target_l0: float
    """Mean active latents for each token that training ends at; with a fixed `weight`, only where it starts from."""
    weight: float | None = None
    """Fixed weight of the penalty, in the papers' units: that of the penalty beside the squared error of activations
    whose mean squared norm is d_in. None: it follows L0."""
    start_l0: float = 1.5
    """L0 at the start, in units of target_l0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target_l0 < self.d_sae:
            raise ConfigError(
                f"target_l0={self.target_l0} is out of range: expected 0 < target_l0 < d_sae={self.d_sae}. "
                "Lower it or raise d_sae."
            )
        if self.weight is not None and not self.weight >= 0:
            raise ConfigError(f"weight={self.weight} is out of range: expected at least 0, or None to follow L0.")
        if not self.start_l0 > 0:
            raise ConfigError(f"start_l0={self.start_l0} is out of range: expected above 0.")

    @property
    def start_share(self) -> float:
        """Share of rows on which a latent is to be active at the start."""
        return min(self.start_l0 * self.target_l0 / self.d_sae, 0.5)


class Controller(nn.Module):
    """The coefficient, and the L0 that it follows, as buffers: a checkpoint has them, and no step waits for them.

    start: the first coefficient. One that is far too small costs a short run the steps in which it rises.
    """

    coefficient: Float[Tensor, ""]
    last_l0: Float[Tensor, ""]

    def __init__(self, cfg: PenaltyConfig, start: float) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.weight is not None:
            start = cfg.weight * cfg.target_l0 / cfg.d_in
        self.register_buffer("coefficient", torch.tensor(start))
        self.register_buffer("last_l0", torch.tensor(float(cfg.target_l0)))

    def term(
        self, penalty: Float[Tensor, ""], l0: Float[Tensor, ""], warm: Float[Tensor, ""] | float
    ) -> Float[Tensor, ""]:
        """The penalty's part of the loss. l0: of the batch, which `follow` will look at. warm: `State.penalty`, by
        which a fixed weight is multiplied."""
        self.last_l0.copy_(l0.detach())
        term = self.coefficient * penalty / self.cfg.target_l0
        return term if self.cfg.weight is None else warm * term

    @torch.no_grad()
    def follow(self, warm: Float[Tensor, ""] | float) -> None:
        """After a step: move the coefficient towards what brings L0 to the target, or while the penalty warms up to
        where between its start and the target it is to be by now."""
        cfg = self.cfg
        if cfg.weight is None:
            first = cfg.start_share * cfg.d_sae
            aim = cfg.target_l0 * (first / cfg.target_l0) ** (1.0 - warm)
            too_many = (self.last_l0 / aim).log().clamp(-1.0, 1.0)
            self.coefficient.mul_(torch.exp(RATE * too_many)).clamp_(1e-6, 1e2)
