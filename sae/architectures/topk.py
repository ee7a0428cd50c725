"""TopK: each row keeps its k largest latents.

    z = TopK(ReLU((x - b_dec) W_enc + b_enc), k)        x_hat = z W_dec + b_dec

Loss: FVU of the batch + 1/32 AuxK + multi_topk * FVU of the 4k largest (Multi-TopK: what is trained with 1/8 serves at
other k too). Decoder rows have norm 1. Only the chosen entries of a row get gradient, which is what makes training
sparse: see `sae.sparse`.
Source: Gao et al. 2024, arXiv:2406.04093; Multi-TopK section 5.3.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from sae import ksparse, nested
from sae.base import SAE, ConfigError, Loss, State
from sae.ksparse import KSparseConfig


@dataclass(frozen=True, kw_only=True)
class TopKConfig(KSparseConfig):
    multi_topk: float = 0.0
    """Weight of Multi-TopK's loss, 1/8 in the paper; 0 turns it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multi_topk < 0:
            raise ConfigError(f"multi_topk={self.multi_topk} is out of range: expected 0 (off) or more, such as 0.125.")


class TopKSAE(SAE):
    architecture = "topk"
    cfg: TopKConfig

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return ksparse.encode(self, x, self.cfg.k)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        k, cfg = state.k or self.cfg.k, self.cfg
        if cfg.multi_topk:
            return nested.loss(self, x, target, state, (k, 4 * k), (1.0, cfg.multi_topk), cfg.auxk_weight)
        return ksparse.loss(self, x, target, state, k, cfg.auxk_weight)
