"""How well a yes/no answer tells windows where a feature is on from windows where it is off, with an interval.

Balanced accuracy is the mean of the two rates "right where on" and "right where off", so chance is 0.5 whatever the
mix. The surprise is at small n: an ordinary bootstrap of 8 right answers of 8 gives an interval of width 0. Here the
windows of each class get Dirichlet weights (the Bayesian bootstrap), and one pseudo-window of half a window's weight
that is right half of the time, so that the interval narrows with n and never vanishes.
Source: Rubin 1981, The Bayesian Bootstrap; for yes/no answers it is Jeffreys' interval for each of the two rates.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

CHANCE = 0.5
_DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval over windows."""

    value: float
    lo: float
    hi: float
    n: int
    """Windows it was computed on, both classes together."""


def balanced_accuracy(said: Bool[np.ndarray, " n"], active: Bool[np.ndarray, " n"], seed: int = 0) -> Estimate:
    """(share of `said` where active + share of `not said` where not active) / 2.

    said: the answers; active: the truth, one a window.
    Raises ValueError unless both classes occur: the number has no meaning then.
    """
    _need_both(active)
    rng = np.random.default_rng(seed)
    value, draws = 0.0, np.zeros(_DRAWS)
    for right in (said[active], ~said[~active]):
        value += right.mean() / 2
        draws += rng.beta(right.sum() + 0.5, (~right).sum() + 0.5, _DRAWS) / 2
    return _estimate(float(value), draws, len(active))


def auroc(score: Float[np.ndarray, " n"], active: Bool[np.ndarray, " n"], seed: int = 0) -> Estimate:
    """Probability that an active window has a higher `score` than one that is not; a tie counts half.

    Raises ValueError unless both classes occur.
    """
    _need_both(active)
    on, off = score[active][:, None], score[~active][None, :]
    above = np.where(on > off, 1.0, np.where(on == off, 0.5, 0.0))
    padded = np.pad(above, ((0, 1), (0, 1)), constant_values=0.5)
    rng = np.random.default_rng(seed)
    weight_on, weight_off = (rng.dirichlet([*[1.0] * n, 0.5], _DRAWS) for n in above.shape)
    return _estimate(float(above.mean()), np.einsum("dp,pn,dn->d", weight_on, padded, weight_off), len(active))


def _estimate(value: float, draws: Float[np.ndarray, " draws"], n: int) -> Estimate:
    lo, hi = np.quantile(draws, [0.025, 0.975])
    return Estimate(value=value, lo=min(float(lo), value), hi=max(float(hi), value), n=n)


def _need_both(active: Bool[np.ndarray, " n"]) -> None:
    if active.all() or not active.any():
        raise ValueError(f"got {int(active.sum())} active of {len(active)} windows: expected some of each class.")
