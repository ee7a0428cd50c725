"""Matching pursuit: latents are picked one after the other, each to fit what those before it left over.

    r_0 = x - b_dec;  k times:  i = argmax r . W_dec_i,  a = relu(r . W_dec_i),  z_i += a,  r <- r - a W_dec_i
    x_hat = z W_dec + b_dec = x - r_k

Loss: FVU of the batch, |r_k|^2 over the spread of x. Its gradient goes through all steps, with the picks as they are.
The decoder is all there is: no W_enc, no b_enc. |r|^2 falls by a^2 a step, so any smaller k at inference is a prefix.
Source: Costa et al. 2025, arXiv:2506.03093. Differs: Adam's betas, and steps end after k, not at a small residual,
unless `residual_threshold` says so. Caution (arXiv:2602.14687): its better reconstruction is not better features.
"""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import sparse
from sae.base import SAE, ConfigError, KConfig, Loss, State
from sae.losses import fvu
from sae.parallel import ALONE, Mesh
from sae.pursuit import Codes, Matching, matching, merged


@dataclass(frozen=True, kw_only=True)
class MatchingPursuitConfig(KConfig):
    """k is the number of steps, and the most latents a token has."""

    residual_threshold: float = 0.0
    """Norm of the residual below which a row stops; activations have norm sqrt(d_in) in training."""
    stop_on_duplicate_support: bool = False
    """Whether a row stops when it picks a latent again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.residual_threshold >= 0:
            raise ConfigError(f"residual_threshold={self.residual_threshold}: expected 0 (none) or above.")


class MatchingPursuitSAE(SAE):
    architecture = "matching_pursuit"
    tied = True
    biases = ("b_dec",)
    by_latent = ("W_dec",)
    cfg: MatchingPursuitConfig

    def __init__(self, cfg: MatchingPursuitConfig, mesh: Mesh = ALONE) -> None:
        if mesh.n_latents > 1:
            raise ConfigError("matching_pursuit cannot share its latents among processes: use --data-parallel N.")
        super().__init__(cfg, mesh)

    def encode_sparse(
        self, x: Float[Tensor, "n d_in"], k: int | None = None
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """k: steps, by default the config's."""
        codes = self._pick(x - self.b_dec, k or self.cfg.k)
        return merged(codes.values, codes.indices)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        del target  # a tied dictionary writes what it reads
        with torch.autocast(x.device.type, enabled=False):
            centre = x - self.b_dec
            codes = self._pick(centre.detach(), state.k or self.cfg.k)
            loss = fvu(Matching.apply(centre, self.W_dec, codes), x, self.mesh)
        values, indices = merged(codes.values, codes.indices)
        l0 = self.mesh.mean_rows((values != 0).sum() / len(x))
        return Loss(loss, {"fvu": loss.detach(), "l0": l0}, sparse.fired(values, indices, self.d_sae))

    @torch.no_grad()
    def unscale(self, scale: float) -> None:
        super().unscale(scale)
        self.cfg = dataclasses.replace(self.cfg, residual_threshold=self.cfg.residual_threshold / scale)

    def _pick(self, x: Float[Tensor, "n d_in"], k: int) -> Codes:
        cfg = self.cfg
        return matching(
            x,
            self.W_dec,
            k,
            threshold=cfg.residual_threshold,
            once=cfg.stop_on_duplicate_support,
            low=self.low.get("W_dec"),
        )
