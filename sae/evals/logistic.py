"""Logistic regression with an L2 penalty, by Newton's method, its strength chosen by cross-validation.

    minimise over w, b:   sum_i w_i log(1 + exp(-y_i (x_i . w + b))) + |w|^2 / (2 C),   y = +-1

Columns are scaled to standard deviation 1 and mean 0 first, so one grid of C fits all. Fitted for several weightings of
the same rows at once (the folds: a weight of 0 leaves a row out), from a small C to a large one, each from the last.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import softplus

STRENGTHS = tuple(10.0**power for power in range(-4, 3))
FOLDS = 5
_STEPS = (1.0, 0.5, 0.25, 0.125, 0.03125)
_MOST_ROUNDS, _TOLERANCE = 30, 1e-6


class Probe(NamedTuple):
    """score(x) = (x - mean) / spread . w + b; positive: class 1."""

    w: Float[Tensor, " d"]
    b: Float[Tensor, ""]
    mean: Float[Tensor, " d"]
    spread: Float[Tensor, " d"]

    def score(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return (x.double() - self.mean) / self.spread @ self.w + self.b

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """What a row is multiplied by, in the rows' own units; not of norm 1."""
        return (self.w / self.spread).float()


def fit_probe(
    x: Float[Tensor, "n d"],
    classes: Bool[np.ndarray, " n"],
    *,
    strengths: Sequence[float] = STRENGTHS,
    balanced: bool = False,
    seed: int = 0,
) -> Probe:
    """Fit to all rows, C chosen among `strengths` by the mean AUC over stratified folds (equal ones: the smallest).

    balanced: classes count the same, however many rows each has. Both classes must have a row.
    """
    x = x.double()
    mean, spread = x.mean(dim=0), x.std(dim=0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    x = (x - mean) / spread
    y = torch.as_tensor(classes, device=x.device).double()
    weight = torch.ones_like(y)
    if balanced:
        weight = torch.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    fold = torch.as_tensor(folds_of(classes, seed), device=x.device)
    training = weight * (fold[None] != torch.arange(FOLDS, device=x.device)[:, None])
    parameters = x.new_zeros(FOLDS, x.shape[1] + 1)
    best, chosen = -np.inf, strengths[0]
    for strength in strengths if len(strengths) > 1 else ():
        parameters = newton(x, y, training, strength, parameters)
        scores = (x @ parameters[:, :-1].T + parameters[:, -1]).cpu().numpy()
        held = [fold.cpu().numpy() == i for i in range(FOLDS)]
        each = [
            auc(scores[rows, i], classes[rows]) for i, rows in enumerate(held) if 0 < classes[rows].sum() < rows.sum()
        ]
        if each and float(np.mean(each)) > best + 1e-9:
            best, chosen = float(np.mean(each)), strength
    whole = newton(x, y, weight[None], chosen, x.new_zeros(1, x.shape[1] + 1))[0]
    return Probe(whole[:-1], whole[-1], mean, spread)


def newton(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    weights: Float[Tensor, "fits n"],
    strength: float,
    start: Float[Tensor, "fits d_and_1"],
) -> Float[Tensor, "fits d_and_1"]:
    """(w, b) of each weighting of the rows; of several step lengths the best is taken, so that no step is uphill."""
    parameters, penalty = start, torch.full((start.shape[1],), 1 / strength, dtype=x.dtype, device=x.device)
    penalty[-1] = 1e-9  # none on b; a fit without rows stays solvable
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    sizes = torch.tensor([0.0, *_STEPS], dtype=x.dtype, device=x.device)

    def objective(at: Float[Tensor, "tries fits d_and_1"]) -> Float[Tensor, "tries fits"]:
        scores = at @ x.T
        return ((softplus(scores) - y * scores) * weights).sum(dim=2) + (penalty * at.square()).sum(dim=2) / 2

    for _ in range(_MOST_ROUNDS):
        p = torch.sigmoid(parameters @ x.T)
        gradient = ((p - y) * weights) @ x + penalty * parameters
        curvature = (p * (1 - p)).clamp(min=1e-9) * weights
        hessians = torch.stack([(x * each[:, None]).T @ x for each in curvature]) + torch.diag(penalty)
        step = torch.linalg.solve(hessians, gradient)
        tries = parameters - sizes[:, None, None] * step
        values = objective(tries)
        least = values.argmin(dim=0)
        parameters = tries[least, torch.arange(len(least), device=least.device)]
        gain = values[0] - values.amin(dim=0)
        if bool((gain <= _TOLERANCE * values[0].abs().clamp(min=1.0)).all()):
            break
    return parameters


def folds_of(classes: Bool[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " n"]:
    """A number of a fold for each row; every fold has its share of both classes."""
    fold, rng = np.zeros(len(classes), dtype=np.int64), np.random.default_rng(seed)
    for is_one in (False, True):
        rows = rng.permutation(np.flatnonzero(classes == is_one))
        fold[rows] = np.arange(len(rows)) % FOLDS
    return fold


def auc(scores: Float[np.ndarray, " n"], classes: Bool[np.ndarray, " n"]) -> float:
    """Area under the ROC curve: the chance that a row of class 1 scores above one of class 0, equals counting half."""
    n_ones = int(classes.sum())
    n_zeros = len(classes) - n_ones
    return float((rankdata(scores)[classes].sum() - n_ones * (n_ones + 1) / 2) / (n_ones * n_zeros))


def f1(predicted: Bool[np.ndarray, " n"], classes: Bool[np.ndarray, " n"]) -> float:
    """Harmonic mean of precision and recall; 0 when nothing is predicted rightly."""
    return float(2 * (predicted & classes).sum() / max(predicted.sum() + classes.sum(), 1))
