"""Killed with SIGKILL at random moments and started again, capture and training end in the bytes of an unbroken run;
and a capture's memory is bounded."""

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
from sae.settings import Training
from sae.train import train
settings = Training(architecture="topk", hook="blocks.0.hook_resid_post", sizes={"d_sae": 256, "k": 4},
                    n_tokens=400_000, batch=64)
train(Run.open(sys.argv[1]), settings, name=sys.argv[2], checkpoint_seconds=0.05)
"""

CAPTURE_HOOKS = ("blocks.0.hook_resid_post", "blocks.1.attn.hook_z")
CAPTURE = f"""
import sys
from pathlib import Path
import activations.capture
from activations.capture import collect
from activations.model import Model
from tests.activations.test_capture import contexts, new_run
from tests.tiny import tiny_model, tiny_tokenizer
activations.capture.ROWS_PER_SHARD = 64
run = new_run(Path(sys.argv[1]), n_tokens=32000)
model = Model("tiny", "0", tiny_model(), tiny_tokenizer())
print("ready", flush=True)
collect(run, model, {CAPTURE_HOOKS!r}, contexts(2000))
"""

LARGE = """
import itertools, resource, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from activations.capture import collect
from activations.model import Model
from tests.activations.test_capture import contexts, new_run
from tests.tiny import tiny_tokenizer
folder, cache, budget = Path(sys.argv[1]), int(sys.argv[2]) << 20, int(sys.argv[3]) << 20
config = LlamaConfig(hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8, vocab_size=101)
model = Model("wide", "0", LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False), tiny_tokenizer())
some = contexts(100, 128)
n = cache // (2048 * 128)
def now(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024
collect(new_run(folder / "warm", n_tokens=12800), model, ["blocks.0.hook_resid_pre"], some, memory=budget)
Path("/proc/self/clear_refs").write_text("5")
before = now("VmRSS")
run = new_run(folder / "run", n_tokens=n * 128)
collect(run, model, ["blocks.0.hook_resid_pre"], itertools.islice(itertools.cycle(some), n), memory=budget)
assert run.activations("blocks.0.hook_resid_pre").n_rows == n * 128
print(now("VmHWM") - before)
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


def test_capture_killed_at_twenty_random_moments(tmp_path):
    """Two hooks of a tiny model; each kill lets it live just long enough to do something."""

    def command(name: str) -> list[str]:
        return [sys.executable, "-c", CAPTURE, str(tmp_path / name)]

    assert run_and_kill(command("whole"), None)
    moments = random.Random(1)
    for _ in range(20):
        with subprocess.Popen(command("broken"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"  # the imports are behind it
            time.sleep(moments.uniform(0.0, 0.1))
            process.kill()
        assert process.returncode == -9, "it ended before it could be killed"
    assert run_and_kill(command("broken"), None)
    expected = files(tmp_path / "whole", "activations/[!.]*/*")
    assert len(expected) == 3 * (500 + 1)
    assert files(tmp_path / "broken", "activations/[!.]*/*") == expected


def test_capture_of_the_real_model_killed_at_random_moments(tmp_path):
    def command(name: str) -> list[str]:
        script = str(Path(sys.executable).with_name("sae"))
        return [script, "collect", str(tmp_path / name), "--tokens", "40k", "--hook", "blocks.2.hook_resid_post"]

    start = time.monotonic()
    assert run_and_kill(command("whole"), None)
    whole = time.monotonic() - start
    moments = random.Random(1)
    for _ in range(3):
        run_and_kill(command("broken"), whole * moments.uniform(0.3, 0.95))
    assert run_and_kill(command("broken"), None)
    expected = files(tmp_path / "whole", "activations/*/shard-*")
    assert len(expected) == 2
    assert files(tmp_path / "broken", "activations/*/shard-*") == expected


def peak(cache_mib: int, budget_mib: int, folder: Path) -> float:
    """Peak memory, in MiB above what it stood at when ready, of a capture with so large a cache."""
    command = [sys.executable, "-c", LARGE, str(folder), str(cache_mib), str(budget_mib)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_memory_is_bounded_by_the_budget_whatever_the_corpus(tmp_path):
    """Beside the rows stand a forward pass, the corpus that is read, and what the allocator keeps of freed pieces."""
    budget = 64
    assert peak(20 * budget, budget, tmp_path) < budget + 160
