"""A number with its definition: what eval.json is made of."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Metric:
    value: float
    n: int
    """How many units (see `of`) the value was taken over."""
    of: str
    """What n counts."""
    definition: str
    lo: float | None = None
    hi: float | None = None
    """95 % interval, where the value is an estimate."""
    seed: int | None = None
    """Of what was drawn at random; None where nothing was."""


def bootstrap(n: int, value: Callable[[np.ndarray], float], seed: int) -> tuple[float, float]:
    """95 % interval of `value` over n units: quantiles over 1,000 draws with replacement.

    value: from the numbers of the units drawn.
    """
    rng = np.random.default_rng(seed)
    again = [value(rng.integers(n, size=n)) for _ in range(RESAMPLES)]
    lo, hi = np.nanquantile(again, [0.025, 0.975])
    return float(lo), float(hi)


def mean_of(each: np.ndarray, *, of: str, definition: str, seed: int) -> Metric:
    """The mean over units, with its bootstrap interval."""
    lo, hi = bootstrap(len(each), lambda drawn: float(each[drawn].mean()), seed)
    return Metric(value=float(each.mean()), n=len(each), of=of, definition=definition, lo=lo, hi=hi, seed=seed)
