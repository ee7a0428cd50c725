"""Fixtures: the real model, a small real run, a tiny random model."""

import os
from pathlib import Path

import pytest

# Before torch is imported: see `app.cli.run` for why.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels are tested without a GPU too

HOOK = "blocks.15.hook_resid_post"


@pytest.fixture(scope="session")
def model() -> "object":
    """The embedded model in float32."""
    from activations import load_model

    return load_model(dtype="float32")


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the real model on the shipped corpus: 16 k tokens, a TopK dictionary of 512 latents, store and labels.

    Read-only: copy it to change it.
    """
    from app.pipeline import collect_run, train_run
    from app.sources import Text
    from autointerp.index import index

    path = tmp_path_factory.mktemp("runs") / "small"
    collect_run(path, Text(tokens=16_384), hooks=[HOOK])
    train_run(path, d_sae=512, k=16, tokens=100_000, batch=1024)
    index(path)
    return path
