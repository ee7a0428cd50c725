"""The suite over a whole run: what is there stays, the model is loaded once, one fault does not stop the rest."""

from dataclasses import asdict

import pytest
import torch

from activations.errors import InputError
from activations.files import read_json, write_json
from activations.run import Run
from data.planted import WorldConfig, build_world
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.evals import baselines as baselines_module
from sae.evals.subject import Options
from sae.evals.suite import TABLE, evaluate
from sae.evals.truth import SAMPLES, SEED, truth
from sae.evals.whole_run import evaluate_run
from sae.files import load_sae, save_sae
from sae.settings import Training
from sae.statistics import latent_statistics
from tests.tiny import HOOK, planted_rows, planted_run


def no_model():
    raise AssertionError("nothing here reads the model")


@pytest.fixture
def run(tmp_path) -> Run:
    """Three dictionaries of random directions, a, b and c."""
    run = planted_run(tmp_path / "run", planted_rows(2000, 8, 12, 3, signed=False)[0], n_docs=100)
    for seed, name in enumerate("abc"):
        sae = TopKSAE(TopKConfig(d_in=8, d_sae=16, k=2))
        sae.initialise(torch.zeros(1, 8), seed)
        sae.statistics = latent_statistics([sae], run.activations(HOOK))[0]
        sae.metadata = {"hook_name": HOOK}
        save_sae(sae, run.dictionary(name))
        settings = Training(architecture="topk", hook=HOOK, sizes={"d_sae": 16, "k": 2}, n_tokens=4096, seed=seed)
        write_json(run.dictionary(name) / "train.json", asdict(settings))
    return run


def value(run: Run, name: str, metric: str) -> float:
    return read_json(run.dictionary(name) / "eval.json")["metrics"][metric]["value"]


def test_all_are_measured_and_only_what_is_not_there(run):
    evaluate(run.dictionary("b"), None, names=["geometry"])
    record = read_json(run.dictionary("b") / "eval.json")
    record["metrics"]["geometry.nearest"]["value"] = 7.0
    write_json(run.dictionary("b") / "eval.json", record)
    said: list[str] = []
    options = Options(say=said.append)
    report = evaluate_run(run, no_model, names=["geometry", "density"], options=options)
    assert said == ["a (1 of 3): geometry", "a (1 of 3): density", "b (2 of 3): density"] + [
        f"c (3 of 3): {row}" for row in ("geometry", "density")
    ]
    assert value(run, "b", "geometry.nearest") == 7.0
    assert {name for name in report.found["b"] if name.startswith("geometry")} == set()
    alone = evaluate(run.dictionary("c"), None, names=["geometry"])
    assert {name: report.found["c"][name] for name in alone} == alone
    assert evaluate_run(run, no_model, names=["geometry"]).found == {"a": {}, "b": {}, "c": {}}
    assert evaluate_run(run, no_model, names=["geometry"], overwrite=True).found["b"]["geometry.nearest"].value < 1
    assert value(run, "b", "geometry.nearest") < 1


def test_controls_of_equal_sizes_are_measured_once_and_are_those_of_a_dictionary_alone(run, monkeypatch):
    measured: list[str] = []
    before = baselines_module.reconstruction

    def counted(sae, cache):
        measured.append(f"{type(sae).__name__} {sae.d_sae}")
        return before(sae, cache)

    monkeypatch.setattr(baselines_module, "reconstruction", counted)
    run.meta["layout"] = "vectors"  # no model, so delta CE is left out
    report = evaluate_run(run, no_model, names=["controls"])
    assert sorted(measured) == ["AbsTopKSAE 1", "AbsTopKSAE 2", "AbsTopKSAE 8", "TopKSAE 16"]  # not three times
    alone = evaluate(run.dictionary("c"), None, names=["controls"])
    assert report.found["c"] == alone
    assert len(measured) == 8


def test_one_that_cannot_be_read_is_named_and_the_others_are_measured(run):
    (run.dictionary("a") / "sae_weights.safetensors").write_bytes(b"no weights")
    (run.dictionary("b") / "eval.json").write_text("{")
    report = evaluate_run(run, no_model, names=["geometry"])
    assert list(report.found) == ["c"]
    assert "damaged" in report.failed["a"]
    assert "eval.json is damaged" in report.failed["b"]
    assert value(run, "c", "geometry.nearest") > 0


def test_a_model_that_cannot_be_loaded_is_said_once_before_anything_is_measured(run):
    calls = []

    def load():
        calls.append(1)
        raise InputError("no such model")

    with pytest.raises(InputError, match="no such model"):
        evaluate_run(run, load)
    assert calls == [1]
    assert not (run.dictionary("a") / "eval.json").exists()


def test_the_model_is_not_loaded_when_all_that_reads_it_is_there(run):
    for name in "abc":
        write_json(run.dictionary(name) / "eval.json", {"metrics": {"delta_ce": {"row": "splice", "value": 0.5}}})
    report = evaluate_run(run, no_model)
    assert report.failed == {}
    assert {"fvu", "dead", "geometry.nearest"} <= report.found["a"].keys()
    assert value(run, "a", "delta_ce") == 0.5


def test_a_run_without_dictionaries_and_an_unknown_metric_are_one_line(run, tmp_path):
    with pytest.raises(InputError, match="No metric 'geometri'"):
        evaluate_run(run, no_model, names=["geometri"])
    young = planted_run(tmp_path / "young", planted_rows(500, 8, 12, 3, signed=False)[0])
    with pytest.raises(InputError, match="has no dictionary yet"):
        evaluate_run(young, no_model)


def test_truth_is_of_new_rows_of_the_world(run):
    even = {"max_prob": 0.2, "min_prob": 0.2, "n_trees": 0, "rank": 0}
    world = build_world(WorldConfig(n_features=12, d_in=8, **even))
    with pytest.raises(InputError, match="truth needs the planted world that the rows are of: add --world FOLDER"):
        evaluate(run.dictionary("a"), None, names=["truth"])
    found = evaluate(run.dictionary("a"), None, names=["truth"], options=Options(world=world, seed=3))
    sae = load_sae(run.dictionary("a"))
    directly = truth(sae, world.directions, world.batches(SAMPLES, SEED + 3), world.parent)
    assert {name: each.value for name, each in found.items()} == {name: each.value for name, each in directly.items()}
    assert (found["truth.f1"].seed, found["truth.mcc"].seed) == (3, None)
    wide = build_world(WorldConfig(n_features=12, d_in=9, **even))
    with pytest.raises(InputError, match="rows have 9 numbers and the dictionary reads 8"):
        evaluate(run.dictionary("a"), None, names=["truth"], options=Options(world=wide))
    assert not TABLE["truth"].cheap
