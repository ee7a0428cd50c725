"""Killed with SIGKILL at random moments and started again, capture and training end in the bytes of an unbroken run."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import planted_rows, planted_run

pytestmark = pytest.mark.slow

TRAIN = """
import sys
from activations.run import Run
from sae.train import Training, train
settings = Training(architecture="topk", hook="blocks.0.hook_resid_post", sizes={"d_sae": 256, "k": 4},
                    n_tokens=400_000, batch=64)
train(Run.open(sys.argv[1]), settings, name=sys.argv[2], checkpoint_seconds=0.05)
"""


def run_and_kill(command: list[str], seconds: float | None) -> bool:
    """True when the process ended by itself; killed after `seconds` otherwise."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return False
    assert process.returncode == 0, said.decode()
    return True


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob(pattern))}


def test_training_killed_at_random_moments(tmp_path):
    run = planted_run(tmp_path / "run", planted_rows(20_000, 32, 64, 4, signed=False)[0])
    command = [sys.executable, "-c", TRAIN, str(run.path)]
    assert run_and_kill([*command, "whole"], None)
    checkpoints = run.dictionary("broken") / "checkpoints"
    moments = random.Random(0)
    for _ in range(4):
        before = set(checkpoints.glob("step-*"))
        with subprocess.Popen([*command, "broken"], stderr=subprocess.DEVNULL) as process:
            while set(checkpoints.glob("step-*")) == before:
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.2))
            process.kill()
    assert not (run.dictionary("broken") / "cfg.json").exists(), "all four kills hit a running training"
    assert run_and_kill([*command, "broken"], None)
    for pattern in ("*.safetensors", "train.jsonl"):
        assert files(run.dictionary("whole"), pattern) == files(run.dictionary("broken"), pattern)


def test_capture_killed_at_random_moments(tmp_path):
    def command(name: str) -> list[str]:
        script = str(Path(sys.executable).with_name("sae"))
        return [script, "collect", str(tmp_path / name), "--tokens", "40k", "--hook", "blocks.2.hook_resid_post"]

    start = time.monotonic()
    assert run_and_kill(command("whole"), None)
    whole = time.monotonic() - start
    moments = random.Random(1)
    for _ in range(4):
        run_and_kill(command("broken"), whole * moments.uniform(0.3, 0.95))
    assert run_and_kill(command("broken"), None)
    expected = files(tmp_path / "whole", "activations/*/shard-*")
    assert len(expected) == 2
    assert files(tmp_path / "broken", "activations/*/shard-*") == expected
