"""One dictionary at several k: what TopK's Multi-TopK loss and MSAE share.

The codes of the largest k are chosen once and ranked, so that those of each smaller k are the first of them; what lies
between two ks is decoded once and belongs to all larger ones.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sae import ksparse, sparse
from sae.base import SAE, Loss, State
from sae.ksparse import Bags, Codes
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
    n, first = len(x), codes._replace(values=codes.values[:, : ks[0]], indices=codes.indices[:, : ks[0]])
    with torch.autocast(x.device.type, enabled=False):
        decoded, of_dead = ksparse.decode(sae, centred, _in_bags(codes, ks), dead)
        parts = decoded.view(n, len(ks), -1).unbind(dim=1)
        errors = list(accumulate(parts, initial=sae.b_dec - target))[1:]
        fvus = [fvu(error, target, mesh) for error in errors]
        aux = ksparse.auxk(sae, errors[0], of_dead, dead)
        total = torch.stack([weight * each for weight, each in zip(weights, fvus, strict=True)]).sum()
    l0 = ksparse.l0_of(sae, first, n)
    terms = {"fvu": fvus[0].detach(), "fvu_widest": fvus[-1].detach(), "auxk": aux.detach(), "l0": l0}
    return Loss(total + auxk_weight * aux, terms, sparse.fired(first.values, first.indices, sae.n_held))


def _in_bags(codes: Codes, ks: Sequence[int]) -> Codes:
    """The ranked codes of each row, those up to the first k in a bag, those from there to the next k in another."""
    (n, width), device = codes.values.shape, codes.values.device
    place, row = torch.arange(width, device=device), torch.arange(n, device=device)[:, None]
    level = torch.stack([place >= k for k in ks[:-1]] or [place < 0]).sum(dim=0)
    firsts = [row * width + k for k in (0, *ks[:-1])]
    starts = pad(torch.cat(firsts, dim=1).flatten(), (0, 1), value=n * width)
    bags = Bags(starts, (row * len(ks) + level).flatten(), row.expand(n, width).flatten())
    return Codes(codes.values.view(-1, 1), codes.indices.view(-1, 1), codes.dead_z, bags)
