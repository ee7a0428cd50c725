"""Capture: sequences of tokens in, shards of activations out, many hooks in one pass that stops at the last one.

Three things go on at once: a thread tokenises and writes the tokens' shards (once a run), the model runs over each as
it comes, and threads hash and write the rows of the shards before. Several ranks take turns over the shards. What is
written of a shard depends on the shard alone, so a killed capture goes on and ends in the same bytes.

Sinks: rows whose norm is over 5 times the median of the first 64 sequences at that hook. They are 0.2 % of the tokens
and nearly all of the variance in the middle of many models, so whatever is fitted or scored leaves them out.
"""

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor
from tqdm import tqdm

from activations.cache import GRADIENT_SUFFIX, POLL_SECONDS, SINK_FACTOR, SINK_SEQUENCES
from activations.errors import InputError
from activations.files import is_locked, lock, safe_name
from activations.forward import OnRows, rows_at, rows_with_gradients, widths
from activations.hooks import heads_of, resolve
from activations.model import DTYPES, Model
from activations.moments import Moments, merge
from activations.ranks import Ranks
from activations.run import Run
from activations.shards import Shards
from activations.tokens import Tokens, from_disk, to_disk
from activations.writer import MOST_SETS, SETS, Writer

ROWS_PER_SHARD = 1 << 16
MEMORY = 4 << 30
STORED = {**DTYPES, "float8": torch.float8_e4m3fn}
"""Precisions of stored rows; float8 has a scale a row."""

Say = Callable[[str], None]


@runtime_checkable
class TokenSequence(Protocol):
    """What goes through the model by itself; `data.tokens.Context` is one."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def docs(self) -> np.ndarray: ...
    @property
    def roles(self) -> np.ndarray | None: ...
    @property
    def labels(self) -> np.ndarray | None: ...


class Part(NamedTuple):
    """One shard's worth of work."""

    number: int
    positions: Int32[Tensor, " rows"]
    rows: Callable[[Sequence[str], OnRows], dict[str, Tensor]]
    """Computes the rows at some hooks, on the device."""


def collect(
    run: Run,
    model: Model,
    hooks: Sequence[str],
    sequences: Iterable[TokenSequence],
    *,
    dtype: str = "bfloat16",
    gradients: bool = False,
    categories: Mapping[str, Sequence[str]] | None = None,
    rows_per_batch: int | None = None,
    memory: int = MEMORY,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    say: Say = lambda _: None,
) -> None:
    """Cache the activations at `hooks` of all `sequences` into the run.

    sequences: only read while the run's tokens are not all written; the same ones each time.
    dtype: of the stored rows: float32, bfloat16, float16, or float8 with a scale a row.
    gradients: store the gradient of the loss beside each row (`rows_with_gradients`).
    categories: names behind the numbers in the sequences' `roles` and `labels`.
    rows_per_batch: tokens in a forward pass; None takes what suits the device.
    memory: bytes of rows held at once. Hooks that do not fit together are taken in several passes.
    ranks: the processes that share the work; all call this with the same arguments.
    say: told in one line what will be written, before it is.
    Raises InputError for a hook that the model lacks, an empty corpus, a disk that is or would be full, a hook in use
    by another process, or a cache that was begun with other settings.
    """
    hooks = list(dict.fromkeys(hooks))
    for hook in hooks:
        resolve(model.hf, hook)
    folder = run.path / "activations"
    width = widths(model, hooks)
    bytes_of = {hook: row_bytes(width[hook], dtype, gradients=gradients) for hook in hooks}
    with ExitStack() as stack:
        caches = ranks.leader_first(lambda: begin(stack, folder, hooks, ranks))
        tokens = Shards(folder / "tokens")
        ranks.leader_first(lambda: check_disk(folder, run.meta["n_tokens"], caches, bytes_of, say, ranks))
        n_rows = min(ROWS_PER_SHARD, max(memory // (SETS * max(bytes_of.values())), 1))
        if tokens.has(0):  # cut by an earlier call, perhaps with more memory
            n_rows = tokens.entry(0)["rows"]
        n_rows = ranks.from_leader(n_rows)  # the others may look when the leader's thread is writing already
        stage = stack.enter_context(_TokenStage(tokens, sequences, n_rows, categories or {}, ranks))
        # Not before the leader holds its locks and has looked at what is there.
        ranks.barrier()
        facts = {
            hook: {
                "hook": hook,
                "model": run.meta["model"],
                "revision": run.meta["revision"],
                "dtype": dtype,
                "gradients": gradients,
                "d_in": width[hook],
                "heads": heads_of(model.hf, hook),
            }
            for hook in hooks
        }
        compute = rows_with_gradients if gradients else rows_at
        kept = computed_dtype(dtype)

        def parts() -> Iterator[Part]:
            for i in stage.shards():
                if i % ranks.world == ranks.rank:
                    ids, _, positions, *_ = from_disk(tokens.load(i))
                    yield Part(
                        i,
                        positions,
                        lambda wanted, on_rows, ids=ids, positions=positions: compute(  # type: ignore[misc]
                            model, ids, positions, wanted, kept, rows_per_batch, on_rows
                        ),
                    )

        for group in _groups(n_rows, bytes_of, memory):
            chosen = {hook: caches[hook] for hook in group}
            in_memory = [n_rows * bytes_of[hook] for hook in group]
            if model.device.type == "cuda":  # torch rounds pinned memory up to a power of two
                in_memory = [1 << (size - 1).bit_length() for size in in_memory]
            sets = max(min(memory // sum(in_memory), MOST_SETS), SETS)
            n_tokens = run.meta["n_tokens"]
            write_rows(chosen, parts(), facts, n_tokens=n_tokens, skip_first=True, sets=sets, ranks=ranks)


def write_rows(
    caches: Mapping[str, Shards],
    parts: Iterable[Part],
    facts: Mapping[str, Mapping[str, Any]],
    *,
    n_tokens: int,
    skip_first: bool,
    find_sinks: bool = True,
    sets: int = SETS,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
) -> None:
    """Compute and write the rows of all `parts` (this rank's) that `caches` lack; finish the caches.

    facts: of each hook, for its manifest; a cache that was begun with others is refused. skip_first: position 0 is no
    ordinary row. find_sinks: mark rows with a norm far above the median. sets: shards in memory at once.
    """
    for hook, cache in caches.items():
        _compare(cache, facts[hook])
    agreed = all("sink_threshold" in cache.manifest for cache in caches.values())
    n_shards = 0
    bar = tqdm(
        total=n_tokens // ranks.world,
        unit="token",
        unit_scale=True,
        desc="capture" if ranks.world == 1 else f"capture, 1 of {ranks.world}",
        disable=None if ranks.leads else True,
    )
    with Writer(sets) as writer, bar:
        for part in parts:
            n_shards = max(n_shards, part.number + 1)
            wanted = {hook: cache for hook, cache in caches.items() if cache.lacks(part.number)}
            if not wanted:
                bar.update(len(part.positions))
                continue
            columns = part.rows(list(wanted), lambda n: _tell(bar, n, writer))
            if not agreed:
                _agree_on_sinks(caches, columns, part.positions, facts, find_sinks, ranks)
                agreed = True
            ordinary_place = part.positions > 0 if skip_first else torch.ones(len(part.positions), dtype=torch.bool)
            for hook, cache in wanted.items():
                gradient = columns.pop(hook + GRADIENT_SUFFIX, None)
                writer.put(cache, part.number, columns.pop(hook), gradient, ordinary_place)
            writer.next_set()
        if not agreed and not ranks.leads:  # this rank had nothing to do
            _agree_on_sinks(caches, None, None, facts, find_sinks, ranks)
    ranks.barrier()
    if ranks.leads:
        n_shards = max(n_shards, *(len(cache) for cache in caches.values()))
        for cache in caches.values():
            _finish(cache, n_shards)
    ranks.barrier()  # a rank that is done must find the manifests whole


def computed_dtype(stored: str) -> torch.dtype:
    """Precision of rows before they are written."""
    return torch.bfloat16 if stored == "float8" else STORED[stored]


def row_bytes(width: int, dtype: str, *, gradients: bool) -> int:
    """Bytes on disk of one row at one hook."""
    own = width * STORED[dtype].itemsize + (4 if dtype == "float8" else 0) + 1
    return own + (width * (4 if dtype == "float32" else 2) if gradients else 0)


def write_tokens(
    run: Run, sequences: Iterable[TokenSequence], categories: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Write the run's tokens alone, as `collect` would before the rest. Raises InputError."""
    tokens = Shards(run.path / "activations" / "tokens")
    with _TokenStage(tokens, sequences, ROWS_PER_SHARD, categories or {}, Ranks()) as stage:
        for _ in tqdm(stage.shards(), unit="shard", desc="tokens", disable=None):
            pass


def check_disk(
    folder: Path, n_tokens: int, caches: Mapping[str, Shards], bytes_of: Mapping[str, int], say: Say, ranks: Ranks
) -> None:
    """Say what will be written, and refuse to begin what the disk cannot hold."""
    left = {hook: n_tokens - sum(cache.entry(i)["rows"] for i in range(len(cache))) for hook, cache in caches.items()}
    need = sum(max(n, 0) * bytes_of[hook] for hook, n in left.items() if not caches[hook].complete)
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise InputError(
            f"The activations need {need / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB free: "
            "lower --tokens, take fewer hooks, a smaller --dtype, or put the run elsewhere."
        )
    if need and ranks.leads:
        hooks = f"{len(caches)} hooks" if len(caches) > 1 else "1 hook"
        say(f"{n_tokens:,} tokens, {hooks}: {need / 1e9:.2f} GB to {folder} ({free / 1e9:.2f} GB free)")


class _TokenStage:
    """Writes the run's tokens in a thread of the leader, while `shards` gives the numbers of those that are there."""

    def __init__(
        self,
        tokens: Shards,
        sequences: Iterable[TokenSequence],
        rows_per_shard: int,
        categories: Mapping[str, Sequence[str]],
        ranks: Ranks,
    ) -> None:
        self._tokens, self._sequences, self._categories = tokens, sequences, categories
        self._rows_per_shard = rows_per_shard
        self._lock = tokens.folder.parent / ".locks" / "tokens.lock"
        self._leads = ranks.leads
        self._locks = ExitStack()
        self._thread = threading.Thread(target=self._work, name="tokens", daemon=True)
        self._stop = threading.Event()
        self._error: BaseException | None = None

    def __enter__(self) -> "_TokenStage":
        # Another capture of this run may be writing the tokens: then this one follows it, as other ranks follow.
        if self._leads and not self._tokens.complete and not is_locked(self._lock):
            self._locks.enter_context(lock(self._lock))
            self._tokens.tidy()
            self._thread.start()
        elif self._leads and self._tokens.complete:
            self._tokens.tidy()  # whoever completed it may have been killed just then
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._locks.close()

    def shards(self) -> Iterator[int]:
        """Numbers of the tokens' shards, each once it is there."""
        for i in itertools.count():
            while not self._tokens.has(i):
                if self._error is not None:
                    raise self._error
                if self._tokens.complete and not self._tokens.has(i):
                    return
                if not is_locked(self._lock) and not self._tokens.has(i) and not self._tokens.complete:
                    raise InputError(f"Whoever wrote {self._tokens.folder} stopped: run `sae collect` again to go on.")
                time.sleep(POLL_SECONDS)
            yield i

    def _work(self) -> None:
        try:
            n = _write_tokens(self._tokens, self._sequences, self._rows_per_shard, self._stop)
            if not self._stop.is_set():
                self._tokens.finish(n, **{name: list(names) for name, names in self._categories.items()})
        except BaseException as error:
            self._error = error


def _write_tokens(
    tokens: Shards, sequences: Iterable[TokenSequence], rows_per_shard: int, stop: threading.Event
) -> int:
    """Write whole sequences into shards of at most `rows_per_shard` tokens; returns the number of shards."""
    number = 0
    for number, part in enumerate(_parts_of(sequences, rows_per_shard), 1):
        if stop.is_set():
            break
        if tokens.lacks(number - 1):  # else it was written before this process was started again
            # Unflushed: they are small and come first, and the flush of a small file waits for all the large ones.
            tokens.write(number - 1, to_disk(_tokens_of(part)), sync=False)
    if number == 0:
        raise InputError("The corpus has no sequence of tokens: give more text, or a smaller --context.")
    return number


def _parts_of(sequences: Iterable[TokenSequence], rows_per_shard: int) -> Iterator[list[TokenSequence]]:
    part: list[TokenSequence] = []
    size = 0
    for sequence in sequences:
        if part and size + len(sequence.ids) > rows_per_shard:
            yield part
            part, size = [], 0
        part.append(sequence)
        size += len(sequence.ids)
    if part:
        yield part


def _tokens_of(part: Sequence[TokenSequence]) -> Tokens:
    lengths = [len(sequence.ids) for sequence in part]
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(sum(lengths), dtype=np.int32) - np.repeat(starts, lengths).astype(np.int32)
    roles = [sequence.roles for sequence in part if sequence.roles is not None]
    labels = [sequence.labels for sequence in part if sequence.labels is not None]
    return Tokens(
        ids=torch.from_numpy(np.concatenate([sequence.ids for sequence in part])),
        docs=torch.from_numpy(np.concatenate([sequence.docs for sequence in part])),
        positions=torch.from_numpy(positions),
        roles=torch.from_numpy(np.concatenate(roles)) if roles else None,
        labels=torch.from_numpy(np.concatenate(labels)) if labels else None,
    )


def begin(stack: ExitStack, folder: Path, hooks: Sequence[str], ranks: Ranks) -> dict[str, Shards]:
    """The hooks' folders, locked by the leader."""
    for hook in hooks:
        if safe_name(hook) == "tokens":
            raise InputError("A hook cannot be called 'tokens': that folder holds the token ids.")
        if ranks.leads:
            stack.enter_context(lock(folder / ".locks" / f"{hook}.lock"))
    caches = {hook: Shards(folder / hook) for hook in hooks}
    for cache in caches.values() if ranks.leads else ():
        cache.tidy()
    return caches


def _groups(rows_per_shard: int, bytes_of: Mapping[str, int], memory: int) -> list[list[str]]:
    """Hooks that are captured together: as many as `memory` holds."""
    groups: list[list[str]] = []
    room = 0
    for hook, size in bytes_of.items():
        need = SETS * rows_per_shard * size
        if groups and need <= room:
            groups[-1].append(hook)
            room -= need
        else:
            groups.append([hook])
            room = memory - need
    return groups


def _compare(cache: Shards, facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        if name in cache.manifest and cache.manifest[name] != value:
            raise InputError(
                f"{cache.folder} was begun with {name} {cache.manifest[name]!r}, not {value!r}: use the same, or "
                "give the new run another folder."
            )


def _agree_on_sinks(
    caches: Mapping[str, Shards],
    columns: Mapping[str, Tensor] | None,
    positions: Tensor | None,
    facts: Mapping[str, Mapping[str, Any]],
    find_sinks: bool,
    ranks: Ranks,
) -> None:
    """Begin the manifests that are not: the leader, whose first shard is the run's, finds what a sink is for all."""
    if ranks.leads:
        assert columns is not None
        assert positions is not None
        for hook, cache in caches.items():
            if "sink_threshold" not in cache.manifest:
                starts = (positions == 0).nonzero().flatten()
                end = int(starts[SINK_SEQUENCES]) if len(starts) > SINK_SEQUENCES else len(positions)
                median = columns[hook][:end].float().norm(dim=1).median().item()
                threshold = SINK_FACTOR * median if find_sinks else None
                cache.update(**facts[hook], median_norm=median, sink_threshold=threshold)
    ranks.from_leader(None)
    for cache in caches.values():
        cache.refresh()


def _finish(cache: Shards, n_shards: int) -> None:
    """Gather the shards' records and moments into the manifest."""
    if cache.complete:
        cache.finish(n_shards)
        return
    names = ("n", "mean", "m2", "norms")
    whole = merge(Moments(**{name: cache.tensor(i, name) for name in names}) for i in range(n_shards))
    cache.finish(
        n_shards,
        n_ordinary=int(whole.n),
        n_sinks=sum(int(cache.tensor(i, "n_sinks")) for i in range(n_shards)),
        mean_norm=whole.mean_norm if int(whole.n) else 0.0,
        norms=float(whole.norms),
        mean=whole.mean.tolist(),
        m2=whole.m2.tolist(),
    )


def _tell(bar: "tqdm[Any]", n_rows: int, writer: Writer) -> None:
    bar.set_postfix_str(f"{writer.n_bytes / 1e9:.2f} GB", refresh=False)
    bar.update(n_rows)
