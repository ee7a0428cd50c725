"""Structured (experimental): TopK whose latents are pulled towards varying together, in few directions.

    z, x_hat as TopK        Loss: FVU + 1/32 AuxK + nuclear_weight * |Z|_* / (sqrt(n) |Z|_F),  Z = z - its mean

Z is the first `ROWS` rows of the batch. The squares of its singular values are the eigenvalues of the latents' batch
covariance; their sum over the root of their sum of squares is smallest when there are few: a low-rank surrogate that
does not shrink z. It lies between 1 / sqrt(n) (rank 1) and 1.
Source: after arXiv:2503.08980 (its third version), which asks for dependence among latents beside sparsity; what it
does for that is not given, so the surrogate and its weight are ours, and nothing shows yet that it helps.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import ksparse
from sae.base import SAE, ConfigError, Loss, State
from sae.ksparse import KSparseConfig
from sae.parallel import ALONE, Mesh
from sae.sparse import to_dense

ROWS = 128
"""Rows of a batch that the penalty looks at."""
_STEPS, _FLOOR = 20, 1e-6
"""Newton-Schulz steps, and what is added to eigenvalues, which are near 0 to 1 then."""


@dataclass(frozen=True, kw_only=True)
class StructuredConfig(KSparseConfig):
    nuclear_weight: float = 0.1
    """Weight of the penalty; 0 makes it TopK."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.nuclear_weight >= 0:
            raise ConfigError(f"nuclear_weight={self.nuclear_weight}: expected 0 (off) or above.")


class StructuredSAE(SAE):
    architecture = "structured"
    cfg: StructuredConfig

    def __init__(self, cfg: StructuredConfig, mesh: Mesh = ALONE) -> None:
        if mesh.n_latents > 1:
            raise ConfigError("structured cannot share its latents among processes: use --data-parallel N.")
        super().__init__(cfg, mesh)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return ksparse.encode(self, x, self.cfg.k)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        k = state.k or self.cfg.k
        made = ksparse.loss(self, x, target, state, k, self.cfg.auxk_weight)
        with torch.autocast(x.device.type, enabled=False):
            penalty = self.mesh.mean_rows(spread(self._some_latents(x[:ROWS], k)))
        terms = {**made.terms, "spread": penalty.detach()}
        return Loss(made.total + self.cfg.nuclear_weight * penalty, terms, made.fired)

    def _some_latents(self, x: Float[Tensor, "n d_in"], k: int) -> Float[Tensor, "n d_sae"]:
        """z of a few rows, dense, with gradient through the chosen entries."""
        values, indices = ksparse.encode(self, x, k)
        pre = torch.einsum("nd,nkd->nk", x - self.b_dec, self.W_enc.T[indices]) + self.b_enc[indices]
        return to_dense(pre * (values != 0), indices, self.d_sae)


def spread(z: Float[Tensor, "n d_sae"]) -> Float[Tensor, ""]:
    """|Z|_* / (sqrt(n) |Z|_F) of z less its mean: 1 where all singular values are equal. 0 where z does not vary.

    The gradient of |Z|_* = tr (Z Z^T)^(1/2) is (Z Z^T)^(-1/2) Z. The root is found by products alone, so that a GPU
    need not be waited for.
    """
    z = z - z.mean(dim=0)
    size = torch.linalg.vector_norm(z).clamp(min=1e-12)
    with torch.no_grad():
        same = torch.eye(len(z), device=z.device)
        gram = z @ z.T / size.square()
        root, inverse = gram + _FLOOR * same, same
        for _ in range(_STEPS):
            turn = 1.5 * same - 0.5 * inverse @ root
            root, inverse = root @ turn, turn @ inverse
        slope = inverse @ z / size
    return (slope * z).sum() / size / len(z) ** 0.5
