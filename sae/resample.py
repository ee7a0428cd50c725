"""Resampling: dead latents start anew at inputs that the dictionary reconstructs badly.

Each takes the direction of an input, drawn with probability proportional to the square of its squared error; its
encoder row (where it has one of its own) is that direction at a fifth of the living rows' mean norm, its bias 0, its
Adam moments 0.
Source: Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron resampling".
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base import SAE
from sae.optimizer import Optimizer

GAIN = 0.2


@torch.no_grad()
def resample(
    sae: SAE, optimizer: Optimizer, dead: Int[Tensor, " _m"], x: Float[Tensor, "n d_in"], generator: torch.Generator
) -> None:
    """Start the latents `dead` anew at rows of x (scaled, as in training). generator: on the CPU.

    On a mesh, `dead` and x are the parts that are here; all processes call this together.
    """
    mesh = sae.mesh
    counts = mesh.counts(len(dead))
    x = mesh.all_rows(x)
    errors = (x - sae.reconstruct(x)).square().sum(dim=1).square().double().cpu()
    errors = torch.nan_to_num(errors, posinf=0.0)  # where training went wrong, the loop says so at its next look
    drawn = torch.multinomial(errors + 1e-12, sum(counts), replacement=True, generator=generator)
    rows = x[drawn.split(counts)[mesh.latent].to(x.device)] - sae.b_dec
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-8)
    alive = torch.ones(sae.n_held, dtype=torch.bool, device=x.device)
    alive[dead] = False
    gain = x.new_zeros(())
    if sae.has_encoder_rows:
        norms = mesh.sum_latents((sae.W_enc.norm(dim=0) * alive).sum())
        gain = GAIN * norms / mesh.sum_latents(alive.sum()).clamp(min=1)
    sae.restart(dead, rows, gain)
    optimizer.forget(dead)
    optimizer.refresh()
