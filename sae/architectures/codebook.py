"""Codebook: each row is the mean of the k codes that are nearest in angle; there are no coefficients.

    chosen = the k largest of (x - b_dec) . W_dec_i, those above 0     z_i = size_i / k if chosen, else 0
    x_hat = z W_dec + b_dec                                            a code is size_i W_dec_i

Loss: FVU of the batch, to codes and b_dec (the paper's `aeloss`). Dead codes start anew at rows that are reconstructed
badly, 20 times in the first half of a run unless `resample_every` says otherwise.
Source: Tamkin et al. 2023, arXiv:2310.17230. Differs: the paper trains the codebooks inside the model, which is tuned
with them through a straight-through gradient. On cached rows nothing lies before the codebook, so there is no such
gradient and no commitment term. Codes start at rows of the data (k-means there); b_dec is subtracted, not a LayerNorm's
mean; codes that point away from the row are never chosen.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae import sparse
from sae.base import SAE, ConfigError, KConfig, Loss, State
from sae.decode import decode
from sae.dense import pieces
from sae.ksparse import centred
from sae.losses import fvu
from sae.parallel import ALONE, Mesh
from sae.select import topk


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(KConfig):
    """k: codes for each token."""


class CodebookSAE(SAE):
    architecture = "codebook"
    tied = True
    biases = ("size", "b_dec")
    by_latent = ("W_dec", "size")
    cfg: CodebookConfig

    def __init__(self, cfg: CodebookConfig, mesh: Mesh = ALONE) -> None:
        if mesh.n_latents > 1:
            raise ConfigError("codebook cannot share its latents among processes: use --data-parallel N.")
        super().__init__(cfg, mesh)
        self.size = nn.Parameter(torch.ones(cfg.d_sae))
        """Norm of each code."""

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return self._codes(x, self.cfg.k)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        values, indices = self._codes(x, state.k or self.cfg.k)
        with torch.autocast(x.device.type, enabled=False):
            error = fvu(decode(values, indices, self.W_dec) + self.b_dec - target, target, self.mesh)
        l0 = self.mesh.mean_rows((values != 0).sum() / len(x))
        return Loss(error, {"fvu": error.detach(), "l0": l0}, sparse.fired(values.detach(), indices, self.d_sae))

    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        """Codes of one size in the directions of rows of x, all of which are drawn before one is drawn again."""
        super().initialise(x, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            turns = [torch.randperm(len(x), generator=generator) for _ in range(-(-self.d_sae // len(x)))]
            rows = (x - self.b_dec)[torch.cat(turns)[: self.d_sae]]
            self.W_dec.copy_(nn.functional.normalize(rows + 1e-6 * self.W_dec, dim=1))  # one may be the mean itself
            part = decode(*self._codes(x, self.cfg.k), self.W_dec)
            self.size.mul_((part * (x - self.b_dec)).sum() / part.square().sum())  # by least squares

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        del state
        self.size.clamp_(min=0.0)

    def _codes(self, x: Float[Tensor, "n d_in"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """z, with gradient to the sizes."""
        W, zero = self.low.get("W_dec", self.W_dec), torch.zeros_like(self.size)
        fits, indices = (
            torch.cat(parts) for parts in zip(*(topk(p, k) for p in pieces(centred(self, x), W, zero)), strict=True)
        )
        return self.size[indices] / k * (fits > 0), indices
