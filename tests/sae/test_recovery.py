"""Recovered variables: correlations as numpy has them, and counts by hand."""

import numpy as np
import pytest
import torch

from sae.evals.recovery import correlation, recovery, redundant


def test_correlations_are_pearsons_and_0_for_what_does_not_vary():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((50, 4)).astype(np.float32), rng.standard_normal((50, 3)).astype(np.float32)
    a[:, 2] = 1e6
    r = correlation(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    for i in (0, 1, 3):
        for j in range(3):
            assert r[i, j] == pytest.approx(np.corrcoef(a[:, i], b[:, j])[0, 1], abs=1e-5)
    assert (r[2] == 0).all()


def test_a_variable_is_recovered_by_a_latent_of_either_sign():
    r = torch.tensor([[0.99, 0.2, 0.0], [0.96, -0.97, 0.5], [0.1, 0.0, -0.9]])
    found = {name: metric.value for name, metric in recovery(r, 10, name="x").items()}
    assert found == pytest.approx({"x.best": (0.99 + 0.97 + 0.9) / 3, "x.recovered": 2 / 3, "x.latents": 1.0})


def test_latents_that_repeat_an_earlier_one_are_counted_once_each():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    assert redundant(torch.cat([x, 2 * x[:, :1], x[:, :1] + 1e-3 * x[:, 1:2], -x[:, 2:]], dim=1)) == 2
