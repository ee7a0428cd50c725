"""Choosing which latents stay: pure functions of pre-activations. None carries gradient (see
`sae.ksparse`); values come out in float32 whatever the precision of the product.

Among equal values the lowest index comes first; entries that are 0 (or below, of a TopK) are never chosen, their places
are left unused.
"""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sae import kernels
from sae.sparse import nonzero, starts_of, to_table

GROUP = 32
"""Neighbouring latents whose maximum is looked at first."""


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


def topk_dense(pre: Float[Tensor, "n m"], k: int, signed: bool = False) -> Float[Tensor, "n m"]:
    """Each row with all but its k largest entries above 0 (signed: by magnitude) set to 0; equals of the last stay."""
    if kernels.available(pre):
        from sae.kernels import select

        return select.topk_dense(pre, k, signed)
    size = pre.abs() if signed else pre
    least = size.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    return pre * ((size >= least) & (size > 0))


def _largest(x: Float[Tensor, "n m"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """`topk`. The k-th largest maximum of groups bounds the k-th largest entry from below, and few entries reach it."""
    n, m = x.shape
    groups = (pad(x, (0, -m % GROUP)) if m % GROUP else x).unflatten(1, (-1, GROUP))
    maxima = groups.amax(dim=2)
    bound = maxima.new_zeros(n, 1)
    if k <= maxima.shape[1]:
        bound = maxima.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    at = ((maxima >= bound) & (maxima > 0)).flatten().nonzero().squeeze(1)
    entries, row = groups.flatten(0, 1).index_select(0, at), at // maxima.shape[1]
    found = nonzero((entries >= bound.index_select(0, row)) & (entries > 0))
    group = found // GROUP
    columns = at.index_select(0, group) % maxima.shape[1] * GROUP + found % GROUP
    values, indices = to_table(
        entries.flatten().index_select(0, found),
        columns,
        starts_of(row.index_select(0, group), n),
        m,
        at_least=k,
    )
    if values.shape[1] == k:
        return values, indices
    least = values.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, equal = values > least, values == least
    keep = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
    return values.masked_select(keep).view(n, k), indices.masked_select(keep).view(n, k)
