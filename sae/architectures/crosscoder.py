"""Crosscoder: one set of latents for several hooks (layers of a model, or two models), each with a decoder of its own.

    z = TopK(ReLU(sum_h x_h W_enc_h + b_enc), k), chosen by z_i sum_h |d_i,h|        x_hat_h = z W_dec_h + b_dec_h

x is the rows of all hooks side by side, and so are W_enc, W_dec and b_dec. Loss: FVU of x, whose hooks have one scale,
+ 1/32 AuxK. `exclusiveness` tells latents of one hook from shared ones.
Source: Lindsey et al. 2024, "Sparse Crosscoders"; choice by decoder norms: Minder et al. 2025, arXiv:2504.02922.
Differs: k a row, and not of the batch; the whole decoder row has norm 1, which the choice does not depend on.
"""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import columns, ksparse
from sae.base import SAE, ConfigError, Loss, State
from sae.ksparse import KSparseConfig


@dataclass(frozen=True, kw_only=True)
class CrosscoderConfig(KSparseConfig):
    widths: tuple[int, ...]
    """Width of each hook; together d_in."""
    scales: tuple[float, ...] = ()
    """What each hook's rows were multiplied by in training, where latents were chosen; () for 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(self.widths) != self.d_in or min(self.widths) < 1:
            raise ConfigError(f"widths={self.widths} do not add up to d_in={self.d_in}: expected one a hook.")
        if self.scales and len(self.scales) != len(self.widths):
            raise ConfigError(f"scales={self.scales}: expected one for each of {len(self.widths)} hooks.")


class CrosscoderSAE(SAE):
    architecture = "crosscoder"
    joint = True
    centres = False
    cfg: CrosscoderConfig

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return ksparse.encode(self, x, self.cfg.k, self._weights())

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        return ksparse.loss(self, x, target, state, self.cfg.k, self.cfg.auxk_weight, self._weights())

    @torch.no_grad()
    def _weights(self) -> Float[Tensor, "1 _held"]:
        """sum_h |d_i,h| of the scaled rows, by which latents are chosen."""
        norms = columns.norms_at_hooks(self.W_dec, self.cfg.widths)
        if self.cfg.scales:
            norms = norms * norms.new_tensor(self.cfg.scales)
        return norms.sum(dim=1)[None]

    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        columns.start_encoder(self, x, seed)
        with torch.no_grad():
            self.W_dec.copy_(self.W_enc.T)
            self.b_dec.copy_(x.mean(dim=0))

    def unscale_columns(self, reads: Float[Tensor, " d_in"], writes: Float[Tensor, " d_out"]) -> None:
        columns.unscale_columns(self, reads, writes)
        scales = tuple(float(part[0]) for part in reads.split(list(self.cfg.widths)))
        self.cfg = dataclasses.replace(self.cfg, scales=scales)


@torch.no_grad()
def exclusiveness(sae: CrosscoderSAE, a: int = 0, b: int = 1) -> Float[Tensor, " d_sae"]:
    """Of each latent, ((|d_b| - |d_a|) / max + 1) / 2 between its decoder rows at hooks number a and b, as scaled in
    training: 0 is a latent of a alone, 1 one of b alone, 1/2 a shared one.

    Source: Minder et al. 2025, arXiv:2504.02922, section 2.2 (relative decoder norm difference).
    """
    norms = columns.norms_at_hooks(sae.W_dec, sae.cfg.widths) * torch.tensor(
        sae.cfg.scales or (1.0,) * len(sae.cfg.widths), device=sae.W_dec.device
    )
    return ((norms[:, b] - norms[:, a]) / norms[:, [a, b]].amax(dim=1) + 1) / 2
