"""Standard: ReLU latents under an L1 penalty.

    z = ReLU((x - b_dec) W_enc + b_enc)        x_hat = z W_dec + b_dec

Loss: FVU of the batch + coefficient * sum_i z_i^p |d_i| / target_l0, a mean over rows, d_i the rows of W_dec; the
coefficient is not tuned: see `sae.controller`. Rows are kept at norm 1 ("unit"), or are free, where |d_i| in the
penalty keeps them from growing ("free"), and brought to norm 1 in what is saved. p is 1; with `p_end` below 1 it falls
to that, so that large latents cost less and shrink less; at each change the penalty is rescaled to stay what it was.
Source: Bricken et al. 2023, "Towards Monosemanticity" (unit rows); Anthropic, "Circuits updates", April 2024 (free
rows); Karvonen et al. 2024, arXiv:2408.00113 (p). Differs: the coefficient follows L0; b_enc starts at the quantile of
the data that gives `start_l0` times the target; b_dec is subtracted before the encoder with free rows too, which only
shifts b_enc; p falls a little each step; z^p is a straight line below `STRAIGHT`, where its slope has no bound.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import entries
from sae.base import SAE, ConfigError, Loss, State
from sae.controller import Controller, PenaltyConfig
from sae.ksparse import centred
from sae.losses import fvu
from sae.parallel import ALONE, Mesh
from sae.select import above
from sae.sparse import to_table

ROWS = ("unit", "free")
FREE_NORM = 0.1
"""Of free rows at the start."""
STRAIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class StandardConfig(PenaltyConfig):
    rows: str = "unit"
    """Decoder rows in training: "unit" or "free"."""
    p_end: float = 1.0
    """p of the penalty at the end; the paper takes 0.2."""
    anneal_start: float = 0.3
    """Share of the run after which p falls from 1, in a straight line to the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows not in ROWS:
            raise ConfigError(f"rows={self.rows!r} is unknown: expected one of {', '.join(ROWS)}.")
        if not (0 < self.p_end <= 1 and 0 <= self.anneal_start < 1):
            raise ConfigError(
                f"p_end={self.p_end}, anneal_start={self.anneal_start}: expected the first above 0 and at most 1, the "
                "second from 0 to below 1."
            )


class StandardSAE(SAE):
    architecture = "standard"
    cfg: StandardConfig
    p: Float[Tensor, ""]
    size: Float[Tensor, ""]

    def __init__(self, cfg: StandardConfig, mesh: Mesh = ALONE) -> None:
        super().__init__(cfg, mesh)
        if cfg.rows == "free":
            self.unit_rows = ()
        self.controller = Controller(cfg, start=0.1)
        self.register_buffer("p", torch.tensor(1.0))
        self.register_buffer("size", torch.tensor(1.0))
        """What keeps the penalty the size that it had before p fell."""

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return to_table(above(centred(self, x), self.encoder, self.b_enc), self.n_held)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        mesh, rows = self.mesh, centred(self, x)
        with torch.autocast(x.device.type, enabled=False):
            pre = entries.encode(self, rows, self.b_enc)
            z = torch.relu(pre.values)
            main = fvu(mesh.sum_latents(pre.decode(z, self, self.W_dec)) + self.b_dec - target, target, mesh)
            costs = z.float()
            if self.cfg.rows == "free":
                costs = costs * pre.at(self.W_dec.norm(dim=1))
            penalty = mesh.sum_rows(mesh.sum_latents(self._cost(costs, state.progress))) / (len(x) * mesh.n_rows)
            l0 = mesh.mean_rows(mesh.sum_latents((z > 0).sum() / len(x)))
            terms = {"fvu": main.detach(), "l0": l0, "coefficient": self.controller.coefficient.clone()}
            total = main + self.controller.term(penalty, l0, state.penalty)
            return Loss(total, terms, pre.fired(z, self.n_held))

    def _cost(self, costs: Float[Tensor, "..."], progress: Float[Tensor, ""] | float) -> Float[Tensor, ""]:
        """The sum of costs^p at this progress, times `size`."""
        if self.cfg.p_end == 1:
            return costs.sum()
        start = self.cfg.anneal_start
        with torch.no_grad():
            fallen = (torch.as_tensor(progress, device=costs.device) - start).clamp(min=0.0) / (1 - start)
            p = 1 + (self.cfg.p_end - 1) * fallen
            before, after = (
                self.mesh.sum_rows(self.mesh.sum_latents(_power(costs, each).sum())) for each in (self.p, p)
            )
            self.size.mul_(torch.where(after > 0, before / after, 1.0))
            self.p.copy_(p)
        return self.size * _power(costs, p).sum()

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        super().initialise(x, seed)
        if self.cfg.rows == "free":
            self.W_dec.mul_(FREE_NORM)
            self.W_enc.mul_(FREE_NORM)
        self.b_enc.copy_(-entries.quantile(self.W_enc.T, centred(self, x), self.cfg.start_share))

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        self.controller.follow(state.penalty)

    @torch.no_grad()
    def unscale(self, scale: float) -> None:
        super().unscale(scale)
        if self.cfg.rows == "free":
            norms = self.W_dec.norm(dim=1).clamp(min=1e-12)
            self.W_dec.div_(norms[:, None])
            self.W_enc.mul_(norms)
            self.b_enc.mul_(norms)


def _power(costs: Float[Tensor, "..."], p: Float[Tensor, ""]) -> Float[Tensor, "..."]:
    return costs * costs.clamp(min=STRAIGHT) ** (p - 1)
