"""Transcoder: latents of one hook predict another, such as an MLP's output from its input.

    z = TopK(ReLU(x W_enc + b_enc), k)        y_hat = z W_dec + b_dec

Loss: FVU of the target y + 1/32 AuxK. x is not centred by b_dec, which is y's mean; b_enc starts at -mean(x) W_enc.
Source: Dunefsky et al. 2024, arXiv:2406.11944; TopK form: Paulo et al. 2025, arXiv:2501.18823.
Differs: decoder rows have norm 1 and start where y goes when their latent is on (theirs are free and start at 0).
SAELens has a ReLU transcoder of this name, which would take every positive latent: it refuses what we save.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from sae import columns, ksparse
from sae.base import SAE, ConfigError, Loss, State
from sae.ksparse import KSparseConfig


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(KSparseConfig):
    d_out: int
    """Width of what is predicted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_out < 1:
            raise ConfigError(f"d_out={self.d_out}: expected at least 1.")


class TranscoderSAE(SAE):
    architecture = "transcoder"
    target = "hook"
    centres = False
    cfg: TranscoderConfig

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return ksparse.encode(self, x, self.cfg.k)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        return ksparse.loss(self, x, target, state, self.cfg.k, self.cfg.auxk_weight)

    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        columns.start_encoder(self, x, seed)

    def initialise_output(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"]) -> None:
        columns.start_decoder(self, x, target)

    def unscale_columns(self, reads: Float[Tensor, " d_in"], writes: Float[Tensor, " d_out"]) -> None:
        columns.unscale_columns(self, reads, writes)
