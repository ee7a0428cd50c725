"""Ranks share a capture: whatever their number, the shards are the same bytes. Real torchrun, gloo, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_v"]


def torchrun(n: int, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    script = str(Path(sys.executable).with_name("sae"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "--no-python"]
    command = [script, *arguments] if n == 0 else [*launcher, script, *arguments]
    # One thread each, in every case: how a product is split among threads decides its last bits.
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    """A two-layer Llama of width 48 with the embedded model's tokenizer, as a local folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from activations.embedded import model_folder

    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=49152
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    return folder


def collect(run: Path, model: Path, *more: str) -> list[str]:
    hooks = [word for hook in HOOKS for word in ("--hook", hook)]
    return ["collect", str(run), "--model", str(model), *hooks, "--tokens", "400k", "--device", "cpu", *more]


def shards(run: Path) -> dict[str, bytes]:
    folder = run / "activations"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("[!.]*/*")}


def test_any_number_of_ranks_writes_the_same_bytes(tiny_folder, tmp_path):
    for n in (0, 3):
        done = torchrun(n, collect(tmp_path / f"with-{n}", tiny_folder))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ordinary") == len(HOOKS)  # the leader alone reports
    alone = shards(tmp_path / "with-0")
    assert len(alone) == 3 * 8  # seven shards and a manifest, of the tokens and each hook
    assert shards(tmp_path / "with-3") == alone


def test_what_is_wrong_is_said_once(tiny_folder, tmp_path):
    done = torchrun(2, collect(tmp_path / "run", tiny_folder, "--context", "1M"))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(set(said)) == 1
    torchrun(0, collect(tmp_path / "run", tiny_folder))
    done = torchrun(2, collect(tmp_path / "run", tiny_folder, "--tokens", "800k"))
    said = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(said) == 1
    assert "was made with n_tokens 400000, not 800000" in said[0]


def test_gpus_that_are_not_there_are_refused(tiny_folder, tmp_path):
    done = torchrun(0, collect(tmp_path / "run", tiny_folder, "--gpus", "64"))
    assert done.returncode == 1
    assert "--gpus 64 on a machine with" in done.stderr
    assert not (tmp_path / "run").exists()
