"""Dictionaries that do not centre x by b_dec: how they start, and how scales of single columns are taken out again."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sae.base import SAE

AT_ONCE = 4096
"""Latents whose activations on the sample are made at once."""


@torch.no_grad()
def start_encoder(sae: SAE, x: Float[Tensor, "n d_in"], seed: int) -> None:
    """Random unit columns; b_enc = -mean(x) W_enc, so that pre-activations are centred."""
    sae.draw_encoder(seed)
    sae.b_enc.copy_(-(x.mean(dim=0) @ sae.W_enc))


@torch.no_grad()
def start_decoder(sae: SAE, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"]) -> None:
    """Row i is the direction in which the target is off its mean where latent i is on (of a sample); b_dec that mean.

    A random row would have to be unlearned: the target's directions are not those of x.
    """
    mean = target.mean(dim=0)
    for first in range(0, sae.n_held, AT_ONCE):
        part = slice(first, first + AT_ONCE)
        z = torch.relu(x @ sae.W_enc[:, part] + sae.b_enc[part])
        sae.W_dec[part] = normalize(z.T @ (target - mean), dim=1)
    sae.b_dec.copy_(mean)


@torch.no_grad()
def unscale_columns(
    sae: SAE, reads: Float[Tensor, " d_in"], writes: Float[Tensor, " d_out"]
) -> Float[Tensor, " _held"]:
    """Turn a dictionary of (reads * x) that gives writes * y into one of x that gives y, decoder rows of norm 1.

    Returns what each latent was multiplied by: choices among latents have to be divided by it.
    """
    sae.W_enc.mul_(reads[:, None])
    sae.W_dec.div_(writes)
    norms = sae.W_dec.norm(dim=1)
    sae.W_dec.div_(norms[:, None])
    sae.W_enc.mul_(norms)
    sae.b_enc.mul_(norms)
    sae.b_dec.div_(writes)
    return norms


def norms_at_hooks(W_dec: Float[Tensor, "d_sae d_out"], widths: tuple[int, ...]) -> Float[Tensor, "d_sae n_hooks"]:
    """The norm of each latent's decoder row at each of the hooks that it is the rows of, side by side."""
    return torch.stack([part.norm(dim=1) for part in W_dec.split(list(widths), dim=1)], dim=1)
