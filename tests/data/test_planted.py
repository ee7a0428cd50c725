"""Planted worlds: rows are what the recipe says, in every number that can be worked out beforehand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.planted import World, WorldConfig, build_world, frequencies, load_world, orthogonalised, plant
from data.vectors import read_vectors

SMALL = WorldConfig(n_features=60, d_in=16, n_trees=3, n_children=3, depth=2, max_prob=0.5, min_prob=0.05, rank=4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(n: int, **options: object) -> World:
    """n orthogonal features of size 2, each in half of the rows."""
    facts = {
        "directions": torch.eye(n),
        "bias": torch.zeros(n),
        "chance": torch.full((n,), 0.5),
        "size": torch.full((n,), 2.0),
        "spread": torch.zeros(n),
        "factors": torch.zeros(n, 1),
        "parent": torch.full((n,), -1),
        **options,
    }
    return World(**facts)  # type: ignore[arg-type]


def test_a_seed_says_the_world_and_its_rows():
    first, again = (build_world(SMALL).sample(100, generator(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(build_world(SMALL).sample(100, generator(6))[1], first[1])
    assert not torch.equal(build_world(replace(SMALL, seed=1)).directions, build_world(SMALL).directions)


def test_rows_are_the_sums_of_their_features():
    world = build_world(SMALL)
    x, z = world.sample(500, generator())
    torch.testing.assert_close(x, z @ world.directions + world.bias, atol=1e-4, rtol=1e-5)
    assert world.bias.norm() == pytest.approx(0.5)
    torch.testing.assert_close(world.directions.norm(dim=1), torch.ones(60))


def test_a_row_without_any_feature_is_the_bias():
    rare = plain(4, chance=torch.full((4,), 0.02), bias=torch.arange(4.0))
    x, z = rare.sample(200, generator())
    empty = (z == 0).all(dim=1)
    assert 100 < int(empty.sum()) < 200
    assert torch.equal(x[empty], torch.arange(4.0).expand(int(empty.sum()), 4))


def test_noise_is_added_to_every_dimension():
    x, z = plain(8, noise=0.3).sample(20_000, generator())
    torch.testing.assert_close((x - z).std(dim=0), torch.full((8,), 0.3), atol=0.01, rtol=0)


def test_frequencies_are_zipfs_between_the_two_given():
    config = WorldConfig(n_features=4, max_prob=0.4, min_prob=0.1, exponent=1.0, n_trees=0)
    # 1, 1/2, 1/3, 1/4 brought to 0.1 ... 0.4: each as far between as it is between 1/4 and 1.
    expected = [0.1 + 0.3 * (zipf - 0.25) / 0.75 for zipf in (1, 1 / 2, 1 / 3, 1 / 4)]
    assert frequencies(config).tolist() == pytest.approx(expected)
    even = WorldConfig(n_features=4, max_prob=0.3, min_prob=0.3, n_trees=0)
    assert frequencies(even).tolist() == pytest.approx([0.3] * 4)


def test_features_without_a_parent_fire_as_often_as_they_should():
    config = WorldConfig(n_features=40, d_in=8, n_trees=0, max_prob=0.5, min_prob=0.02, rank=4)
    n = 40_000
    _, z = build_world(config).sample(n, generator())
    wanted = frequencies(config)
    error = (z != 0).float().mean(dim=0) - wanted
    assert bool((error.abs() < 5 * (wanted * (1 - wanted) / n).sqrt()).all())


def test_trees_are_numbered_generation_by_generation():
    parent = build_world(WorldConfig(n_features=16, d_in=4, n_trees=2, n_children=2, depth=2, rank=0)).parent
    assert parent.tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, -1, -1]


def test_children_fire_only_with_their_parent_and_one_at_a_time():
    world = build_world(SMALL)
    on = world.sample(4000, generator())[1] != 0
    children = (world.parent >= 0).nonzero().squeeze(1)
    assert len(children) == 3 * (3 + 9)
    assert bool(on[:, children].any(dim=0).all()), "a child that never fires says nothing"
    assert not bool((on[:, children] & ~on[:, world.parent[children]]).any())
    siblings = torch.zeros(len(on), 60).index_add_(1, world.parent[children], on[:, children].float())
    assert siblings.max() == 1


def test_children_that_do_not_exclude_each_other_fire_together():
    world = plain(3, parent=torch.tensor([-1, 0, 0]), exclusive=False)
    on = world.sample(8000, generator())[1] != 0
    assert on.all(dim=1).float().mean().item() == pytest.approx(0.5**3, abs=0.02)


def test_exclusive_siblings_share_the_rows_in_which_several_were_drawn():
    on = plain(3, parent=torch.tensor([-1, 0, 0])).sample(20_000, generator())[1] != 0
    # Drawn alone in 1/8 of the rows, and the winner of two in half of another 1/8.
    assert on[:, 1:].float().mean(dim=0).tolist() == pytest.approx([3 / 16, 3 / 16], abs=0.015)


def test_a_childs_size_goes_with_its_parents():
    world = plain(3, parent=torch.tensor([-1, 0, 1]), spread=torch.tensor([0.4, 0.0, 0.0]))
    z = world.sample(2000, generator())[1]
    parent, child, grandchild = z[(z[:, 2] != 0)].T
    assert len(parent) > 100
    torch.testing.assert_close(child, 2.0 * parent / 2.0)
    torch.testing.assert_close(grandchild, child)
    fixed = plain(2, parent=torch.tensor([-1, 0]), spread=torch.tensor([0.4, 0.0]), scale_by_parent=False)
    z = fixed.sample(2000, generator())[1]
    assert set(z[:, 1].unique().tolist()) == {0.0, 2.0}


def test_correlated_features_fire_together_as_their_factors_say():
    n = 100_000
    world = plain(3, factors=torch.tensor([[0.6], [0.6], [-0.6]]))
    on = (world.sample(n, generator())[1] != 0).float()
    # Two Gaussians of correlation r are both above 0 in 1/4 + asin(r) / 2 pi of all cases.
    for i, j, r in ((0, 1, 0.36), (0, 2, -0.36)):
        assert (on[:, i] * on[:, j]).mean().item() == pytest.approx(0.25 + math.asin(r) / (2 * math.pi), abs=0.006)


def test_signs_are_even_and_leave_sizes_alone():
    z = plain(4, signed=True).sample(10_000, generator())[1]
    assert set(z.unique().tolist()) == {-2.0, 0.0, 2.0}
    assert (z[z != 0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_directions_are_moved_down_the_sum_of_their_squared_cosines():
    directions = torch.nn.functional.normalize(torch.randn(40, 12, generator=generator()), dim=1)
    expected = directions.clone().requires_grad_()
    optimizer = torch.optim.Adam([expected], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        products = expected @ expected.T
        own = products.diagonal()
        (products.square().sum() - own.square().sum() + 40 * (own - 1).square().sum()).backward()
        optimizer.step()
    expected = torch.nn.functional.normalize(expected.detach(), dim=1)
    found = orthogonalised(directions, steps=30, lr=1e-2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found @ found.T).square().sum() < 0.8 * (directions @ directions.T).square().sum()


def test_planted_rows_are_read_back_with_the_world_they_came_from(tmp_path):
    world = build_world(SMALL)
    plant(tmp_path / "w", world, 9000, seed=3)
    rows = np.concatenate(list(read_vectors(tmp_path / "w")))
    assert rows.shape == (9000, 16)
    again = load_world(tmp_path / "w")
    assert torch.equal(again.directions, world.directions)
    assert again.config == SMALL
    assert np.array_equal(rows, np.concatenate([x.numpy() for x, _ in again.batches(9000, 3)]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_features": 0}, "at least one feature"),
        ({"n_trees": 9000}, "no more trees than features"),
        ({"min_prob": 0.5}, "min_prob <= max_prob"),
        ({"n_children": 0}, "at least one child"),
        ({"rank": 50}, "below 0.5"),
    ],
)
def test_a_world_that_cannot_be_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as refused:
        WorldConfig(**wrong)
    assert "\n" not in str(refused.value)
