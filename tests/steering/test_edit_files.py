"""Edits as JSON, and back."""

import json
import shutil

import pytest
import torch

from activations import InputError
from sae import load_sae, save_sae
from steering import Add, Clamp, ProjectOut, SteeringVector, ablate
from steering.files import edit_from_json, load_edits, save_edits


@pytest.fixture
def run(tmp_path, basis):
    """A run with one dictionary (named orthonormal) and a vector in its edits folder."""
    folder = tmp_path / "run"
    save_sae(basis, folder / "dictionaries" / "orthonormal")
    (folder / "run.json").write_text(json.dumps({"format": 1}))
    return folder


def test_edits_come_back_as_they_were(run, make_vector):
    sae = load_sae(run)
    make_vector(1).save(run / "edits" / "v.safetensors")
    loaded = SteeringVector.load(run / "edits" / "v.safetensors")
    edits = [
        Add(SteeringVector.from_latent(sae, 9).scaled(2.5)),
        Add(SteeringVector.from_latent(sae, 9, unit="norm")),
        Add(loaded.scaled(0.5)),
        Clamp(sae, 7, 3.0),
        ablate(sae, 8),
        ProjectOut(SteeringVector.from_latent(sae, 4), share=0.5),
    ]
    save_edits(run / "edits" / "all.json", edits)
    back = load_edits(run / "edits" / "all.json")
    assert [type(edit) for edit in back] == [type(edit) for edit in edits]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for before, after in zip(edits, back, strict=True):
        assert torch.equal(after.on(x.device)(x), before.on(x.device)(x))
        assert (after.hook, after.sink_threshold) == (before.hook, before.sink_threshold)


def test_a_run_can_be_moved_with_its_edits_and_read_from_anywhere(run, tmp_path, make_vector, monkeypatch):
    make_vector(1).save(run / "edits" / "v.safetensors")
    monkeypatch.chdir(tmp_path)
    edits = [Clamp(load_sae("run/orthonormal"), 7, 3.0), Add(SteeringVector.load("run/edits/v.safetensors"))]
    save_edits("run/edits/all.json", edits)
    described = json.loads((run / "edits" / "all.json").read_text())
    assert [described[0]["dictionary"], described[1]["file"]] == ["../orthonormal", "v.safetensors"]
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(run, moved)
    shutil.rmtree(run)
    monkeypatch.chdir("/")
    assert load_edits(moved / "edits" / "all.json")[0].target == pytest.approx(2.1)


def test_a_vector_file_is_one_edit(make_vector, tmp_path):
    make_vector(1).save(tmp_path / "v.safetensors")
    (edit,) = load_edits(tmp_path / "v.safetensors")
    assert torch.equal(edit.vector.raw, make_vector(1).raw)


def test_what_was_never_saved_cannot_be_written_down(basis, vector, tmp_path):
    for edit in (Clamp(basis, 3, 1.0), Add(vector), Add(SteeringVector.from_latent(basis, 3))):
        with pytest.raises(InputError, match="save"):
            save_edits(tmp_path / "edits.json", [edit])
    assert list(tmp_path.iterdir()) == []


GOOD = {"op": "clamp", "dictionary": "run", "feature": 3, "value": 1.0}


@pytest.mark.parametrize(
    "described",
    [
        "text",
        {},
        {"op": "explode"},
        {key: value for key, value in GOOD.items() if key != "value"},
        {**GOOD, "more": 1},
        {**GOOD, "feature": "3"},
        {**GOOD, "feature": True},
        {**GOOD, "feature": 10_000},
        {**GOOD, "value": float("nan")},
        {**GOOD, "dictionary": "nowhere"},
        {"op": "add", "dictionary": "run", "feature": 3, "sign": 1, "unit": "furlong", "coefficient": 1},
        {"op": "add", "dictionary": "run", "feature": 3, "sign": 2, "unit": "max", "coefficient": 1},
        {"op": "add", "file": "nowhere.safetensors", "unit": "raw", "coefficient": 1},
    ],
)
def test_a_malformed_edit_is_refused_in_one_line(described, run):
    with pytest.raises(InputError) as caught:
        edit_from_json(described, folder=run.parent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"op": "clamp"}', "[1]"])
def test_a_damaged_file_of_edits_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "edits.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_edits(path)
    assert "\n" not in str(caught.value)


def test_a_loader_may_keep_what_it_has_loaded(run):
    seen = []

    def load(address):
        seen.append(address)
        return load_sae(address)

    edit_from_json(GOOD, load, run.parent)
    assert seen == [str(run)]
