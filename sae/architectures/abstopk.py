"""AbsTopK: each row keeps the k latents of largest magnitude, with their sign.

    z = H_k((x - b_dec) W_enc + b_enc)        x_hat = z W_dec + b_dec        H_k keeps the k entries of largest |.|

One latent stands for a direction and its opposite, so a dictionary of opposites needs half the latents; z may be
negative, firing means z != 0, and duplicates are found by |cosine|.
Source: arXiv:2510.00404. Differs: b_dec is subtracted before the encoder, decoder rows have norm 1, and AuxK (which the
paper lacks) revives dead latents with their sign.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from sae import ksparse
from sae.base import SAE, Loss, State
from sae.ksparse import KSparseConfig


@dataclass(frozen=True, kw_only=True)
class AbsTopKConfig(KSparseConfig):
    """As TopK's; k counts latents of either sign."""


class AbsTopKSAE(SAE):
    architecture = "abstopk"
    signed = True
    cfg: AbsTopKConfig

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return ksparse.encode(self, x, self.cfg.k)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        return ksparse.loss(self, x, target, state, self.cfg.k, self.cfg.auxk_weight)
