"""MSAE: a TopK dictionary that is trained at several k at once, to be used at any of them.

    z_j = TopK(ReLU((x - b_dec) W_enc + b_enc), k_j)        x_hat_j = z_j W_dec + b_dec        k_j = k, 2k, 4k, ...

Loss: sum_j w_j FVU(x_hat_j) / sum_j w_j + 1/32 AuxK of the first k. Nested in k, not in width (that is Matryoshka).
With `whole` the last k_j is d_sae: all positive latents, dense. `encode` keeps k latents, `encode_at` any number.
Source: arXiv:2502.20578. Differs: FVU in place of the mean of |e|^2 / |x|^2; d_sae among the k_j only if asked for,
since on planted rows that makes all smaller k worse; AuxK; no soft cap, as in the paper's own runs.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from sae import ksparse, nested
from sae.base import SAE, ConfigError, Loss, State
from sae.ksparse import KSparseConfig
from sae.losses import fvu

WEIGHTS = ("uniform", "reverse")


@dataclass(frozen=True, kw_only=True)
class MSAEConfig(KSparseConfig):
    levels: int = 4
    """How many k are trained at most, the first k itself and each twice the last; those of d_sae and above are not."""
    whole: bool = False
    """Whether all latents together are one more level."""
    weights: str = "reverse"
    """Of n levels: "reverse", n for k, n - 1 for 2k, ..., 1 for the last; or "uniform"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels < 1:
            raise ConfigError(f"levels={self.levels} is out of range: expected at least 1, such as 4.")
        if self.weights not in WEIGHTS:
            raise ConfigError(f"weights={self.weights!r} is unknown: expected one of {', '.join(WEIGHTS)}.")


class MSAE(SAE):
    architecture = "msae"
    cfg: MSAEConfig

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return self.encode_at(x, self.cfg.k)

    def encode_at(self, x: Float[Tensor, "n d_in"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """As `encode_sparse`, with k latents a row, 1 to d_sae."""
        return ksparse.encode(self, x, k)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        k, cfg = state.k or self.cfg.k, self.cfg
        ks = [k] + [k << level for level in range(1, cfg.levels) if k << level < self.d_sae]
        n = len(ks) + cfg.whole
        weights = [float(n - level) if cfg.weights == "reverse" else 1.0 for level in range(n)]
        weights = [weight / sum(weights) for weight in weights]
        made = nested.loss(self, x, target, state, ks, weights[: len(ks)], cfg.auxk_weight)
        if not cfg.whole:
            return made
        z = ((x - self.mesh.into_latents(self.b_dec)) @ self.W_enc + self.b_enc).relu()
        x_hat = self.mesh.sum_latents((z @ self.W_dec).float()) + self.b_dec
        last = fvu(x_hat - target, target, self.mesh)
        return made._replace(total=made.total + weights[-1] * last, terms=made.terms | {"fvu_widest": last.detach()})
