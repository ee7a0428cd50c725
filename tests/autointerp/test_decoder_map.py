"""The map and clusters of decoder rows whose places are known."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from autointerp import decoder_map
from autointerp.decoder_map import clusters, flat, map_table


def bundles(n: int, d: int, each: int, noise: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of `n` bundles around orthogonal directions, of lengths 1 to 3, shuffled; the bundle of each)."""
    generator = torch.Generator().manual_seed(0)
    which = torch.arange(n).repeat_interleave(each)[torch.randperm(n * each, generator=generator)]
    rows = torch.eye(n, d)[which] + noise * torch.randn(len(which), d, generator=generator)
    return rows * (1 + 2 * torch.rand(len(which), 1, generator=generator)), which


@pytest.mark.parametrize("signed", [False, True])
def test_the_map_is_that_of_the_singular_vectors(signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_map, "_PIECE", 7)
    W_dec = bundles(3, 6, 20)[0] * torch.tensor([3.0, 1, 1, 1, 1, 1])
    places, share = flat(W_dec, signed=signed)
    unit = normalize(W_dec.double(), dim=1).numpy()
    u, s, _ = np.linalg.svd(unit if signed else unit - unit.mean(axis=0), full_matrices=False)
    assert np.abs(places.numpy()) == pytest.approx(np.abs(u[:, :2] * s[:2]), abs=1e-6)
    assert share == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
    if signed:
        assert (places[:, 0] >= 0).all()
        assert torch.equal(places, flat(-W_dec, signed=True)[0])


@pytest.mark.parametrize("signed", [False, True])
def test_rows_of_a_bundle_are_one_cluster_whatever_their_length(signed: bool) -> None:
    W_dec, which = bundles(2, 8, 30)
    if signed:
        W_dec = W_dec * torch.where(torch.arange(len(W_dec)) % 3 == 0, -1.0, 1.0)[:, None]
    W_dec, which = W_dec[10:], which[10:]  # one bundle is larger
    found = clusters(W_dec, 2, signed=signed, seed=1)
    larger = int(torch.bincount(which).argmax())
    assert torch.equal(found, (which != larger).long())


def test_columns_have_an_entry_a_latent_and_are_the_same_every_time() -> None:
    W_dec = bundles(9, 16, 9)[0]
    table, facts = map_table(W_dec, signed=False)
    assert 0 < float(facts["map_variance"]) < 1
    assert table["feature"].to_pylist() == list(range(81))
    assert max(table["cluster"].to_pylist()) < 9
    assert table == map_table(W_dec, signed=False)[0]
    alone, _ = map_table(torch.ones(1, 1), signed=False)
    assert alone.to_pylist() == [{"feature": 0, "x": 0.0, "y": 0.0, "cluster": 0}]
