"""The order: seeded, every training row once an epoch, and any point reached from a count alone."""

import itertools

import pytest
import torch

from activations.shuffle import Shuffled
from tests.tiny import HOOK, planted_run


@pytest.fixture
def cache(tmp_path):
    rows = torch.arange(3000 // 16 * 16).float()[:, None].expand(-1, 4).contiguous()
    return planted_run(tmp_path / "run", rows).activations(HOOK)


def take(shuffled: Shuffled, n: int, served: int = 0) -> list[torch.Tensor]:
    return list(itertools.islice(shuffled.batches(served), n))


@pytest.mark.parametrize("budget", [1 << 30, 20_000])
def test_each_training_row_once_an_epoch_across_windows(cache, budget):
    n = cache.n_training
    batches = take(Shuffled(cache, batch=100, seed=0, budget=budget), 2 * n // 100 + 1)
    stream = torch.cat(batches)[:, 0].long()
    expected = torch.cat([cache.rows(i)[cache.training_mask(i)][:, 0] for i in range(cache.n_shards)]).long()
    first, second = stream[:n], stream[n : 2 * n]
    assert torch.equal(first.sort().values, expected.sort().values)
    assert torch.equal(second.sort().values, expected.sort().values)
    assert not torch.equal(first, second)
    assert (first.diff().abs() == 1).float().mean() < 0.05  # neighbours in the text are no neighbours here


@pytest.mark.parametrize("budget", [1 << 30, 20_000])
def test_any_point_is_reached_from_the_count_of_batches(cache, budget):
    whole = take(Shuffled(cache, batch=130, seed=3, budget=budget), 50)
    for served in range(0, 50, 7):
        rest = take(Shuffled(cache, batch=130, seed=3, budget=budget), 50 - served, served)
        assert all(torch.equal(a, b) for a, b in zip(whole[served:], rest, strict=True))


def test_the_seed_decides(cache):
    a, b = (take(Shuffled(cache, batch=64, seed=seed), 1)[0] for seed in (0, 1))
    assert not torch.equal(a, b)
