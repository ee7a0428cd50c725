"""A number with its definition: what eval.json is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import mean

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


def over_hooks(each: Mapping[str, Mapping[str, Metric]]) -> dict[str, Metric]:
    """The metrics of a dictionary that gives back several hooks, from those of each: the mean under the metric's name,
    and each under "NAME HOOK". Those of one hook stay as they are."""
    by_hook = list(each.values())
    if len(by_hook) == 1:
        return dict(by_hook[0])
    made = {}
    for name, first in by_hook[0].items():
        value = mean(metrics[name].value for metrics in by_hook)
        text = f"mean over {len(by_hook)} hooks of: {first.definition}"
        made[name] = replace(first, value=value, definition=text, lo=None, hi=None)
        made |= {f"{name} {hook}": metrics[name] for hook, metrics in each.items()}
    return made
