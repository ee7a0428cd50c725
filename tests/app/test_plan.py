"""`sae plan` through the command line: it says what will be, and leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from activations.errors import InputError
from app.cli.plan import command
from tests.activations.test_ranks import tiny_folder  # noqa: F401  (a fixture)
from tests.app.test_collect import HOOK, sae
from tests.app.test_collect import wrong as wrong_in_a_shell


def said_by(*arguments: object) -> str:
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if done.exception is not None:
        raise done.exception
    return done.output


def plan(*arguments: object) -> dict[str, Any]:
    said = json.loads(said_by(*arguments, "--json"))
    assert all(figure["basis"] in ("counted", "measured", "fitted", "built-in") for figure in said["figures"].values())
    return {name: figure["value"] for name, figure in said["figures"].items()} | {"notes": said["notes"]}


def wrong(*arguments: object) -> str:
    with pytest.raises(InputError) as error:
        said_by(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_what_openai_did_is_planned_without_a_run_or_a_gpu():
    what = ["train", "--d-in", 12288, "--d-sae", "16M", "--tokens", "40B", "--machine", "h100"]
    said = plan(*what)
    assert 90 < said["GPUs"] < 110
    assert said["memory a GPU"] < 80e9
    assert said["GPU-hours"] == pytest.approx(said["GPUs"] * said["time"] / 3600)
    assert said["a checkpoint"] == pytest.approx(12 * 2 * 12288 * 16e6, rel=0.01)
    assert said["activations if cached"] == pytest.approx(40e9 * 12288 * 2, rel=0.01)
    text = " ".join(said["notes"])
    assert "13 hosts of 8" in text
    assert "do not fit the disk: stream them" in text
    assert "With --batch" in text
    few = plan(*what, "--gpus", 8)
    assert few["GPUs"] == 8
    assert "It does not fit 8 GPUs (filled to 92%): it takes 103." in few["notes"]
    table = said_by(*what)
    assert "GPU-hours" in table
    assert "built-in" in table


def test_a_plan_says_what_collect_and_train_then_write_and_starts_neither(tiny_folder, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    what = ["collect", run, "--model", tiny_folder, "--hook", HOOK, "--tokens", "20k"]
    said = plan(*what)
    assert list(tmp_path.iterdir()) == []
    sae(*what)
    assert size(run / "activations") == pytest.approx(said["activations on disk"], rel=0.05)

    what = ["train", run, "--d-sae", 2048, "-k", 4, "--tokens", "40k", "--batch", 512]
    before = sorted(tmp_path.rglob("*"))
    said = plan(*what)
    assert sorted(tmp_path.rglob("*")) == before
    assert said["steps"] == 78
    assert said["epochs"] == pytest.approx(40_000 / said["tokens to train on"])
    sae(*what)
    assert size(run / "dictionaries") == pytest.approx(said["dictionary on disk"], rel=0.05)


def test_a_sweep_is_the_sum_of_its_cells(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text('[base]\narch = "topk"\ntokens = "1M"\n[grid]\nk = [16, 32]\nd_sae = [4096, "8k"]\n')
    at = ["--d-in", 576, "--machine", "h100"]
    said = plan("sweep", tmp_path / "run", file, *at)
    cells = [plan("train", *at, "--tokens", "1M", "-k", k, "--d-sae", d) for k in (16, 32) for d in (4096, 8000)]
    for name in ("steps", "time", "a checkpoint"):
        assert said[name] == pytest.approx(sum(cell[name] for cell in cells))
    assert said["memory a GPU"] < sum(cell["memory a GPU"] for cell in cells)
    assert said["activations if cached"] == cells[0]["activations if cached"]


def test_options_of_the_architecture_are_planned_too(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text('[base]\narch = "matryoshka"\n[grid.options]\nprefixes = [[16], [32]]\n')
    at = ["--d-in", 576, "--machine", "h100"]
    said = plan("sweep", tmp_path / "run", file, *at)
    cell = plan("train", *at, "--arch", "matryoshka", "-o", "prefixes=[16]")
    assert said["time"] == pytest.approx(2 * cell["time"])


def test_a_model_at_hand_is_planned_for_a_machine_that_is_not(tiny_folder):  # noqa: F811
    at = ["collect", "--model", tiny_folder, "--tokens", "1B", "--machine", "h100"]
    one, two = plan(*at), plan(*at, "--gpus", 2)
    assert one["time"] > 0
    assert two["time"] <= one["time"]
    assert plan("train", "--model", tiny_folder, "--machine", "h100")["GPUs"] == 1


def test_wrong_plans_are_one_line(tmp_path):
    assert "Nothing says how wide the activations are" in wrong("train", "--machine", "h100")
    assert "Machine 'abacus' is unknown" in wrong("train", "--d-in", 8, "--machine", "abacus")
    assert "k=9 is out of range" in wrong("train", "--d-in", 8, "--d-sae", 8, "-k", 9, "--machine", "h100")
    assert "nowhere is no run" in wrong_in_a_shell("plan", "train", "nowhere")
    assert "use -k" in wrong("train", "--d-in", 8, "-o", "k=3", "--machine", "h100")
    assert "there is no field 'x'" in wrong("train", "--d-in", 8, "-o", "x=3", "--machine", "h100")
    assert "make no batch" in wrong("train", "--d-in", 8, "--tokens", 10, "--machine", "h100")
    bad = tmp_path / "bad.toml"
    bad.write_text("[grid]\nk = 3\n")
    assert "k = 3 in [grid]: expected a list" in wrong("sweep", "nowhere", bad, "--d-in", 8, "--machine", "h100")
    bad.write_text("[base]\nbanana = 3\n")
    assert "'banana'" in wrong("sweep", "nowhere", bad, "--d-in", 8, "--machine", "h100")
