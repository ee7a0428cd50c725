"""GroupMax: the latents lie in k groups of neighbours, and each group keeps its largest latent.

    z_i = p_i if i is the first of largest p in its group and p_i > 0, else 0        p = (x - b_dec) W_enc + b_enc
    x_hat = z W_dec + b_dec        group g is the latents g d_sae / k to (g + 1) d_sae / k

A choice that needs no ranking: k maxima a row. Latents of a group exclude each other.
Loss: FVU of the batch + 1/32 AuxK, as TopK. Source: EleutherAI's sparsify, activation "groupmax". Differs: a group
without a positive latent has none, and AuxK is TopK's.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import ksparse
from sae.base import SAE, Config, ConfigError, Loss, State
from sae.ksparse import KSparseConfig
from sae.parallel import ALONE, Mesh


@dataclass(frozen=True, kw_only=True)
class GroupMaxConfig(KSparseConfig):
    """As TopK's; k is the number of groups, which d_sae must be a multiple of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_sae % self.k:
            raise ConfigError(
                f"d_sae={self.d_sae} makes no k={self.k} equal groups: take a multiple of {self.k} for d_sae."
            )


class GroupMaxSAE(SAE):
    architecture = "groupmax"
    cfg: GroupMaxConfig

    def __init__(self, cfg: Config, mesh: Mesh = ALONE) -> None:
        if mesh.n_latents > 1:
            raise ConfigError("groupmax cannot share its latents among processes: use --data-parallel N.")
        super().__init__(cfg, mesh)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        codes = ksparse.choose(self, ksparse.centred(self, x), self.cfg.k, None, None, group_max)
        return codes.values, codes.indices

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        """While k is annealed there are as many groups as the next divisor of d_sae above it."""
        dead = state.dead if self.cfg.auxk_weight else None
        k = next(k for k in range(state.k or self.cfg.k, self.d_sae + 1) if self.d_sae % k == 0)
        x = ksparse.centred(self, x)
        codes = ksparse.choose(self, x, k, dead, state.pre, group_max)
        return ksparse.loss_of(self, x, target, codes, dead, self.cfg.auxk_weight)


def group_max(pre: Float[Tensor, "n d_sae"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The largest entry above 0 of each of k groups of neighbours; 0 where there is none."""
    values, places = pre.unflatten(1, (k, -1)).max(dim=2)
    firsts = torch.arange(0, pre.shape[1], pre.shape[1] // k, device=pre.device)
    return values.relu().float(), places + firsts
