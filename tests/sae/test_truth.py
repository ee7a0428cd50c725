"""Metrics against ground truth: equal to a second, slow implementation, and to cases counted by hand."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.planted import WorldConfig, build_world
from sae.evals.truth import match, truth


def codec(W_dec, encode):
    return SimpleNamespace(W_dec=W_dec, encode=encode, decode=lambda z: z @ W_dec)


def values(found) -> dict[str, float]:
    return {name.removeprefix("truth."): metric.value for name, metric in found.items()}


def naive(sae, directions, x, z) -> dict[str, float]:
    """The definitions one by one, in loops."""
    W, D = sae.W_dec.double().numpy(), directions.double().numpy()
    cosines = np.abs((W / np.linalg.norm(W, axis=1)[:, None]) @ (D / np.linalg.norm(D, axis=1)[:, None]).T)
    codes = sae.encode(x)
    x_hat = sae.decode(codes).double().numpy()
    fires, on, x = (codes != 0).numpy(), (z != 0).numpy(), x.double().numpy()
    precision, recall, f1, nearest = [], [], [], []
    for i in range(len(W)):
        feature = max(range(len(D)), key=lambda j: cosines[i, j])
        nearest.append(feature)
        right = sum(a and b for a, b in zip(fires[:, i], on[:, feature], strict=True))
        p = right / fires[:, i].sum() if fires[:, i].any() else 0.0
        r = right / on[:, feature].sum() if on[:, feature].any() else 0.0
        precision.append(p)
        recall.append(r)
        f1.append(2 * p * r / (p + r) if p + r else 0.0)
    pairings = itertools.permutations(range(len(D)), len(W))
    return {
        "f1": np.mean(f1),
        "precision": np.mean(precision),
        "recall": np.mean(recall),
        "mcc": max(np.mean([cosines[i, j] for i, j in enumerate(pairing)]) for pairing in pairings),
        "uniqueness": len(set(nearest)) / len(W),
        "dead": np.mean([not column.any() for column in fires.T]),
        "l0": np.mean([row.sum() for row in fires]),
        "true_l0": np.mean([row.sum() for row in on]),
        "ev": 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum(),
        "shrinkage": np.mean([np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x_hat, x, strict=True)]),
    }


@pytest.mark.parametrize("signed", [False, True])
def test_every_metric_is_its_definition(signed):
    world = build_world(
        WorldConfig(
            n_features=7, d_in=4, max_prob=0.4, min_prob=0.1, n_trees=0, rank=2, signed=signed, seed=1, noise=0.1
        )
    )
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(5, 4, generator=generator)

    def encode(x):
        z = x @ W_dec.T
        z = z * (z.abs() > 2) if signed else z * (z > 2)
        return z * (torch.arange(5) != 3)  # one is dead

    sae = codec(W_dec, encode)
    batches = [world.sample(100, generator) for _ in range(4)]
    x, z = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found = values(truth(sae, world.directions, batches))
    expected = naive(sae, world.directions, x, z)
    assert expected["dead"] == 0.2
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_true_dictionary_with_the_true_codes_is_perfect():
    world = build_world(WorldConfig(n_features=60, d_in=16, n_trees=3, depth=2, max_prob=0.5, min_prob=0.05, bias=0.0))
    x, z = world.sample(2000, torch.Generator().manual_seed(0))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    sign = torch.where(torch.arange(60) % 2 == 0, 1.0, -1.0)
    W_dec = world.directions[order] * sign[:, None]
    found = values(truth(codec(W_dec, lambda _: z[:, order] * sign), world.directions, [(x, z)], world.parent))
    for name in ("f1", "precision", "recall", "mcc", "uniqueness", "recall_with_child", "recall_alone"):
        assert found[name] == pytest.approx(1.0), name
    for name in ("dead", "absorption", "split"):
        assert found[name] == 0.0, name
    assert found["latents_per_feature"] == 1.0
    assert found["ev"] == pytest.approx(1.0, abs=1e-5)
    assert found["l0"] == found["true_l0"]


def test_absorption_is_counted_where_a_child_speaks_for_its_parent():
    # Features 1 and 2 are children of 0, and 4 of 3. Latents 0 to 2 are features 0 to 2; latent 3 is feature 4.
    parent = torch.tensor([-1, 0, 0, -1, 3])
    directions = torch.eye(5)
    W_dec = directions[[0, 1, 2, 4]]
    features = torch.tensor(
        [
            [1, 1, 0, 0, 0],  # latent 1 fires, latent 0 does not: absorbed
            [1, 1, 0, 0, 0],  # both fire
            [1, 0, 1, 0, 0],  # neither fires: missed, not absorbed
            [1, 0, 0, 0, 0],  # no child; latent 0 fires
            [1, 0, 0, 1, 1],  # no child of 0; latent 0 is silent
            [0, 0, 0, 1, 0],
        ]
    ).float()
    codes = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]).float()
    found = truth(codec(W_dec, lambda _: codes), directions, [(features, features)], parent)
    assert found["truth.absorption"].value == pytest.approx(1 / 3)
    assert found["truth.recall_with_child"].value == pytest.approx(1 / 3)
    assert found["truth.recall_alone"].value == pytest.approx(1 / 2)
    assert found["truth.absorption"].n == 1, "feature 3 has no latent of its own, so it is not asked"
    assert found["truth.split"].value == pytest.approx(1 / 2), "feature 3 is there as its child alone"
    assert found["truth.split"].n == 2


def test_two_latents_for_one_feature_are_a_split_feature():
    directions = torch.eye(4)
    W_dec = torch.tensor([[1.0, 0.1, 0, 0], [1.0, 0, 0.1, 0], [0, 0, 1.0, 0]])
    x = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0]])
    found = values(truth(codec(W_dec, lambda x: x @ W_dec.T), directions, [(x, x)]))
    assert found["latents_per_feature"] == pytest.approx(3 / 2)
    assert found["uniqueness"] == pytest.approx(2 / 3)
    assert "absorption" not in found, "there are no trees"


def test_features_are_found_where_latent_and_feature_choose_each_other():
    W_dec = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0]])
    matches = match(W_dec, torch.eye(3))
    assert matches.feature.tolist() == [0, 0]
    assert matches.latent.tolist() == [0, 1, 0]
    assert matches.found.tolist() == [True, False, False]
    assert matches.mcc == pytest.approx((1 + 0.1 / (0.82**0.5)) / 2)
