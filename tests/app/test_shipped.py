"""The dictionaries that ship: whole, small, usable, and copied before anything is written beside them."""

import pytest
import torch

from activations.run import Run
from app.shipped import SHIPPED, shipped_runs
from sae import load_sae


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_they_are_copied_once_and_the_copy_is_the_users_own(cache):
    runs = shipped_runs()
    assert runs.parent == cache
    (runs / "note").write_text("mine")
    assert shipped_runs() == runs
    assert (runs / "note").exists()
    assert not (SHIPPED / "note").exists()


def test_they_stay_small():
    sizes = {path: path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 33 * 2**20
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in sizes)


@pytest.mark.parametrize("folder", sorted(SHIPPED.glob("*/dictionaries/*")), ids=lambda folder: folder.name)
def test_each_gives_back_what_its_hook_gives(folder, model):
    sae = load_sae(folder)
    assert sae.metadata["hook_name"] == sae.hook
    assert sae.metadata["model_revision"] == Run.open(folder.parents[1]).meta["revision"]
    assert "/" not in sae.metadata["dataset_path"]
    from activations.splice import read

    ids = model.encode("The committee met on Tuesday to discuss the budget, and nobody agreed about anything at all.")
    with read(model, [sae.hook], stop=True) as got:
        model.hf(input_ids=ids, use_cache=False)
    x = got[sae.hook][0, 1:].float()
    error = (sae.reconstruct(x) - x).square().sum() / (x - x.mean(dim=0)).square().sum()
    l0 = (sae.encode(x) != 0).sum(dim=1).float().mean()
    assert float(error) < 0.6  # of one sentence's own variance, which is less than a text's
    assert 5 < float(l0) < 100
    assert torch.isfinite(sae.reconstruct(x)).all()
