"""What the error is made of: how much of it a linear map of the activation predicts, and how much it does not.

e = x - x_hat is fitted by least squares from [x, 1] on half of the held-out documents and judged on the other half.
What is left is the nonlinear error: structure that no wider dictionary of the same kind is sure to find.
Source: Engels et al. 2024, arXiv:2410.14670.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from activations.cache import CachedActivations
from activations.errors import InputError
from sae.base import SAE
from sae.evals.metric import Metric
from sae.evals.reconstruction import evaluation_part, rows_of

MOST_ROWS = 150_000
FEWEST = 10
_RIDGE = 1e-8


@torch.no_grad()
def dark_matter(sae: SAE, cache: CachedActivations, *, n_rows: int = MOST_ROWS, batch: int = 4096) -> dict[str, Metric]:
    """R2 of the error and of its square from the activation, and FVU as linear + nonlinear part.

    n_rows: read of each half. Raises InputError where there are fewer rows to fit on than 10 for each dimension.
    """
    device, d = sae.W_dec.device, sae.d_in
    part = evaluation_part(cache)
    centre = cache.mean.to(device)
    docs = torch.cat([rows.docs.unique() for rows in rows_of(cache, part, batch)]).unique()

    def pieces(half: int) -> Iterator[tuple[Float[Tensor, "n d_and_1"], Float[Tensor, "n d_and_1"]]]:
        """([x - centre, 1], [e, |e|^2]) of every other document."""
        seen = 0
        for rows in rows_of(cache, part, batch):
            mine = torch.searchsorted(docs, rows.docs) % 2 == half
            x = rows.x[mine][: n_rows - seen].to(device, torch.float32)
            seen += len(x)
            error = x - sae.reconstruct(x) if len(x) else x
            ones = x.new_ones(len(x), 1)
            square = error.square().sum(dim=1, keepdim=True)
            yield torch.cat([x - centre, ones], dim=1).double(), torch.cat([error, square], dim=1).double()

    products = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=device)
    targets = torch.zeros_like(products)
    n = 0
    for x, y in pieces(0):
        products += x.T @ x
        targets += x.T @ y
        n += len(x)
    if n < FEWEST * d:
        raise InputError(
            f"dark_matter fits {d} numbers from {n:,} tokens of every other of {len(docs):,} {part} documents, "
            f"expected {FEWEST * d:,} tokens or more: collect more text."
        )
    products.diagonal().add_(_RIDGE * float(products.trace()) / (d + 1))
    fit = torch.linalg.solve(products, targets)
    left, total, total_square = (torch.zeros(d + 1, dtype=torch.float64, device=device) for _ in range(3))
    power, offset = torch.zeros_like(left), torch.zeros_like(left)
    n = 0
    for x, y in pieces(1):
        left += (y - x @ fit).square().sum(dim=0)
        total += y.sum(dim=0)
        total_square += y.square().sum(dim=0)
        power += x.square().sum(dim=0)
        offset += x.sum(dim=0)
        n += len(x)
    spread = total_square - total.square() / n
    variance = float((power - offset.square() / n)[:-1].sum())
    fvu, nonlinear = float(total_square[:-1].sum()) / variance, float(left[:-1].sum()) / variance
    of = f"ordinary tokens of every other of {len(docs):,} {part} documents"

    def metric(value: float, definition: str) -> Metric:
        return Metric(value=value, n=n, of=of, definition=definition)

    return {
        "dark_matter.linear_r2": metric(
            _r2(left[:-1].sum(), spread[:-1].sum()), "R2 of the error x - x_hat from a linear map of x"
        ),
        "dark_matter.norm_r2": metric(_r2(left[-1], spread[-1]), "R2 of |x - x_hat|^2 from a linear map of x"),
        "dark_matter.linear_fvu": metric(fvu - nonlinear, "FVU that a linear map of x would make good"),
        "dark_matter.nonlinear_fvu": metric(nonlinear, "FVU left after a linear map of x; linear + nonlinear = FVU"),
    }


def _r2(left: Tensor, spread: Tensor) -> float:
    """0 where there is nothing to explain."""
    return float(1 - left / spread) if float(spread) > 0 else 0.0
