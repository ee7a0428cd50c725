"""A frozen dictionary whose error another one learns (`sae.architectures.boost`), and both as one (`stitched`)."""

import copy
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base import SAE, Config, ConfigError, Loss, State


class FrozenBase:
    """What `sae` leaves over of scaled rows, brought to a mean norm of sqrt(d_in).

    sae: of rows as the model has them. scale: what rows are multiplied by in training. factor: what brings the error to
    that norm; None takes it from the scaled rows x. Rows that the base gives back exactly have no error to learn.
    """

    def __init__(
        self, sae: SAE, scale: float, factor: float | None = None, x: Float[Tensor, "n d_in"] | None = None
    ) -> None:
        self.sae = copy.deepcopy(sae)
        self.sae.unscale(1 / scale)
        self.factor = 1.0 if factor is None else factor
        if factor is None:
            assert x is not None, "a factor, or rows to find it"
            norm = float(self.error(x).norm(dim=1).mean())
            if not norm > 0:
                raise ConfigError("the base leaves nothing over: there is no error to learn.")
            self.factor = math.sqrt(x.shape[1]) / norm

    @torch.no_grad()
    def error(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """factor * (x - x_hat) of scaled rows."""
        return (x - self.sae.reconstruct(x)) * self.factor

    def to(self, device: torch.device) -> "FrozenBase":
        self.sae.to(device)
        return self


class Stitched(SAE):
    """Dictionaries of one hook as one: latents one after another, reconstructions added up. Not trained, not saved."""

    architecture = "stitched"
    by_latent = ("W_dec",)

    def __init__(self, parts: list[SAE]) -> None:
        super().__init__(Config(d_in=parts[0].d_in, d_sae=sum(part.d_sae for part in parts)))
        self.parts = parts
        with torch.no_grad():
            self.W_dec.data = torch.cat([part.W_dec for part in parts])
            self.b_dec.data = torch.stack([part.b_dec for part in parts]).sum(dim=0)
        self.metadata, self.statistics = parts[0].metadata, None
        self.requires_grad_(False)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        codes, first = [], 0
        for part in self.parts:
            values, indices = part.encode_sparse(x)
            codes.append((values, indices + first))
            first += part.d_sae
        return torch.cat([values for values, _ in codes], dim=1), torch.cat([indices for _, indices in codes], dim=1)

    def offset(self, x: Float[Tensor, "n d_in"] | None) -> Float[Tensor, "*_n d_out"]:
        return torch.stack([part.offset(x) for part in self.parts]).sum(dim=0)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        raise NotImplementedError("stitched dictionaries are not trained")


def stitched(base: SAE, *boosts: SAE) -> Stitched:
    """A base and the boosts trained on its error (several domains: several boosts) as one dictionary of the hook.

    All of rows as the model has them; x_hat is the base's plus what each boost adds.
    Source: Koriagin et al. 2025, "Teach Old SAEs New Domain Tricks with Boosting", arXiv:2507.12990, section 3.1.
    """
    return Stitched([base, *boosts])
