"""The map and clusters of decoder rows whose places are known."""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize

from activations import InputError
from autointerp import decoder_map
from autointerp.decoder_map import check_map, clusters, flat, map_table
from autointerp.lens import neighbours


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


def decoder(path: Path, W_dec: torch.Tensor, *, signed: bool) -> list[Path]:
    """The neighbours of all rows, as the index has them."""
    found, cosines = neighbours(W_dec, W_dec.norm(dim=1), 0, len(W_dec), signed=signed)
    near = [
        [{"feature": int(j), "cosine": float(c)} for j, c in zip(*each, strict=True)]
        for each in zip(found, cosines, strict=True)
    ]
    pq.write_table(pa.table({"feature": pa.array(range(len(W_dec)), pa.int32()), "neighbours": near}), path)
    return [path]


def test_columns_have_an_entry_a_latent_and_are_the_same_every_time() -> None:
    W_dec = bundles(9, 16, 9)[0]
    table, facts = map_table(W_dec, "pca", [], signed=False)
    assert 0 < float(facts["map_variance"]) < 1
    assert table["feature"].to_pylist() == list(range(81))
    assert max(table["cluster"].to_pylist()) < 9
    assert table == map_table(W_dec, "pca", [], signed=False)[0]
    alone, _ = map_table(torch.ones(1, 1), "pca", [], signed=False)
    assert alone.to_pylist() == [{"feature": 0, "x": 0.0, "y": 0.0, "cluster": 0}]


@pytest.mark.parametrize("signed", [False, True])
def test_a_umap_shows_bundles_apart_and_folds_the_signs(tmp_path: Path, signed: bool) -> None:
    W_dec, which = bundles(5, 16, 40)
    table, facts = map_table(W_dec, "umap", decoder(tmp_path / "a", W_dec, signed=signed), signed=signed)
    assert "UMAP" in facts["map"]
    assert "map_variance" not in facts
    places = torch.tensor([table["x"].to_pylist(), table["y"].to_pylist()]).T
    distances = torch.cdist(places, places).fill_diagonal_(torch.inf)
    assert torch.equal(which[distances.argmin(dim=1)], which)
    within = distances[(which[:, None] == which) & distances.isfinite()].mean()
    assert within * 2 < distances[which[:, None] != which].mean()
    again, _ = map_table(W_dec, "umap", decoder(tmp_path / "a", W_dec, signed=signed), signed=signed)
    assert again == table
    if signed:
        flipped = W_dec * torch.where(torch.arange(len(W_dec)) % 3 == 0, -1.0, 1.0)[:, None]
        mirrored, _ = map_table(flipped, "umap", decoder(tmp_path / "b", flipped, signed=True), signed=True)
        assert mirrored == table


def test_a_map_that_cannot_be_made_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="'tsne' is unknown: expected one of pca, umap"):
        check_map("tsne")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install 'sae-workbench\[maps\]'"):
        check_map("umap")
    with pytest.raises(InputError, match="of 2 latents is none"):
        map_table(torch.eye(2), "umap", [], signed=False)
