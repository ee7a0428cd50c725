"""`sae eval RUN --all`: what it prints, what it names at the end, and which options do not go together."""

import json

import pytest
from click.testing import CliRunner, Result

from activations.errors import InputError
from activations.run import Run
from app.cli.eval import command
from app.pipeline import collect_vectors_run, train_run
from app.sources import Vectors
from data.planted import WorldConfig, build_world, plant


def said(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def run(tmp_path) -> Run:
    """Two dictionaries of a planted world of 24 features, a and b."""
    even = {"max_prob": 0.12, "min_prob": 0.12, "n_trees": 0, "rank": 0}
    plant(tmp_path / "world", build_world(WorldConfig(n_features=24, d_in=32, **even)), 3000)
    run = collect_vectors_run(tmp_path / "run", Vectors(path=str(tmp_path / "world")), dtype="float32")
    for seed, name in enumerate("ab"):
        train_run(tmp_path / "run", name=name, d_sae=24, k=3, tokens=6000, batch=256, seed=seed)
    return run


def test_all_are_measured_against_the_world_that_the_run_was_made_of(run):
    first = said(run.path, "--all", "--metric", "truth", "--metric", "density")
    assert first.exit_code == 0
    assert "b (2 of 2): truth ...\n" in first.stderr
    assert [line.split()[::2] for line in first.stdout.splitlines()] == [["a", "numbers"], ["b", "numbers"]]
    record = json.loads((run.dictionary("b") / "eval.json").read_text())["metrics"]
    assert record["truth.mcc"]["row"] == "truth"
    again = said(run.path, "--all", "--metric", "truth")
    assert again.stdout == "a  was measured before\nb  was measured before\n--overwrite measures again what is there.\n"
    anew = json.loads(said(run.path, "--all", "--metric", "truth", "--overwrite", "--json").stdout)
    assert anew["failed"] == {}
    assert anew["found"]["b"]["truth.mcc"]["value"] == record["truth.mcc"]["value"]


def test_those_that_cannot_be_measured_are_named_at_the_end_those_of_one_fault_together(run):
    (run.dictionary("a") / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="^1 of 2 dictionaries were not measured: a: .*damaged"):
        said(run.path, "--all", "--metric", "density")
    assert (run.dictionary("b") / "eval.json").exists()
    with pytest.raises(InputError, match="a: .* | b: The metric splice needs the language model"):
        said(run.path, "--all", "--metric", "splice")


def test_without_a_world_and_with_options_that_exclude_each_other(run, tmp_path):
    (tmp_path / "world" / "world.json").rename(tmp_path / "world" / "gone")
    with pytest.raises(InputError, match="a, b: The metric truth needs the planted world"):
        said(run.path, "--all", "--metric", "truth")
    with pytest.raises(InputError, match="world holds no planted world"):
        said(run.path, "--all", "--metric", "truth", "--world", tmp_path / "world")
    assert "leave out --all" in said(run.path, "--all", "--against", f"{run.path}/a").stderr
    assert said(run.path, "--overwrite").exit_code == 2
    with pytest.raises(InputError, match="is no run"):
        said(f"{run.path}/dictionaries", "--all")
    with pytest.raises(InputError, match="has 2 dictionaries: name one of"):
        said(run.path)
