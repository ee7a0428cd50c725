"""Dictionaries of attention outputs (hook_z, the heads of a row joined): which heads a latent reads and writes.

`heads` is how many heads a row joins: `cache.heads`, and in the metadata of a trained dictionary.
Source: Kissane et al. 2024, "Interpreting Attention Layer Outputs with Sparse Autoencoders", arXiv:2406.17759, 2.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from activations.errors import InputError
from sae.base import SAE


def heads_of(sae: SAE) -> int:
    """How many heads its rows join. Raises InputError for a dictionary of another hook."""
    heads = sae.metadata.get("heads")
    if not heads:
        raise InputError(f"{sae.hook or 'This hook'} has no heads: expected a dictionary of a hook_z.")
    return int(heads)


@torch.no_grad()
def head_attribution(sae: SAE, x: Float[Tensor, "n d_in"], latent: int, heads: int) -> Float[Tensor, "n heads"]:
    """What each head adds to the latent's pre-activation (direct feature attribution), b_dec taken from its own part.

    Summed over heads and with b_enc it is the pre-activation.
    """
    read = (x - sae.b_dec if sae.centres else x).unflatten(1, (heads, -1))
    return torch.einsum("nhd,hd->nh", read, sae.W_enc[:, latent].unflatten(0, (heads, -1)))


@torch.no_grad()
def head_shares(sae: SAE, heads: int) -> Float[Tensor, "d_sae heads"]:
    """Share of each head in the norm of each latent's decoder row; a row sums to 1."""
    norms = sae.W_dec.unflatten(1, (heads, -1)).norm(dim=2)
    return norms / norms.sum(dim=1, keepdim=True)
