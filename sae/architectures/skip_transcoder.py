"""Skip transcoder: a transcoder beside a linear map, so that latents need not carry what is linear.

    z = TopK(ReLU(x W_enc + b_enc), k)        y_hat = z W_dec + x W_skip^T + b_dec

Loss: FVU of the target y + 1/32 AuxK. W_skip (d_out, d_in) starts at 0.
Source: Paulo, Shabalin, Belrose 2025, "Transcoders Beat Sparse Autoencoders for Interpretability", arXiv:2501.18823.
Differs: as `sae.architectures.transcoder`. SAELens' skip_transcoder is a ReLU's too.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae import columns, ksparse
from sae.architectures.transcoder import TranscoderConfig
from sae.base import SAE, Loss, State
from sae.parallel import ALONE, Mesh


class SkipTranscoderSAE(SAE):
    architecture = "skip_transcoder"
    target = "hook"
    centres = False
    cfg: TranscoderConfig

    def __init__(self, cfg: TranscoderConfig, mesh: Mesh = ALONE) -> None:
        super().__init__(cfg, mesh)
        self.W_skip = nn.Parameter(torch.zeros(cfg.d_out, cfg.d_in))

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return ksparse.encode(self, x, self.cfg.k)

    def offset(self, x: Float[Tensor, "n d_in"] | None) -> Float[Tensor, "*_n d_out"]:
        assert x is not None, "a skip transcoder needs the row that z came from"
        return x @ self.W_skip.T + self.b_dec

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        return ksparse.loss(self, x, target, state, self.cfg.k, self.cfg.auxk_weight)

    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        columns.start_encoder(self, x, seed)

    def initialise_output(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"]) -> None:
        columns.start_decoder(self, x, target)

    def unscale_columns(self, reads: Float[Tensor, " d_in"], writes: Float[Tensor, " d_out"]) -> None:
        columns.unscale_columns(self, reads, writes)
        self.W_skip.data.mul_(reads).div_(writes[:, None])
