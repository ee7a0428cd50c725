"""How well single latents follow variables that are known to have made the rows, such as those of a simulation.

A variable is recovered when a latent correlates with it by more than 0.95, by size (Pearson, over rows).
Source: Schuster 2024, arXiv:2410.11468. Differs: classes are compared one by one (is it this class?), not as numbers.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.evals.metric import Metric, mean_of

RECOVERED = 0.95


def correlation(a: Float[Tensor, "n a"], b: Float[Tensor, "n b"]) -> Float[Tensor, "a b"]:
    """Pearson's of each column of a with each of b; 0 for a column that is the same on all rows."""
    return _standard(a).T @ _standard(b)


def recovery(r: Float[Tensor, "latents variables"], n_rows: int, *, name: str, seed: int = 0) -> dict[str, Metric]:
    """`NAME.best`, `NAME.recovered` and `NAME.latents` from the correlations of latents with the variables.

    seed: of the intervals, over variables.
    """
    size = r.abs()
    best = size.amax(dim=0).cpu().double().numpy()
    follow = (size > RECOVERED).sum(dim=0).cpu().double().numpy()
    of = f"variables, over {n_rows:,} rows"

    def mean(each: np.ndarray, definition: str) -> Metric:
        return mean_of(each, of=of, definition=definition, seed=seed)

    return {
        f"{name}.best": mean(best, "|correlation| of the variable with the latent that follows it best, mean"),
        f"{name}.recovered": mean(
            (best > RECOVERED).astype(float), f"share of the variables with a latent at |correlation| > {RECOVERED}"
        ),
        f"{name}.latents": mean(follow, f"latents at |correlation| > {RECOVERED} with a variable, mean"),
    }


def redundant(codes: Float[Tensor, "n latents"]) -> int:
    """Latents that correlate by more than 0.95 with one of a smaller number."""
    r = correlation(codes, codes).triu_(diagonal=1)
    return int((r > RECOVERED).any(dim=0).sum())


def _standard(x: Tensor) -> Tensor:
    """Columns of mean 0 and norm 1, so that products are correlations; what does not vary becomes 0."""
    centred = x.double() - x.double().mean(dim=0)
    norm = centred.norm(dim=0)
    varies = norm > 1e-9 * x.double().norm(dim=0).clamp(min=1e-30)
    return torch.where(varies, centred / norm.clamp(min=1e-300), 0.0).float()
