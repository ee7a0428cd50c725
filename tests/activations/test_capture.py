"""Capture writes what the model computes, marks sinks, adds hooks, goes on where it was killed."""

from pathlib import Path

import numpy as np
import pytest
import torch

import activations.capture
from activations.capture import collect
from activations.errors import InputError
from activations.model import Model
from activations.run import Run
from activations.shards import Shards
from activations.splice import read
from tests.tiny import tiny_model, tiny_tokenizer

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]


@pytest.fixture
def tiny() -> Model:
    return Model("tiny", "0", tiny_model(), tiny_tokenizer())


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(activations.capture, "ROWS_PER_SHARD", 64)


def contexts(n: int = 20, context: int = 16):
    rng = np.random.default_rng(0)
    return [(rng.integers(1, 101, context).astype(np.int32), np.full(context, i // 2, np.int32)) for i in range(n)]


def new_run(path: Path, n_tokens: int = 320) -> Run:
    return Run.create(
        path,
        model="tiny",
        revision="0",
        model_dtype="float32",
        corpus="c",
        corpus_hash="h",
        context=16,
        n_tokens=n_tokens,
    )


def test_rows_are_what_the_model_computes_in_one_order_for_all_hooks(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS, contexts(), dtype=torch.float32, rows_per_batch=48)
    with read(tiny, HOOKS) as got:
        tiny(torch.from_numpy(np.stack([ids for ids, _ in contexts()])).long())
    for hook in HOOKS:
        cache = run.activations(hook)
        assert cache.n_shards == 5
        rows = torch.cat([cache.rows(i) for i in range(cache.n_shards)])
        torch.testing.assert_close(rows, got[hook].flatten(0, 1))
        tokens = cache.tokens(1)
        assert tokens.positions[:17].tolist() == [*range(16), 0]
        assert tokens.docs[0].item() == 2
        assert not cache.mask(0)[tokens.positions == 0].any()


def test_statistics_are_those_of_the_ordinary_rows(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS[:1], contexts(), dtype=torch.float32)
    cache = run.activations(HOOKS[0])
    rows = torch.cat([cache.rows(i)[cache.mask(i)] for i in range(cache.n_shards)])
    torch.testing.assert_close(cache.mean, rows.mean(dim=0))
    assert cache.mean_norm == pytest.approx(rows.norm(dim=1).mean().item(), rel=1e-6)
    assert (rows * cache.scale).norm(dim=1).mean().item() == pytest.approx(32**0.5, rel=1e-5)
    assert cache.n_training + sum(int(cache.held_out_mask(i).sum()) for i in range(5)) == cache.n_ordinary == 300


def test_sinks_are_marked_and_counted(tiny, tmp_path):
    loud = tiny.hf.get_input_embeddings().weight.data
    loud[7] *= 1000  # a token whose residual is far beyond the median
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS[:1], contexts(), dtype=torch.float32)
    cache = run.activations(HOOKS[0])
    ids = torch.cat([cache.tokens(i).ids for i in range(cache.n_shards)])
    positions = torch.cat([cache.tokens(i).positions for i in range(cache.n_shards)])
    mask = torch.cat([cache.mask(i) for i in range(cache.n_shards)])
    assert torch.equal(mask, (positions > 0) & (ids != 7))
    assert cache.sink_share == pytest.approx(((ids == 7) & (positions > 0)).sum().item() / (positions > 0).sum().item())


def test_a_killed_capture_goes_on_and_ends_in_the_same_bytes(tiny, tmp_path, monkeypatch):
    whole = new_run(tmp_path / "whole")
    collect(whole, tiny, HOOKS, contexts())
    broken = new_run(tmp_path / "broken")
    append, left = Shards.append, [0]

    def dying(self, *args):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        append(self, *args)

    monkeypatch.setattr(Shards, "append", dying)
    for survived in (3, 4, 2, 100):
        left[0] = survived
        try:
            collect(broken, tiny, HOOKS, contexts())
        except KeyboardInterrupt:
            with pytest.raises(InputError, match="sae collect"):  # unfinished, and it says what to do
                broken.activations(HOOKS[0])
    for path in (whole.path / "activations").rglob("*.safetensors"):
        assert path.read_bytes() == (broken.path / path.relative_to(whole.path)).read_bytes()


def test_a_later_hook_joins_the_same_rows(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS[:1], contexts())
    before = (run.path / "activations/tokens/manifest.json").read_bytes()
    collect(run, tiny, HOOKS[1:], iter(()))  # the text is not needed any more
    assert run.hooks() == sorted(HOOKS)
    assert (run.path / "activations/tokens/manifest.json").read_bytes() == before


def test_a_flipped_byte_is_found_and_named(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS[:1], contexts())
    path = run.path / "activations" / HOOKS[0] / "shard-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="shard-00003.safetensors is damaged .*sae collect"):
        run.activations(HOOKS[0]).check()
    path.write_bytes(bytes(data[:100]))
    with pytest.raises(InputError, match="shard-00003.safetensors is damaged"):
        run.activations(HOOKS[0]).rows(3)


def test_wrong_input(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    with pytest.raises(InputError, match="No hook 'blocks.7.hook_resid_post'"):
        collect(run, tiny, ["blocks.7.hook_resid_post"], contexts())
    with pytest.raises(InputError, match="not one context of 16 tokens"):
        collect(run, tiny, HOOKS, iter(()))
    with pytest.raises(InputError, match="was made with n_tokens 320, not 640"):
        new_run(tmp_path / "run", n_tokens=640)
    with pytest.raises(InputError, match="is no run"):
        Run.open(tmp_path / "nothing")
