"""GBA, group bias adaptation: latents have no penalty; each group of them has its own bound on how often they fire.

    y_i = W_dec_i . (x - b_dec)        z_i = gain_i * y_i * 1[y_i > threshold_i]        x_hat = z W_dec + b_dec

Loss: FVU of the batch, to W_dec (tied: read and written with), gain and b_dec; thresholds get no gradient. Every
`update_rows` rows, of those seen since the last time: a latent that fired more often than its group's bound has its
threshold raised by `rate` * r, where r is how far above it a row came at most; one that never fired has it lowered by
`rate` * the mean r of its group's others. Between the two nothing moves: a bound is no target. The bounds of the groups
fall geometrically from the first to the last, `spread` times smaller, and sum to `target_l0` over the latents, which L0
therefore ends below.
Source: arXiv:2506.14002. Differs: thresholds are the paper's biases with the other sign, from 0 to sqrt(d_in), the norm
of rows here; they start at the quantile of the data that meets the bound, not at 0; bounds follow from `target_l0`; the
rows for the rule are counted, not kept.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae import entries
from sae.base import SAE, Config, ConfigError, Loss, State
from sae.entries import Entries
from sae.ksparse import centred
from sae.losses import fvu
from sae.parallel import ALONE, Mesh
from sae.select import above
from sae.sparse import Ragged, to_table


@dataclass(frozen=True, kw_only=True)
class GBAConfig(Config):
    target_l0: float
    """Sum of the latents' bounds on how often they fire: what L0 is at most."""
    n_groups: int = 10
    spread: float = 100.0
    """How many times the first group's bound is the last's."""
    update_rows: int = 25_600
    """Rows that the rule counts before it moves thresholds."""
    rate: float = 0.01
    """How far the rule moves them, in units of r."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target_l0 < self.d_sae:
            raise ConfigError(
                f"target_l0={self.target_l0} is out of range: expected 0 < target_l0 < d_sae={self.d_sae}. "
                "Lower it or raise d_sae."
            )
        if not (0 < self.n_groups <= self.d_sae and self.spread >= 1 and self.update_rows > 0 and 0 < self.rate < 1):
            raise ConfigError(
                f"n_groups={self.n_groups}, spread={self.spread}, update_rows={self.update_rows}, rate={self.rate}: "
                f"expected 1 to d_sae={self.d_sae} groups, a spread of at least 1, rows above 0, a rate from 0 to 1."
            )

    @property
    def bounds(self) -> list[float]:
        """Of each group, the most often that its latents are to fire."""
        falls = [self.spread ** (-group / max(self.n_groups - 1, 1)) for group in range(self.n_groups)]
        return [fall * self.target_l0 / self.d_sae * self.n_groups / sum(falls) for fall in falls]


class GBASAE(SAE):
    architecture = "gba"
    tied = True
    biases = ("b_dec", "threshold")
    by_latent = ("W_dec", "gain", "threshold")
    saved = ("threshold",)
    cfg: GBAConfig
    threshold: Float[Tensor, " d_sae"]
    n_fired: Float[Tensor, " d_sae"]
    furthest: Float[Tensor, " d_sae"]
    n_rows: Float[Tensor, ""]

    def __init__(self, cfg: GBAConfig, mesh: Mesh = ALONE) -> None:
        if mesh.ranks.world > 1:
            raise ConfigError("gba trains in one process: its thresholds follow maxima over all rows.")
        super().__init__(cfg, mesh)
        self.gain = nn.Parameter(torch.ones(cfg.d_sae))
        self.register_buffer("threshold", torch.zeros(cfg.d_sae))
        # Of the rows that the rule has counted since it last moved something:
        self.register_buffer("n_fired", torch.zeros(cfg.d_sae))
        self.register_buffer("furthest", torch.zeros(cfg.d_sae))
        self.register_buffer("n_rows", torch.zeros(()))

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        on = above(centred(self, x), self.encoder, torch.zeros_like(self.threshold), self.threshold)
        z = on.values * self.gain.index_select(0, on.columns)
        return to_table(Ragged(z, on.columns, on.starts), self.n_held)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        del state
        rows = centred(self, x)
        with torch.autocast(x.device.type, enabled=False):
            y = entries.encode(self, rows, torch.zeros_like(self.threshold), self.threshold)
            beyond = y.values.detach() - y.at(self.threshold)
            z = y.values * (beyond > 0) * y.at(self.gain)
            self._count(y, beyond, len(x))
            error = fvu(y.decode(z, self, self.W_dec) + self.b_dec - target, target)
            return Loss(error, {"fvu": error.detach(), "l0": (z != 0).sum() / len(x)}, y.fired(z, self.n_held))

    @torch.no_grad()
    def _count(self, y: Entries, beyond: Float[Tensor, "..."], n_rows: int) -> None:
        """Take a batch into account. beyond: how far above their thresholds the entries are."""
        on, beyond = (beyond > 0).to(self.n_fired.dtype), beyond.to(self.furthest.dtype)
        if y.sparse:
            self.n_fired.index_add_(0, y.columns, on)
            self.furthest.scatter_reduce_(0, y.columns, beyond, "amax")
        else:
            self.n_fired.add_(on.sum(dim=0))
            torch.maximum(self.furthest, beyond.amax(dim=0), out=self.furthest)
        self.n_rows.add_(n_rows)

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        super().initialise(x, seed)
        rows, groups = centred(self, x), self.W_dec.tensor_split(self.cfg.n_groups)
        parts = [entries.quantile(W, rows, min(b, 0.5)) for W, b in zip(groups, self.cfg.bounds, strict=True)]
        self.threshold.copy_(torch.cat(parts))

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        del state
        self.gain.clamp_(min=0.0)
        moved = []
        for bound, n_fired, r, threshold in zip(
            self.cfg.bounds,
            *(t.tensor_split(self.cfg.n_groups) for t in (self.n_fired, self.furthest, self.threshold)),
            strict=True,
        ):
            others = r.sum() / (r > 0).sum().clamp(min=1)
            up, down = self.cfg.rate * r, self.cfg.rate * others
            moved.append(threshold + (n_fired > bound * self.n_rows) * up - (n_fired == 0) * down)
        due = self.n_rows >= self.cfg.update_rows
        self.threshold.copy_(torch.where(due, torch.cat(moved).clamp(0.0, math.sqrt(self.d_in)), self.threshold))
        for counter in (self.n_fired, self.furthest, self.n_rows):
            counter.mul_(~due)
