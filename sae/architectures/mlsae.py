"""Multi-layer SAE: one dictionary for the residual streams of all layers, each row standardised by itself.

    u = (x - mean(x)) / (std(x) + eps), over the row        p = TopK(ReLU(u W_enc + b_enc), k)
    z = std(x) p        x_hat = z W_dec + std(x) b_dec + mean(x)

Loss: FVU of the standardised rows + 1/32 AuxK; training rows are those of all hooks, pooled.
Source: Lawson et al. 2024, "Residual Stream Analysis with Multi-Layer SAEs", arXiv:2409.04185.
Differs: latents carry std(x), so that z_i d_i is what a latent adds to the activations; a bias of the latents takes the
place of b_dec at the input; eps is 0 but in dictionaries that come from elsewhere (`sae.interop.openai`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import columns, ksparse
from sae.base import SAE, ConfigError, Loss, State
from sae.ksparse import KSparseConfig


@dataclass(frozen=True, kw_only=True)
class MLSAEConfig(KSparseConfig):
    """d_in, d_sae, k, auxk_weight and eps."""

    eps: float = 0.0
    """Added to a row's standard deviation before the row is divided by it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps >= 0:
            raise ConfigError(f"eps={self.eps}: expected 0 or more.")


class MLSAE(SAE):
    architecture = "mlsae"
    centres = False
    biases = ()  # nothing is in units of x: those are a row's own
    cfg: MLSAEConfig

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        std, mean = _std_mean(x)
        values, indices = ksparse.encode(self, (x - mean) / (std + self.cfg.eps), self.cfg.k)
        return values * std, indices

    def offset(self, x: Float[Tensor, "n d_in"] | None) -> Float[Tensor, "*_n d_out"]:
        assert x is not None, "a multi-layer SAE needs the row that z came from"
        std, mean = _std_mean(x)
        return std * self.b_dec + mean

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        del target
        std, mean = _std_mean(x)
        u = (x - mean) / (std + self.cfg.eps)
        return ksparse.loss(self, u, u, state, self.cfg.k, self.cfg.auxk_weight)  # of u, std is 1 and mean 0

    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        std, mean = _std_mean(x)
        u = (x - mean) / (std + self.cfg.eps)
        columns.start_encoder(self, u, seed)
        with torch.no_grad():
            self.W_dec.copy_(self.W_enc.T)
            self.b_dec.copy_(u.mean(dim=0))


def _std_mean(x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
    """Of each row; a constant row has a std that is not quite 0."""
    std, mean = torch.std_mean(x, dim=1, correction=0, keepdim=True)
    return std.clamp(min=1e-8), mean
