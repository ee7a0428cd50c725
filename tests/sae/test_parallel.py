"""Several processes train the dictionary that one would. Real torchrun, gloo, on the CPU.

A layout's processes are started once and do all its cases: `python -m tests.sae.parallel_ranks` says which.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae import checkpoint, load_sae
from tests.sae.parallel_ranks import CASES, HALF
from tests.tiny import planted_rows, planted_run

pytestmark = pytest.mark.slow
LAYOUTS = {"alone": (1, 1), "latents": (2, 1), "rows": (2, 2), "both": (4, 2), "quarters": (4, 1)}
"""Name: processes, and how many groups of them read rows of their own."""


def python(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=280)


def train_cases(layout: str, run: Path, name: str, *stop: str) -> None:
    n, data_parallel = LAYOUTS[layout]
    launcher = [] if n == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    done = python(*launcher, "-m", "tests.sae.parallel_ranks", str(run), str(data_parallel), name, *stop)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run in which one process trained every case, and another stopped half-way."""
    path = tmp_path_factory.mktemp("parallel") / "run"
    planted_run(path, planted_rows(4000, 16, 20, 3, signed=False)[0])
    train_cases("alone", path, "alone")
    train_cases("alone", path, "half-alone", "stop")
    return path


def assert_same(run: Path, case: str, name: str) -> None:
    a, b = (run / "dictionaries" / f"{each}-{case}" for each in ("alone", name))
    for file in ("sae_weights.safetensors", "statistics.safetensors"):
        expected, found = load_file(a / file), load_file(b / file)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=2e-5, rtol=2e-5, msg=f"{case} {file} {key}")
    lines = [[json.loads(line) for line in (f / "train.jsonl").read_text().splitlines()] for f in (a, b)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for expected, found in zip(*lines, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("layout", ["latents", "rows", "both"])
def test_processes_train_the_dictionary_that_one_would(run, layout):
    train_cases(layout, run, layout)
    for case in CASES:
        assert_same(run, case, layout)
    for case in ("topk", "abstopk"):  # or AuxK was never at work
        lines = (run / "dictionaries" / f"alone-{case}" / "train.jsonl").read_text().splitlines()
        assert any(json.loads(line)["auxk"] > 0 for line in lines)
    assert load_sae(run / f"{layout}-topk").d_sae == 64


@pytest.mark.parametrize(
    ("before", "after"),
    [("alone", "latents"), ("latents", "rows"), ("rows", "both"), ("both", "quarters"), ("quarters", "alone")],
)
def test_a_checkpoint_of_any_layout_goes_on_in_any_other(run, tmp_path, before, after):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("half-[!a]*"))
    if before != "alone":
        train_cases(before, copy, f"half-{before}", "stop")
    for case in CASES:
        folder = copy / "dictionaries" / f"half-{before}-{case}"
        assert checkpoint.steps_of(folder)[-1] == HALF
        assert not (folder / "cfg.json").exists()
        kinds = {path.suffix for path in checkpoint.path_of(folder, HALF).iterdir()}
        assert kinds == {".safetensors", ".json"}
    train_cases(after, copy, f"half-{before}")
    for case in CASES:
        assert_same(copy, case, f"half-{before}")


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("Error:")]


def sae(n: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The `sae` command by n processes; "RANK" in its arguments becomes the rank."""
    script = "import os, sys; from app.cli import run; rank = os.environ['RANK']; "
    script += "sys.argv = [word.replace('RANK', rank) for word in sys.argv]; run()"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "--no-python"]
    return python(*launcher, sys.executable, "-c", script, *arguments)


def cli(n: int, run: Path, *options: str) -> subprocess.CompletedProcess[str]:
    common = ["--d-sae", "64", "-k", "2", "--tokens", "6400", "--batch", "64", "--device", "cpu"]
    return sae(n, "train", str(run), *common, *options)


def test_the_command_trains_under_torchrun_and_the_leader_reports(run):
    done = cli(2, run, "--name", "by-command", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 100


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (2, ["--d-sae", "63"], "63 latents cannot be shared by 2 processes: take a multiple of 2, or"),
        (2, ["--data-parallel", "3"], "2 processes make no 3 equal groups"),
        (2, ["--data-parallel", "2", "--batch", "63"], "63 rows cannot be shared by 2 ranks"),
        (2, ["--lr", "1e30", "--name", "wild"], "not finite at step 20"),
        (2, ["-k", "65"], "k=65 is out of range"),
        (2, ["-k", "33"], "k=33 is more than the 32 latents of a part"),
    ],
)
def test_what_is_wrong_is_said_once(run, n, options, message):
    done = cli(n, run, *options)
    assert done.returncode == 1
    assert len(said(done)) == 1, done.stderr
    assert message in said(done)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "RANK"], "Rank 1 has seed 1 and rank 0 has 0: start all with the same command"),
        (["-k", "2.RANK"], "k=2.1 is no whole number"),
        (["--data-parallel", "1RANK"], "Rank 1 has --data-parallel 11 and rank 0 has 10"),
    ],
)
def test_ranks_that_disagree_stop_at_once(run, options, message):
    done = cli(2, run, *options)
    assert done.returncode == 1
    assert len(said(done)) == 1, done.stderr
    assert message in said(done)[0]
