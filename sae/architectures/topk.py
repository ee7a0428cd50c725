"""TopK: each row keeps its k largest latents.

    z = TopK(ReLU((x - b_dec) W_enc + b_enc), k)        x_hat = z W_dec + b_dec

Loss: FVU of the batch + 1/32 AuxK. Decoder rows have norm 1. Only the chosen k entries of a row get gradient, which is
what makes training sparse: see `sae.sparse`.
Source: Gao et al. 2024, arXiv:2406.04093.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from sae import ksparse
from sae.base import SAE, Loss, State
from sae.ksparse import KSparseConfig


@dataclass(frozen=True, kw_only=True)
class TopKConfig(KSparseConfig):
    """d_in, d_sae, k and auxk_weight."""


class TopKSAE(SAE):
    architecture = "topk"
    cfg: TopKConfig

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return ksparse.encode(self, x, self.cfg.k)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        return ksparse.loss(self, x, target, state, self.cfg.k, self.cfg.auxk_weight)
