"""`sae bench`: what a checkout can measure, and that its training benchmark prints figures that can be compared."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

from activations.errors import InputError
from app.cli.bench import ROOT, benchmarks
from data.planted import WorldConfig
from sae.registry import REGISTRY
from tests.benchmarks import quality, superposition, train
from tests.benchmarks.synthetic.dictionaries import parsed, plan_of
from tests.benchmarks.synthetic.samples import Samples
from tests.tiny import HOOK, planted_run

SAE = str(Path(sys.executable).with_name("sae"))
SMALL = ["--d-sae", "64", "-k", "4", "--batch", "64", "--steps", "2", "--block", "1", "--device", "cpu"]


def sae(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SAE, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_all_benchmarks_are_listed_with_what_they_measure(tmp_path):
    done = sae("bench", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for file in (ROOT / "tests" / "benchmarks").glob("*.py"):
        assert file.stem in done.stdout
    assert "The training step beside SAELens'" in done.stdout


def test_an_unknown_benchmark_is_one_line_that_names_the_others(tmp_path):
    done = sae("bench", "speed", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "no benchmark 'speed': expected one of capture, " in done.stderr


def test_without_a_checkout_it_says_where_the_benchmarks_are(tmp_path):
    with pytest.raises(click.ClickException, match="clone the repository"):
        benchmarks(tmp_path)


def test_options_reach_the_benchmark_wherever_it_is_started(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("raise SystemExit('the wrong tests')\n")
    done = sae("bench", "train", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--dead-frac" in done.stdout


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, object]]:
    train.main([*SMALL, *arguments])
    return {row["part"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}


@pytest.mark.parametrize("arch", ["topk", "jumprelu"])
def test_our_step_ends_where_the_dense_reference_ends(capsys, arch):
    synthetic = ["--arch", arch, "--d-in", "16", "--rows", "2048", "--extra-steps", "100"]
    found = lines(capsys, "--peers", "ours,dense", *synthetic)
    ours, dense = found["ours"], found["dense"]
    assert ours["n_steps"] == 106
    assert 0.1 < dense["fvu"] < 0.9, "nothing was learned, so nothing is compared"
    assert ours["fvu_x_dense"] == pytest.approx(1.0, abs=0.01)
    assert ours["l0"] == pytest.approx(dense["l0"], rel=0.05)
    assert found["roofline"]["gemm_ms"] < found["roofline"]["sparse_ms"] < found["roofline"]["dense_ms"]


def test_reviving_dead_latents_is_part_of_both_steps(capsys):
    found = lines(capsys, "--peers", "ours,dense", "--d-in", "16", "--rows", "1024", "--dead-frac", "0.5")
    assert found["ours"]["dead"] >= 0.5
    assert found["ours"]["fvu_x_dense"] == pytest.approx(1.0, abs=0.01)


def test_a_peer_that_is_not_there_or_lacks_the_architecture_is_left_out_in_one_line(capsys):
    peers = ["--peers", "ours,sparsify", "--arch", "jumprelu", "--d-in", "16", "--rows", "1024"]
    found = lines(capsys, *peers)
    assert "step_ms" in found["ours"]
    assert "sparsify" in found["sparsify"]["left_out"] or "jumprelu" in found["sparsify"]["left_out"]


def test_rows_of_a_run_are_taken_as_training_takes_them(capsys, tmp_path):
    rows = torch.randn(4096, 24, generator=torch.Generator().manual_seed(0)) * 3 + 1
    run = planted_run(tmp_path / "run", rows)
    found = lines(capsys, "--peers", "ours", "--run", str(run.path), "--hook", HOOK)
    assert found["ours"]["d_in"] == 24
    assert found["ours"]["n_rows"] % 64 == 0
    assert 0 < found["ours"]["fvu"] < 2


def test_dictionaries_are_judged_against_the_truth_beside_controls(capsys):
    sizes = ["--d-sae", "64", "--samples", "20k", "--pool", "4096", "--eval-samples", "1024", "--device", "cpu"]
    ours = ["--ours", "topk:k=4,lr=4e-3", "--ours", "jumprelu:k=6,batch=256", "--seeds", "0,1"]
    quality.main(["--judge", "ours", *sizes, *ours])
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    found = {(row["name"], row["seed"]): row for row in rows}
    assert len(rows) == len(found) == 4 + 4
    topk = found["topk:k=4,lr=4e-3", 1]
    assert (topk["l0"], topk["settings"]["lr"], topk["settings"]["sizes"]["k"]) == (4, 4e-3, 4)
    assert found["jumprelu:k=6,batch=256", 0]["settings"]["sizes"] == {"d_sae": 64, "target_l0": 6}
    assert topk["f1"] != found["topk:k=4,lr=4e-3", 0]["f1"], "the seed changes nothing"
    assert topk["true_l0"] == found["random dictionary", None]["true_l0"], "all are judged on the same samples"
    assert found["random dictionary", None]["f1"] < 0.1 < topk["f1"]
    assert found["true codes", None]["f1"] == found["true dictionary, tied", None]["mcc"] == 1
    assert err.count("| ours | topk:k=4,lr=4e-3 | saved | 2 | ") == 1


def test_recovered_variables_are_judged_beside_controls(capsys):
    sizes = ["--cells", "2000", "--judged", "500", "--observed", "150", "--visits", "20k", "--ours", "topk:k=16"]
    superposition.main([*sizes, "--dims", "60", "--widths", "96", "--seeds", "0", "--representation", "projection"])
    out, err = capsys.readouterr()
    found = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert found["linear regression"]["program.best"] > 0.8
    topk = found["topk:k=16"]
    assert (topk["l0"], topk["width"]) == (16, 96)
    assert found["shuffled"]["type.best"] < 0.3 < topk["type.best"] < 1
    assert topk["fvu"] < 0.7 < found["random dictionary"]["fvu"]
    assert err.count("| 60 | topk:k=16 | 96 | 1 | ") == 1


def test_samples_do_not_depend_on_how_they_are_read():
    world = WorldConfig(n_features=64, d_in=8, n_trees=2, depth=2)
    samples = Samples(world, "cpu", saelens=False, sampler="ours")
    fresh = torch.cat(list(samples.rows(4096, 256, None, seed=3)))
    again = torch.cat(list(samples.rows(4096, 256, None, seed=3)))
    assert torch.equal(fresh, again)
    twice = torch.cat(list(samples.rows(2048, 256, 1024, seed=3)))
    assert torch.equal(twice[:1024].sort(dim=0).values, twice[1024:].sort(dim=0).values), "the pool is read in whole"
    assert not torch.equal(twice[:1024], twice[1024:]), "in another order"


def test_options_of_a_dictionary_are_read_as_numbers_lists_and_words():
    assert parsed("matryoshka:prefixes=[16,64],detach=true,lr=1e-3,order=stream") == (
        "matryoshka",
        {"prefixes": [16, 64], "detach": True, "lr": 1e-3, "order": "stream"},
    )
    with pytest.raises(InputError, match="'k' is no field with a value: expected FIELD=VALUE"):
        parsed("topk:k")


def test_a_full_sweep_of_quality_asks_for_what_can_be_trained():
    args = quality.parse(["--full", "--judge", "ours", "--preset", "16k"])
    preset = quality.PRESETS["16k"]
    plans = [plan_of(text, preset, preset.n_samples, 0, "cpu") for text in args.ours]
    assert len({plan.architecture for plan in plans}) == 8
    l0 = {getattr(plan.config(768), REGISTRY[plan.architecture].sparsity) for plan in plans}
    assert l0 == {12, 25, 50}
    assert args.peers == []
    whole = plan_of("topk", preset._replace(k=8.0), preset.n_samples, 0, "cpu")
    assert whole.config(768).k == 8
