"""Gated: whether a latent is on, and how large it is then, are asked separately, so that the penalty shrinks nothing.

    g = (x - b_dec) W_enc + b_gate        m = ReLU((x - b_dec) (W_enc * exp(r_mag)) + b_mag)
    z = 1[g > 0] * m                      x_hat = z W_dec + b_dec

Loss: FVU of x_hat + FVU of ReLU(g) decoded by W_dec and b_dec, to which it gives no gradient, + coefficient *
sum_i ReLU(g)_i / target_l0, a mean over rows. The gate has no gradient: b_gate learns from the last two terms only.
The coefficient is not tuned: see `sae.controller`.
Source: Rajamanoharan et al. 2024, arXiv:2404.16014. Differs: the coefficient follows L0; b_gate starts at the quantile
of the data that gives `start_l0` times the target.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae import entries
from sae.base import SAE, Loss, State
from sae.controller import Controller, PenaltyConfig
from sae.entries import Entries
from sae.ksparse import centred
from sae.losses import fvu
from sae.parallel import ALONE, Mesh
from sae.select import above
from sae.sparse import Ragged, to_table


@dataclass(frozen=True, kw_only=True)
class GatedConfig(PenaltyConfig):
    """d_in, d_sae, target_l0, weight and start_l0."""

    start_l0: float = 5.0


class GatedSAE(SAE):
    architecture = "gated"
    biases = ("b_gate", "b_mag", "b_dec")
    by_latent = ("W_enc", "W_dec", "b_gate", "b_mag", "r_mag")
    cfg: GatedConfig

    def __init__(self, cfg: GatedConfig, mesh: Mesh = ALONE) -> None:
        super().__init__(cfg, mesh)
        self.b_gate, self.b_mag, self.r_mag = (nn.Parameter(torch.zeros(self.n_held)) for _ in range(3))
        self.controller = Controller(cfg, start=0.1)

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        on = above(centred(self, x), self.encoder, self.b_gate)
        z = self._magnitudes(Entries(on.values, True, on.columns, on.starts))
        return to_table(Ragged(z, on.columns, on.starts), self.n_held)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        mesh, rows = self.mesh, centred(self, x)
        with torch.autocast(x.device.type, enabled=False):
            gate = entries.encode(self, rows, self.b_gate)
            opened = torch.relu(gate.values)
            z = (opened > 0) * self._magnitudes(gate)
            main = fvu(mesh.sum_latents(gate.decode(z, self, self.W_dec)) + self.b_dec - target, target, mesh)
            by_gate = mesh.sum_latents(gate.decode(opened, self, self.W_dec.detach())) + self.b_dec.detach()
            aux = fvu(by_gate - target, target, mesh)
            penalty = mesh.mean_rows(mesh.sum_latents(opened.sum(dtype=torch.float32) / len(x)))
            l0 = mesh.mean_rows(mesh.sum_latents((z > 0).sum() / len(x)))
            terms = {"fvu": main.detach(), "aux": aux.detach(), "l0": l0}
            terms["coefficient"] = self.controller.coefficient.clone()
            total = main + aux + self.controller.term(penalty, l0, state.penalty)
            return Loss(total, terms, gate.fired(z, self.n_held))

    def _magnitudes(self, gate: Entries) -> Float[Tensor, "..."]:
        """m, from the g that shares its product."""
        plain = gate.values - gate.at(self.b_gate)
        return torch.relu(plain * gate.at(self.r_mag.exp()) + gate.at(self.b_mag))

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        super().initialise(x, seed)
        self.b_gate.copy_(-entries.quantile(self.W_enc.T, centred(self, x), self.cfg.start_share))

    @torch.no_grad()
    def restart(
        self, latents: Int[Tensor, " _m"], directions: Float[Tensor, "_m d_in"], norm: Float[Tensor, ""]
    ) -> None:
        self.W_dec[latents] = directions
        self.W_enc[:, latents] = (directions * norm).T
        for bias in (self.b_gate, self.b_mag, self.r_mag):
            bias[latents] = 0

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        self.controller.follow(state.penalty)
