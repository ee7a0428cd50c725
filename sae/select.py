"""Choosing which latents stay: pure functions of pre-activations. None carries gradient (see
`sae.ksparse`); values come out in float32 whatever the precision of the product.

Among equal values the lowest index comes first. Entries that are 0 (a TopK's: or below) are never chosen: their places
stay unused.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sae import kernels
from sae.dense import pieces
from sae.sparse import Ragged, at_places, nonzero, to_table

GROUP = 32
"""Neighbouring latents of which the maximum is looked at first."""


def topk(
    pre: Float[Tensor, "n d_sae"], k: int, signed: bool = False
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest of each row that are above 0 (signed: by magnitude, with their sign), indices ascending."""
    if kernels.available(pre):
        from sae.kernels import select

        return select.topk(pre, k, signed)
    if not signed:
        return _largest(pre.float(), k)
    values, indices = _largest(pre.abs().float(), k)
    return values.copysign(pre.gather(1, indices).float()), indices


def topk_dense(
    pre: Float[Tensor, "n d_sae"],
    k: int,
    signed: bool,
    columns: Int[Tensor, " m"],
    real: Bool[Tensor, " m"],
) -> Float[Tensor, "n m"]:
    """The columns of pre that are named, all but the k largest entries above 0 of a row (signed: by magnitude) set to
    0; equals of the last stay. Columns that are not `real` are 0."""
    if kernels.available(pre):
        from sae.kernels import select

        return select.topk_dense(pre, k, signed, columns, real)
    x = pre.index_select(1, columns).mul_(real)
    size = x.abs() if signed else x.relu_()
    if k == len(columns):
        return x
    return x.masked_fill_(size < size.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True), 0.0)


def largest_of_batch(sizes: Float[Tensor, "n k"], m: int) -> tuple[Bool[Tensor, "n k"], Float[Tensor, ""]]:
    """(which are the m largest of all sizes, never one that is 0; the smallest of them, infinite if there is none).

    Of equals the first rows', then the first places'. Waits for nothing.
    """
    flat = sizes.flatten()
    least = flat.topk(m, sorted=False).values.amin()
    above, equal = flat > least, flat == least
    kept = (above | (equal & (equal.cumsum(dim=0) <= m - above.sum()))) & (flat > 0)
    return kept.view(sizes.shape), flat.masked_fill(~kept, torch.inf).amin()


def above(
    x: Float[Tensor, "n d"],
    W_enc: Float[Tensor, "d d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    least: Float[Tensor, " d_sae"] | float = 0.0,
    signed: bool = False,
) -> Ragged:
    """The entries of x W_enc + b_enc above `least` (signed: in magnitude)."""
    values, places, first = [], [], 0
    for pre in pieces(x, W_enc.T, b_enc):
        found = nonzero((pre.abs() if signed else pre) > least)
        values.append(pre.flatten().index_select(0, found).float())
        places.append(found + first)
        first += pre.numel()
    return at_places(torch.cat(places), torch.cat(values), (len(x), len(b_enc)))


def _largest(x: Float[Tensor, "n m"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """As `topk`. The k-th largest maximum of groups bounds the k-th largest entry from below, and few entries reach it,
    so that no more than the maxima need to be ranked."""
    n, m = x.shape
    groups = (pad(x, (0, -m % GROUP)) if m % GROUP else x).unflatten(1, (-1, GROUP))
    maxima = groups.amax(dim=2)
    n_groups = maxima.shape[1]
    bound = maxima.new_full((n, 1), torch.finfo(x.dtype).tiny)  # above 0
    if k <= n_groups:
        bound = torch.maximum(bound, maxima.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True))
    group = nonzero(maxima >= bound)
    members = groups.flatten(0, 1).index_select(0, group)
    found = nonzero(members >= bound.index_select(0, group // n_groups))
    places = (group * GROUP).index_select(0, found // GROUP) + found % GROUP
    chosen = at_places(places, members.flatten().index_select(0, found), (n, n_groups * GROUP))
    values, indices = to_table(chosen, m, at_least=k)
    if values.shape[1] == k:
        return values, indices
    least = values.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, equal = values > least, values == least
    kept = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
    return values.masked_select(kept).view(n, k), indices.masked_select(kept).view(n, k)
