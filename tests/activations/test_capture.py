"""Capture writes what the model computes, marks sinks, adds hooks, goes on when killed, and says what is wrong."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import activations.capture
from activations.cache import CachedActivations, held_out_mask, scale_of, training_mask
from activations.capture import collect, row_bytes
from activations.errors import InputError
from activations.files import lock
from activations.model import Model
from activations.moments import merge, moments
from activations.run import Run
from activations.shards import Shards
from activations.shuffle import Shuffled
from activations.splice import read
from activations.writer import to_float8
from tests.tiny import tiny_model, tiny_tokenizer

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]


class Sequence(NamedTuple):
    ids: np.ndarray
    docs: np.ndarray
    roles: np.ndarray | None = None
    labels: np.ndarray | None = None


@pytest.fixture
def tiny() -> Model:
    return Model("tiny", "0", tiny_model(), tiny_tokenizer())


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(activations.capture, "ROWS_PER_SHARD", 64)


def contexts(n: int = 20, context: int = 16) -> list[Sequence]:
    rng = np.random.default_rng(0)
    return [
        Sequence(rng.integers(1, 101, context).astype(np.int32), np.full(context, i // 2, np.int32)) for i in range(n)
    ]


def ragged(lengths: list[int]) -> list[Sequence]:
    rng = np.random.default_rng(1)
    return [
        Sequence(rng.integers(1, 101, n).astype(np.int32), np.full(n, i, np.int32), (np.arange(n) % 3).astype(np.int8))
        for i, n in enumerate(lengths)
    ]


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


def all_rows(cache: CachedActivations) -> torch.Tensor:
    return torch.cat([cache.rows(i) for i in range(cache.n_shards)])


def files(run: Run) -> dict[str, bytes]:
    """All that a capture leaves, by name."""
    folder = run.path / "activations"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("[!.]*/*")}


def alone(model: Model, hook: str, ids: np.ndarray) -> torch.Tensor:
    with read(model, [hook]) as got:
        model(torch.from_numpy(ids).long()[None])
    return got[hook][0]


def test_rows_are_what_the_model_computes_in_one_order_for_all_hooks(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS, contexts(), dtype="float32", rows_per_batch=48)
    with read(tiny, HOOKS) as got:
        tiny(torch.from_numpy(np.stack([sequence.ids for sequence in contexts()])).long())
    for hook in HOOKS:
        cache = run.activations(hook)
        assert cache.n_shards == 5
        torch.testing.assert_close(all_rows(cache), got[hook].flatten(0, 1))
        tokens = cache.tokens(1)
        assert tokens.positions[:17].tolist() == [*range(16), 0]
        assert tokens.docs[0].item() == 2
        assert not cache.mask(0)[tokens.positions == 0].any()


def test_each_sequence_is_computed_as_if_it_were_alone(tiny, tmp_path):
    """Lengths of all kinds share a batch, one padded to the next."""
    run, given = new_run(tmp_path / "run"), ragged([5, 16, 1, 9, 16, 3, 30, 2, 64, 7])
    collect(run, tiny, HOOKS, given, dtype="float32", rows_per_batch=48)
    for hook in HOOKS:
        expected = torch.cat([alone(tiny, hook, sequence.ids) for sequence in given])
        torch.testing.assert_close(all_rows(run.activations(hook)), expected, atol=1e-5, rtol=1e-5)
    shards = [run.activations(HOOKS[0]).rows_of(i) for i in range(run.activations(HOOKS[0]).n_shards)]
    assert shards == [50, 32, 64, 7]  # whole sequences, at most 64 tokens


def test_gradients_are_the_slope_of_the_sequences_own_loss(tiny, tmp_path):
    from activations.splice import replace

    run, given = new_run(tmp_path / "run"), ragged([9, 16, 5])
    collect(run, tiny, HOOKS, given, dtype="float32", gradients=True)
    cache = run.activations(HOOKS[0])
    generator = torch.Generator().manual_seed(0)
    push = torch.randn(32, generator=generator).double() * 1e-5  # small beside the activations of this model
    row = 9 + 4  # token 4 of the second sequence
    ids = torch.from_numpy(given[1].ids).long()[None]
    tiny.hf.double()

    def loss(sign: float) -> float:
        change = torch.zeros(1, 16, 32, dtype=torch.float64)
        change[0, 4] = sign * push
        with torch.no_grad(), replace(tiny, HOOKS[0], lambda x, _: x + change):
            logits = tiny.hf(input_ids=ids).logits
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))

    slope = (loss(1.0) - loss(-1.0)) / 2
    tiny.hf.float()
    gradients = cache.gradients()
    assert float(gradients.rows(0)[row].double() @ push) == pytest.approx(slope, rel=1e-3)
    n = int(training_mask(cache, 0).sum())
    both, _ = next(Shuffled([cache, gradients], batch=n, seed=0).batches())  # aligned: the same rows of both
    at = [int((cache.rows(0) == x).all(dim=1).nonzero()[0]) for x in both[HOOKS[0]]]
    assert torch.equal(both[HOOKS[0] + " gradient"], gradients.rows(0)[at])
    plain = new_run(tmp_path / "plain")
    collect(plain, tiny, HOOKS[:1], given, dtype="float32")
    torch.testing.assert_close(all_rows(cache), all_rows(plain.activations(HOOKS[0])), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="cached without gradients"):
        plain.activations(HOOKS[0]).gradients()


def test_statistics_are_those_of_the_ordinary_rows(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS[:1], contexts(), dtype="float32")
    cache = run.activations(HOOKS[0])
    rows = torch.cat([cache.rows(i)[cache.mask(i)] for i in range(cache.n_shards)])
    torch.testing.assert_close(cache.mean, rows.mean(dim=0))
    assert cache.moments.mean_norm == pytest.approx(rows.norm(dim=1).mean().item(), rel=1e-6)
    torch.testing.assert_close(cache.moments.m2.float() / len(rows), rows.var(dim=0, correction=0))
    assert (rows * scale_of(cache.moments)).norm(dim=1).mean().item() == pytest.approx(32**0.5, rel=1e-5)
    kept = sum(int(training_mask(cache, i).sum() + held_out_mask(cache, i).sum()) for i in range(5))
    assert kept == cache.n_ordinary == 300


def test_moments_survive_a_mean_far_from_zero():
    """Sums of squares would lose all of this spread in float32."""
    rows = 3000.0 + torch.randn(10_000, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(10_000, generator=torch.Generator().manual_seed(1)) < 0.5
    norms = rows.norm(dim=1)
    whole = merge(moments(r, n, m) for r, n, m in zip(rows.split(700), norms.split(700), mask.split(700), strict=True))
    torch.testing.assert_close(whole.m2 / whole.n, rows[mask].double().var(dim=0, correction=0), rtol=1e-4, atol=0)
    assert int(whole.n) == int(mask.sum())


def test_sinks_are_marked_and_counted(tiny, tmp_path):
    loud = tiny.hf.get_input_embeddings().weight.data
    loud[7] *= 1000  # a token whose residual is far beyond the median
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS[:1], contexts(), dtype="float32")
    cache = run.activations(HOOKS[0])
    ids = torch.cat([cache.tokens(i).ids for i in range(cache.n_shards)])
    positions = torch.cat([cache.tokens(i).positions for i in range(cache.n_shards)])
    mask = torch.cat([cache.mask(i) for i in range(cache.n_shards)])
    assert torch.equal(mask, (positions > 0) & (ids != 7))
    assert cache.sink_share == pytest.approx(((ids == 7) & (positions > 0)).sum().item() / (positions > 0).sum().item())


def test_roles_choose_the_tokens(tiny, tmp_path):
    run, given = new_run(tmp_path / "run"), ragged([9, 16, 5, 40])
    names = ["template", "user", "assistant"]
    collect(run, tiny, HOOKS[:1], given, dtype="float32", categories={"roles": names})
    cache = run.activations(HOOKS[0], roles=["assistant"])
    tokens = [cache.tokens(i) for i in range(cache.n_shards)]
    assert cache.roles == names
    for i, part in enumerate(tokens):
        assert torch.equal(cache.mask(i), (part.roles == 2) & (part.positions > 0))
    rows = torch.cat([cache.rows(i)[cache.mask(i)] for i in range(cache.n_shards)])
    torch.testing.assert_close(cache.mean, rows.mean(dim=0))
    nobody = [Sequence(s.ids, s.docs, np.zeros(len(s.ids), np.int8)) for s in given]
    silent = new_run(tmp_path / "silent")
    collect(silent, tiny, HOOKS[:1], nobody, dtype="float32", categories={"roles": names})
    with pytest.raises(InputError, match="no ordinary row .of the chosen roles"):
        scale_of(silent.activations(HOOKS[0], roles=["assistant"]).moments)
    with pytest.raises(InputError, match="no role 'narrator': expected one of template, user, assistant"):
        run.activations(HOOKS[0], roles=["narrator"])


def test_float8_is_near_and_a_quarter_of_float32(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS[:1], contexts(), dtype="float8")
    exact = new_run(tmp_path / "exact")
    collect(exact, tiny, HOOKS[:1], contexts(), dtype="float32")
    rows, wanted = all_rows(run.activations(HOOKS[0])).float(), all_rows(exact.activations(HOOKS[0]))
    error = (rows - wanted).square().sum() / wanted.square().sum()
    assert 1e-5 < error < 1e-3  # three bits of mantissa: a few per cent a value
    assert row_bytes(32, "float8", gradients=False) == 32 + 4 + 1
    scaled, scales = to_float8(torch.tensor([[1.0, -896.0], [0.0, 0.0]]))
    assert scaled.float().tolist() == [[0.5, -448.0], [0.0, 0.0]]
    assert scales[0].item() == 2.0


def test_a_killed_capture_goes_on_and_ends_in_the_same_bytes(tiny, tmp_path, monkeypatch):
    whole = new_run(tmp_path / "whole")
    collect(whole, tiny, HOOKS, contexts())
    broken = new_run(tmp_path / "broken")
    write, left = Shards.write, [0]

    def dying(self, *args, **record):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self, *args, **record)

    monkeypatch.setattr(Shards, "write", dying)
    for survived in (3, 4, 2, 100):
        left[0] = survived
        try:
            collect(broken, tiny, HOOKS, contexts())
        except KeyboardInterrupt:
            with pytest.raises(InputError, match="sae collect"):  # unfinished, and it says what to do
                broken.activations(HOOKS[0])
    expected = files(whole)
    assert len(expected) == 3 * 6
    assert files(broken) == expected


def test_a_later_hook_joins_the_same_rows(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS[:1], contexts())
    before = (run.path / "activations/tokens/manifest.json").read_bytes()
    collect(run, tiny, HOOKS[1:], iter(()))  # the text is not needed any more
    assert run.hooks() == sorted(HOOKS)
    assert (run.path / "activations/tokens/manifest.json").read_bytes() == before


def test_hooks_that_do_not_fit_the_memory_together_are_taken_in_turn(tiny, tmp_path, monkeypatch):
    passes = []
    rows_at = activations.capture.rows_at
    monkeypatch.setattr(activations.capture, "rows_at", lambda *args: passes.append(args[3]) or rows_at(*args))
    run, together = new_run(tmp_path / "run"), new_run(tmp_path / "together")
    collect(together, tiny, HOOKS, contexts())
    assert passes == [HOOKS] * 5
    passes.clear()
    collect(run, tiny, HOOKS, contexts(), memory=4 * 64 * 65)  # four sets of 64 rows of one hook
    assert passes == [HOOKS[:1]] * 5 + [HOOKS[1:]] * 5
    for path in (run.path / "activations").rglob("*.safetensors"):
        assert path.read_bytes() == (together.path / path.relative_to(run.path)).read_bytes()


def test_a_flipped_byte_is_found_and_named_and_the_shard_can_be_made_again(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS[:1], contexts())
    path = run.path / "activations" / HOOKS[0] / "shard-00003.safetensors"
    good = path.read_bytes()
    for at in (0, 50, len(good) // 2, len(good) - 5):
        data = bytearray(good)
        data[at] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(InputError, match=r"shard-00003.safetensors is damaged .*remove that file and run .sae col"):
            run.activations(HOOKS[0]).check()
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"shard-00003.safetensors is damaged .*not those that were written"):
        run.activations(HOOKS[0]).check()
    path.write_bytes(good[:100])
    with pytest.raises(InputError, match="shard-00003.safetensors is damaged"):
        run.activations(HOOKS[0]).rows(3)
    path.unlink()
    collect(run, tiny, HOOKS[:1], contexts())
    assert path.read_bytes() == good
    run.activations(HOOKS[0]).check()


def test_a_second_capture_of_the_hook_is_refused_and_of_another_is_not(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    with lock(run.path / "activations" / ".locks" / f"{HOOKS[0]}.lock"):
        with pytest.raises(InputError, match=r"in use by process \d+ on"):
            collect(run, tiny, HOOKS[:1], contexts())
        collect(run, tiny, HOOKS[1:], contexts())
    collect(run, tiny, HOOKS[:1], contexts())


def test_wrong_input(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    with pytest.raises(InputError, match="No hook 'blocks.7.hook_resid_post'"):
        collect(run, tiny, ["blocks.7.hook_resid_post"], contexts())
    with pytest.raises(InputError, match="no sequence of tokens"):
        collect(run, tiny, HOOKS, iter(()))
    with pytest.raises(InputError, match="was made with n_tokens 320, not 640"):
        new_run(tmp_path / "run", n_tokens=640)
    with pytest.raises(InputError, match="is no run"):
        Run.open(tmp_path / "nothing")
    collect(run, tiny, HOOKS[:1], contexts())
    with pytest.raises(InputError, match="begun with dtype 'bfloat16', not 'float32': use the same"):
        collect(run, tiny, HOOKS[:1], contexts(), dtype="float32")
    huge = new_run(tmp_path / "huge", n_tokens=10**15)
    with pytest.raises(InputError, match=r"need 65000000.00 GB and .* free: lower --tokens"):
        collect(huge, tiny, HOOKS[:1], contexts())


def test_a_full_disk_stops_with_one_line_and_goes_on_later(tiny, tmp_path, monkeypatch):
    from activations import shards

    save, left = shards.save_file, [7]

    def filling(tensors, path):
        left[0] -= 1
        if left[0] < 0:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    whole, run = new_run(tmp_path / "whole"), new_run(tmp_path / "run")
    collect(whole, tiny, HOOKS, contexts())
    monkeypatch.setattr(shards, "save_file", filling)
    with pytest.raises(
        InputError, match=r"disk is full at .*: free some space and run the same command again"
    ) as error:
        collect(run, tiny, HOOKS, contexts())
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    monkeypatch.setattr(activations.capture, "ROWS_PER_SHARD", 64)
    collect(run, tiny, HOOKS, contexts())
    for path in (whole.path / "activations").rglob("*.safetensors"):
        assert path.read_bytes() == (run.path / path.relative_to(whole.path)).read_bytes()


def test_an_error_of_the_tokenizer_comes_through(tiny, tmp_path):
    def bad():
        yield from contexts(6)
        raise InputError("the corpus ends in nonsense")

    with pytest.raises(InputError, match="ends in nonsense"):
        collect(new_run(tmp_path / "run"), tiny, HOOKS, bad())
