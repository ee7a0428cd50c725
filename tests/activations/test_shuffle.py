"""The order: seeded, every training row once an epoch, any point reached from its cursor, the same for all readers."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

import activations.capture
from activations.cache import training_mask
from activations.capture import collect
from activations.errors import InputError
from activations.live import LiveActivations
from activations.model import Model
from activations.shards import Shards
from activations.shuffle import START, Cursor, Shuffled
from tests.activations.test_capture import HOOKS, contexts, new_run
from tests.tiny import HOOK, planted_run, tiny_model, tiny_tokenizer

BUDGETS = [1 << 30, 20_000]


@pytest.fixture
def cache(tmp_path):
    rows = torch.arange(3000 // 16 * 16).float()[:, None].expand(-1, 4).contiguous()
    return planted_run(tmp_path / "run", rows).activations(HOOK)


@pytest.fixture
def tiny(monkeypatch) -> Model:
    monkeypatch.setattr(activations.capture, "ROWS_PER_SHARD", 64)
    return Model("tiny", "0", tiny_model(), tiny_tokenizer())


def take(shuffled: Shuffled, n: int, start: Cursor = START) -> list[tuple[torch.Tensor, Cursor]]:
    hook = shuffled.sources[0].hook
    return [(rows[hook], cursor) for rows, cursor in itertools.islice(shuffled.batches(start), n)]


def training_rows(cache) -> torch.Tensor:
    return torch.cat([cache.rows(i)[training_mask(cache, i)] for i in range(cache.n_shards)])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("order", ["shuffled", "stream"])
def test_each_training_row_once_an_epoch_across_windows(cache, budget, order):
    expected = training_rows(cache)[:, 0].long()
    n = len(expected)
    batches = take(Shuffled(cache, batch=100, seed=0, budget=budget, order=order), 2 * n // 100 + 1)
    stream = torch.cat([rows for rows, _ in batches])[:, 0].long()
    first, second = stream[:n], stream[n : 2 * n]
    assert torch.equal(first.sort().values, expected.sort().values)
    assert torch.equal(second.sort().values, expected.sort().values)
    assert not torch.equal(first, second)
    assert (first.diff().abs() == 1).float().mean() < 0.05  # neighbours in the text are no neighbours here


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("order", ["shuffled", "stream"])
def test_any_point_is_reached_from_its_cursor(cache, budget, order):
    def shuffled() -> Shuffled:
        return Shuffled(cache, batch=130, seed=3, budget=budget, order=order)

    whole = take(shuffled(), 50)
    for served in range(1, 50, 7):
        rest = take(shuffled(), 50 - served, whole[served - 1][1])
        for (a, at), (b, there) in zip(whole[served:], rest, strict=True):
            assert torch.equal(a, b)
            assert at == there


def test_the_seed_decides(cache):
    a, b = (take(Shuffled(cache, batch=64, seed=seed), 1)[0][0] for seed in (0, 1))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("world", [2, 5])
def test_ranks_read_one_order_whatever_their_number(cache, budget, world):
    alone = take(Shuffled(cache, batch=130, seed=3, budget=budget), 30)
    shares = [
        take(Shuffled(cache, batch=130, seed=3, budget=budget, rank=rank, world=world), 30) for rank in range(world)
    ]
    for (rows, cursor), *parts in zip(alone, *shares, strict=True):
        assert {at for _, at in parts} == {cursor}
        for rank, (part, _) in enumerate(parts):
            assert torch.equal(part, rows[rank::world])
    with pytest.raises(InputError, match="130 rows cannot be shared by 4 ranks: take a multiple of 4"):
        Shuffled(cache, batch=130, seed=0, world=4)


def test_several_hooks_stay_aligned_through_what_all_their_masks_keep(tiny, tmp_path):
    loud = tiny.hf.get_input_embeddings().weight.data
    loud[7] *= 1000  # a sink in the residual stream and not in the MLP's output
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS, contexts(), dtype="float32")
    caches = [run.activations(hook) for hook in HOOKS]
    masks = [torch.cat([training_mask(cache, i) for i in range(5)]) for cache in caches]
    assert not torch.equal(*masks)
    n = int((masks[0] & masks[1]).sum())
    # The stricter mask comes second, so that the first one's alone would let sinks through.
    rows, _ = next(Shuffled(caches[::-1], batch=n, seed=0).batches())
    whole = [torch.cat([cache.rows(i) for i in range(5)])[masks[0] & masks[1]] for cache in caches]
    for one, two in zip(rows[HOOKS[0]], rows[HOOKS[1]], strict=True):
        at = int((whole[0] == one).all(dim=1).nonzero()[0])
        assert torch.equal(whole[1][at], two)


def test_the_model_itself_gives_the_stream_that_a_cache_of_it_gives(tiny, tmp_path):
    run = new_run(tmp_path / "run")
    collect(run, tiny, HOOKS[:1], contexts())
    disk, live = run.activations(HOOKS[0]), LiveActivations(run, tiny, HOOKS[0])
    assert live.sink_threshold == disk.sink_threshold
    assert live.opening_moments.mean_norm == disk.opening_moments.mean_norm
    streams = [take(Shuffled(source, batch=50, seed=1, order="stream"), 9) for source in (disk, live)]
    for (a, at), (b, there) in zip(*streams, strict=True):
        assert torch.equal(a, b)
        assert at == there


def test_a_reader_follows_a_capture_and_sees_what_a_later_one_does(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("activations.shuffle.STREAM_SHARDS", 2)
    run = new_run(tmp_path / "run")
    write = Shards.write

    def slow(self, i, tensors, **record):
        time.sleep(0.15)
        write(self, i, tensors, **record)

    monkeypatch.setattr(Shards, "write", slow)
    capture = threading.Thread(target=collect, args=(run, tiny, HOOKS[:1], contexts()))
    capture.start()
    while HOOKS[0] not in run.hooks():
        time.sleep(0.01)
    growing = run.activations(HOOKS[0], follow=True)
    first = take(Shuffled(growing, batch=50, seed=1, order="stream"), 2)
    was_growing = not growing.complete
    followed = first + take(Shuffled(growing, batch=50, seed=1, order="stream"), 10, first[-1][1])
    capture.join()
    assert was_growing
    later = take(Shuffled(run.activations(HOOKS[0]), batch=50, seed=1, order="stream"), 12)
    for (a, at), (b, there) in zip(followed, later, strict=True):
        assert torch.equal(a, b)
        assert at == there


def test_a_reader_of_a_dead_capture_is_told(tiny, tmp_path):
    run = new_run(tmp_path / "run")

    def dying():
        yield from contexts(9)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(run, tiny, HOOKS[:1], dying())
    with pytest.raises(InputError, match="nobody is capturing them: run `sae collect"):
        take(Shuffled(run.activations(HOOKS[0], follow=True), batch=50, seed=1, order="stream"), 12)


def test_no_training_row_is_said(tmp_path):
    run = planted_run(tmp_path / "run", torch.ones(32, 4), n_docs=1)
    from activations.cache import held_out

    number = int(held_out(torch.arange(100, dtype=torch.int32)).nonzero()[0])
    tokens = Shards(run.path / "activations" / "tokens")
    columns = tokens.load(0) | {"doc_numbers": torch.tensor([number], dtype=torch.int32)}
    tokens.write(0, columns)  # as if all of the text were one held-out document
    for budget in BUDGETS:
        with pytest.raises(InputError, match="no training row"):
            take(Shuffled(run.activations(HOOK), batch=4, seed=0, budget=budget), 1)
    with pytest.raises(InputError, match="no training row"):
        take(Shuffled(run.activations(HOOK), batch=4, seed=0, budget=1), 1)  # a window of one shard, which is all


def test_a_window_is_bounded_by_the_budget(cache):
    """Two windows are held: the one that is read and the next."""
    shuffled = Shuffled(cache, batch=64, seed=0, budget=40_000)
    sizes = [sum(x.nbytes for x in rows.values()) for *_, rows, _ in itertools.islice(shuffled._windows(START), 9)]
    assert max(sizes) <= 20_000
    assert np.mean(sizes) > 10_000
