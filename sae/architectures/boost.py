"""Boost: a small dictionary that reads x and predicts what a frozen base dictionary leaves over, of a new domain.

    z = TopK(ReLU(x W_enc + b_enc), k)        e_hat = z W_dec, of e = x - x_hat of the base

Loss: FVU of the error + 1/32 AuxK. There is no decoder bias: where no latent is on, the base stays as it is.
`sae.frozen.stitched` makes one dictionary of the base and its boosts.
Source: Koriagin et al. 2025, "Teach Old SAEs New Domain Tricks with Boosting", arXiv:2507.12990, section 3.1.
Differs: TopK in place of BatchTopK; the error is brought to x's norm while it is learned.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import columns, ksparse
from sae.base import SAE, Loss, State
from sae.ksparse import KSparseConfig
from sae.parallel import ALONE, Mesh


@dataclass(frozen=True, kw_only=True)
class BoostConfig(KSparseConfig):
    """d_in, d_sae, k and auxk_weight."""


class BoostSAE(SAE):
    architecture = "boost"
    target = "error"
    centres = False
    biases = ("b_enc",)
    cfg: BoostConfig

    def __init__(self, cfg: BoostConfig, mesh: Mesh = ALONE) -> None:
        super().__init__(cfg, mesh)
        del self.b_dec
        self.register_buffer("b_dec", torch.zeros(cfg.d_in), persistent=False)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return ksparse.encode(self, x, self.cfg.k)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        return ksparse.loss(self, x, target, state, self.cfg.k, self.cfg.auxk_weight)

    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        columns.start_encoder(self, x, seed)

    def initialise_output(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"]) -> None:
        columns.start_decoder(self, x, target)
        self.b_dec.zero_()

    def unscale_columns(self, reads: Float[Tensor, " d_in"], writes: Float[Tensor, " d_out"]) -> None:
        columns.unscale_columns(self, reads, writes)
