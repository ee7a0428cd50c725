"""Mutual Choice: a batch of n rows keeps its n * k largest latents (BatchTopK), and AuxK is for latents that are dying.

    p = (x - b_dec) W_enc + b_enc        x_hat = z W_dec + b_dec
    training: z = ReLU(p) where among the n * k largest of the batch        else: z = p * 1[p > threshold]

Loss: FVU of the batch + 1/32 aux_zipf: AuxK of the latents that fire less than half as often as Zipf's law, fitted to
the frequencies of all, expects at their rank (`sae.zipf`).
Source: arXiv:2411.02124. Differs: what aux_zipf is exactly is not published; rows are capped as in `sae.batchwise`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae import ksparse, zipf
from sae.base import ConfigError, Loss, State
from sae.batchwise import BatchwiseConfig, BatchwiseSAE, choose
from sae.parallel import ALONE, Mesh

FREQUENCY_KEEPS = 0.99
"""Share of itself that the running mean of how often a latent fires keeps at each step."""


@dataclass(frozen=True, kw_only=True)
class MutualChoiceConfig(BatchwiseConfig):
    """As BatchTopK's; auxk_weight is that of aux_zipf."""


class MutualChoiceSAE(BatchwiseSAE):
    architecture = "mutualchoice"
    cfg: MutualChoiceConfig
    frequency: Tensor
    """(d_sae) running mean of the share of rows in which each latent fires."""

    def __init__(self, cfg: MutualChoiceConfig, mesh: Mesh = ALONE) -> None:
        if mesh.n_latents > 1:
            raise ConfigError("mutualchoice cannot share its latents among processes: use --data-parallel N.")
        super().__init__(cfg, mesh)
        self.register_buffer("frequency", torch.zeros(cfg.d_sae))

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        with torch.no_grad():
            dying = zipf.dying(self.frequency)
        u, codes, dead, at_cap = choose(self, x, state._replace(dead=dying))
        made = ksparse.loss_of(self, u, target, codes, dead, self.cfg.auxk_weight, self.cfg.tilt)
        counts = torch.zeros_like(self.frequency)
        counts.index_add_(0, codes.indices.flatten(), (codes.values != 0).flatten().float())
        self.frequency.lerp_(self.mesh.mean_rows(counts / len(x)), 1 - FREQUENCY_KEEPS)
        return made._replace(terms=made.terms | {"at_cap": at_cap, "dying": dying.n})
