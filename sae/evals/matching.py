"""One-to-one matching of two sets of rows: the pairs whose similarities sum to the most.

Up to 16,384 rows the best sum (Hungarian, scipy); above, greedily: of each row its 32 nearest are looked at, and the
most similar pair whose ends are both free is taken, again and again. Rows without a free near one stay alone.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

EXACT = 16_384
NEAREST = 32
_CHUNK = 1024


def match(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], *, signed: bool, exact: int = EXACT
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """(partner, similarity) of each row of a: the row of b, -1 for none; the product, by size where `signed`.

    a, b: rows of norm 1, for cosines. exact: up to so many rows on either side the Hungarian method is used.
    """
    partner = np.full(len(a), -1)
    if max(len(a), len(b)) <= exact:
        products = torch.cat([similar(rows, b, signed) for rows in a.split(_CHUNK)]).cpu().numpy()
        rows, columns = linear_sum_assignment(products, maximize=True)
        partner[rows] = columns
    else:
        _greedy(a, b, signed, partner)
    found = partner >= 0
    similarity = np.zeros(len(a), dtype=np.float32)
    mine, theirs = a[torch.as_tensor(found, device=a.device)], b[torch.as_tensor(partner[found], device=b.device)]
    each = (mine * theirs).sum(dim=1).cpu().numpy()
    similarity[found] = np.abs(each) if signed else each
    return partner, similarity


def similar(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], signed: bool) -> Float[Tensor, "n m"]:
    """The products of rows, by size where `signed`."""
    return (a @ b.T).abs_() if signed else a @ b.T


def nearest(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], signed: bool) -> Float[Tensor, " n"]:
    """The similarity of each row of a with the row of b that is nearest to it."""
    return torch.cat([similar(rows, b, signed).amax(dim=1) for rows in a.split(_CHUNK)])


def _greedy(a: Tensor, b: Tensor, signed: bool, partner: np.ndarray) -> None:
    """Fills `partner` in."""
    each = [similar(rows, b, signed).topk(min(NEAREST, len(b)), dim=1) for rows in a.split(_CHUNK)]
    values = torch.cat([found.values for found in each]).flatten()
    columns = torch.cat([found.indices for found in each])
    order = values.argsort(descending=True, stable=True).cpu().numpy()
    rows, places = order // columns.shape[1], columns.flatten().cpu().numpy()[order]
    free = np.ones(len(b), dtype=bool)
    for row, column in zip(rows, places, strict=True):
        if free[column] and partner[row] < 0:
            partner[row], free[column] = column, False
