import numpy as np
import pytest

from autointerp.stats import auroc, balanced_accuracy


def test_balanced_accuracy_is_the_mean_of_both_rates():
    active = np.array([True] * 4 + [False] * 2)
    said = np.array([True, True, True, False, False, True])
    assert balanced_accuracy(said, active).value == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_who_always_says_the_same_gets_chance_whatever_the_mix():
    active = np.array([True] * 3 + [False] * 97)
    assert balanced_accuracy(np.zeros(100, dtype=bool), active).value == 0.5
    assert balanced_accuracy(np.ones(100, dtype=bool), active).value == 0.5


def test_auroc_by_hand_counts_a_tie_as_half():
    active = np.array([True, True, False, False])
    assert auroc(np.array([0.9, 0.5, 0.5, 0.1]), active).value == pytest.approx((1 + 1 + 0.5 + 1) / 4)


@pytest.mark.parametrize("measure", [balanced_accuracy, lambda said, active: auroc(said.astype(float), active)])
def test_a_perfect_score_has_an_interval_that_narrows_with_n_but_never_vanishes(measure):
    widths = []
    for n in (4, 16, 64):
        active = np.arange(2 * n) < n
        estimate = measure(active, active)
        assert estimate.value == estimate.hi == 1.0
        widths.append(estimate.hi - estimate.lo)
    assert 0.5 > widths[0] > widths[1] > widths[2] > 0.005


@pytest.mark.parametrize(("tpr", "fpr"), [(0.5, 0.5), (0.8, 0.3), (0.95, 0.02)])
def test_the_interval_holds_the_true_value_95_times_of_100(tpr, fpr):
    rng = np.random.default_rng(0)
    active, truth, held = np.arange(24) < 12, (tpr + 1 - fpr) / 2, 0
    for trial in range(300):
        said = rng.random(24) < np.where(active, tpr, fpr)
        estimate = balanced_accuracy(said, active, seed=trial)
        held += estimate.lo <= truth <= estimate.hi
    assert held >= 0.91 * 300


def test_one_class_alone_is_refused():
    with pytest.raises(ValueError, match="0 active of 5"):
        balanced_accuracy(np.ones(5, dtype=bool), np.zeros(5, dtype=bool))
