"""One dictionary at several k: what TopK's Multi-TopK loss and MSAE share.

The codes of the largest k are chosen once and ranked, so that those of each smaller k are the first of them; what lies
between two ks is decoded once and belongs to all larger ones.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import ksparse, sparse
from sae.base import SAE, Loss, State
from sae.ksparse import Codes
from sae.losses import fvu
from sae.select import topk


def ranked(
    pre: Float[Tensor, "n _width"], k: int, signed: bool = False
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """As `topk`, the largest of each row first."""
    values, indices = topk(pre, k, signed)
    order = (values.abs() if signed else values).argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), indices.gather(1, order)


def loss(
    sae: SAE,
    x: Float[Tensor, "n d_in"],
    target: Float[Tensor, "n d_out"],
    state: State,
    ks: Sequence[int],
    weights: Sequence[float],
    auxk_weight: float,
) -> Loss:
    """The sum of weight * FVU of the k largest latents of each row, over `ks` (ascending), + auxk_weight * AuxK.

    AuxK is that of the first k, and so are the L0 and the latents that fired. weights: one for each k.
    """
    dead, mesh, centred = state.dead if auxk_weight else None, sae.mesh, ksparse.centred(sae, x)
    ks = [min(k, sae.n_held) for k in ks]
    select = partial(ranked, signed=sae.signed)
    codes = ksparse.choose(sae, centred, ks[-1], dead, state.pre, select)
    first = Codes(codes.values[:, : ks[0]].contiguous(), codes.indices[:, : ks[0]].contiguous(), codes.dead_z)
    with torch.autocast(x.device.type, enabled=False):
        x_hat, of_dead = ksparse.reconstruct(sae, centred, first, dead)
        error = x_hat - target
        fvus = [fvu(error, target, mesh)]
        aux = ksparse.auxk(sae, error, of_dead, dead)
        for k, more in zip(ks, ks[1:], strict=False):
            if more > k:
                block = Codes(codes.values[:, k:more].contiguous(), codes.indices[:, k:more].contiguous(), None)
                error = error + ksparse.reconstruct(sae, centred, block, None)[0] - sae.b_dec
            fvus.append(fvu(error, target, mesh))
        total = torch.stack([weight * each for weight, each in zip(weights, fvus, strict=True)]).sum()
        l0 = mesh.mean_rows(mesh.sum_latents((first.values != 0).sum() / len(x)))
    terms = {"fvu": fvus[0].detach(), "fvu_widest": fvus[-1].detach(), "auxk": aux.detach(), "l0": l0}
    return Loss(total + auxk_weight * aux, terms, sparse.fired(first.values, first.indices, sae.n_held))
