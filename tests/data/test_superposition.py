"""Simulated cells: each variable is what its formula says, and a seed says all."""

import pytest
import torch

from data.superposition import Superposition


def test_what_is_observed_is_made_by_the_programs_of_the_cells_type():
    world = Superposition(n_programs=6, n_observed=40, n_types=4, n_covariates=3, acts=0.3, has=0.5)
    acts, has = world.wiring
    cells = world.sample(500, seed=1)
    torch.testing.assert_close(cells.observed, cells.program @ acts)
    assert set(acts.unique().tolist()) == {0.0, 1.0}
    off = has[cells.type] == 0
    assert (cells.program[off] == 0).all()
    shift = (cells.program - cells.activity)[~off]
    covariate = cells.covariate[:, None].expand(-1, 6)[~off]
    for j in range(3):
        assert abs(float((shift[covariate == j] - j).mean())) < 0.02
        assert float((shift[covariate == j] - j).std()) == pytest.approx(0.1, rel=0.2)


def test_programs_types_and_wiring_are_as_frequent_as_asked():
    world = Superposition(n_programs=50, n_observed=400, seed=3)
    acts, has = world.wiring
    assert float(acts.mean()) == pytest.approx(0.1, abs=0.01)
    assert float(has.mean()) == pytest.approx(0.3, abs=0.04)
    cells = world.sample(4000, seed=0)
    rates = cells.activity.mean(dim=0)
    torch.testing.assert_close(rates, 1 + 0.1 * torch.arange(50), atol=0.25, rtol=0)
    assert cells.type.bincount().min() > 60


def test_the_seeds_say_the_world_and_the_cells():
    world = Superposition(n_programs=5, n_observed=20)
    first, again, other = world.sample(10, seed=1), world.sample(10, seed=1), world.sample(10, seed=2)
    assert torch.equal(first.observed, again.observed)
    assert not torch.equal(first.activity, other.activity)
    assert not torch.equal(world.wiring[0], Superposition(n_programs=5, n_observed=20, seed=1).wiring[0])
    with pytest.raises(ValueError, match="at least one program"):
        Superposition(n_types=0)
    with pytest.raises(ValueError, match="expected shares above 0"):
        Superposition(acts=0.0)
