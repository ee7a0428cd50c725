"""Parts of losses: pure functions, each with its paper."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sae import sparse
from sae.base import SAE, Dead
from sae.parallel import ALONE, Mesh, Selection


def fvu(error: Float[Tensor, "n d"], target: Float[Tensor, "n d"], mesh: Mesh = ALONE) -> Float[Tensor, ""]:
    """Squared error over the squared distance of the target from its batch mean: near 1 at the start.

    Of the whole batch, of which the mesh may have a part of the rows here.
    """
    return mesh.sum_rows(error.square().sum()) / _spread(target, mesh)


def _spread(x: Float[Tensor, "n d"], mesh: Mesh) -> Float[Tensor, ""]:
    """Squared distance from the batch mean."""
    return mesh.sum_rows((x - mesh.mean_rows(x.mean(dim=0))).square().sum())


def auxk(
    sae: SAE,
    error: Float[Tensor, "n d"],
    pre: Float[Tensor, "n d_sae"],
    x: Float[Tensor, "n d"],
    dead: Dead,
    select: Selection,
) -> Float[Tensor, ""]:
    """AuxK: dead latents learn to reconstruct what the living ones left over, `error` (target - x_hat, no gradient).

    The d_in / 2 strongest dead latents of each row are decoded without b_dec; the squared error is relative to the
    variance of `error` and weighed by the share of those places that dead latents can fill. Encoder rows of the dead
    get gradient too. A result that is not finite counts as 0.
    Source: Gao et al. 2024, arXiv:2406.04093, section A.2.
    """
    left_over = error.detach()
    n_places = 1 << round(math.log2(max(sae.d_in / 2, 1)))
    k = min(n_places, sae.mesh.n_latents * len(dead.latents))
    mask = torch.ones(sae.n_held, dtype=torch.bool, device=pre.device).index_fill(0, dead.latents[dead.real], False)
    chosen, indices = sae.mesh.select(select, pre.masked_fill(mask, 0.0), k)
    values = sparse.selected(chosen, indices, x, sae.W_enc, sae.b_enc, sae.mesh.into_latents(sae.b_dec))
    revived = sae.mesh.sum_latents(sparse.decode(values, indices, sae.W_dec))
    missed = sae.mesh.sum_rows((left_over - revived).square().sum())
    return torch.nan_to_num(missed / _spread(left_over, sae.mesh), nan=0.0, posinf=0.0) * (dead.n / n_places).clamp(
        max=1.0
    )
