"""g-SAE: a TopK whose choice, in training, also weighs what a latent does to the model's loss.

    p = ReLU((x - b_dec) W_enc + b_enc)        z = p where p_i (1 + beta |d_i . g|) is among the k largest of its row

g is the gradient of the summed cross-entropy at x, brought to a mean norm of sqrt(d_in), so |p_i d_i . g| is the first
order of what taking latent i out does to the loss. Loss: FVU + 1/32 AuxK. Without gradients (a dictionary in use) p
alone decides.
Source: Olmo et al. 2024, "Features that Make a Difference", arXiv:2411.10397 (the score as summaries
give it).
Differs: g has a fixed scale, so that beta has one; AuxK.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import ksparse
from sae.base import SAE, ConfigError, Loss, State
from sae.ksparse import KSparseConfig


@dataclass(frozen=True, kw_only=True)
class GSAEConfig(KSparseConfig):
    beta: float = 1.0
    """Weight of the gradient in the choice; 0 is TopK."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 0:
            raise ConfigError(f"beta={self.beta}: expected at least 0.")


class GSAE(SAE):
    architecture = "gsae"
    weighs_gradient = True
    cfg: GSAEConfig

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return ksparse.encode(self, x, self.cfg.k)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        weights = None
        if state.gradient is not None:
            with torch.no_grad():
                weights = 1 + self.cfg.beta * (state.gradient @ self.W_dec.T).abs().float()
        return ksparse.loss(self, x, target, state, self.cfg.k, self.cfg.auxk_weight, weights)
