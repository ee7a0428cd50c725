"""Shuffled batches of activations, seekable: the whole state is a cursor of three numbers.

The order "shuffled" permutes the shards of each epoch, loads as many as fit in the memory budget (a window) and
permutes the rows inside it. The order "stream" takes the shards as they come, a few a window, so that it can follow a
capture that is still going on, or the model itself. Permutations are derived from (seed, epoch, window), so nothing but
the cursor has to be saved. Every training row is visited once an epoch; a batch may straddle windows and epochs.

Ranks that train together read one order whatever their number: of each batch of the order, rank r of n takes the rows
r, r + n, ...
"""

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.cache import Activations, held_out
from activations.errors import InputError

BUDGET = 4 << 30
STREAM_SHARDS = 4
GPU_SHARE = 0.3
"""A cache of at most this share of the GPU's memory is kept there whole."""

Rows = dict[str, Float[Tensor, "_rows _d"]]
"""Rows at one or several hooks, aligned."""
T = TypeVar("T")


class Cursor(NamedTuple):
    """A place in the order: the next row to be read."""

    epoch: int = 0
    window: int = 0
    row: int = 0


START = Cursor()


class Shuffled:
    """Batches of the training rows of `sources`, without end.

    sources: one hook, or several of one run, read through what the masks of all keep. batch: rows in a batch, of all
    ranks together. order: "shuffled" (complete caches) or "stream". budget: bytes of rows held at once; a cache that is
    larger is mixed by window. device: where the batches are wanted; windows are loaded there, and a GPU also holds a
    cache whole that takes at most `gpu_share` of its memory.
    Raises InputError when there is no training row, or `batch` does not divide by `world`.
    """

    def __init__(
        self,
        sources: Activations | Sequence[Activations],
        *,
        batch: int,
        seed: int,
        order: str = "shuffled",
        budget: int = BUDGET,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
        gpu_share: float = GPU_SHARE,
    ) -> None:
        assert order in ("shuffled", "stream"), order
        if batch % world:
            raise InputError(f"A batch of {batch} rows cannot be shared by {world} ranks: take a multiple of {world}.")
        self.sources = list(sources) if isinstance(sources, Sequence) else [sources]
        self.batch, self.seed, self.order, self.rank, self.world = batch, seed, order, rank, world
        self.device = device or torch.device("cpu")
        self.waited = 0.0
        """Seconds for which a reader waited for a window to be loaded."""
        if not self.sources[0].has(0):
            raise InputError(f"There are no activations at {self.sources[0].hook}: run `sae collect`.")
        shard_bytes = self.sources[0].rows_of(0) * sum(source.row_bytes for source in self.sources)
        # Half the budget: the next window is loaded while this one is read.
        self._per_window = STREAM_SHARDS if order == "stream" else max(budget // 2 // shard_bytes, 1)
        self._held: tuple[list[int], Rows] = ([], {})
        self._keep_in_gpu = order == "shuffled" and self._fits_in_gpu(gpu_share)
        self._in_gpu: dict[tuple[str, int], Tensor] = {}
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def batches(self, start: Cursor = START) -> Generator[tuple[Rows, Cursor], None, None]:
        """(this rank's rows of a batch, cursor behind the batch) from `start` on, in the dtype of the cache."""
        pieces: list[Rows] = []
        missing = self.batch
        seen = 0
        for epoch, window, rows, order in self._windows(start):
            if epoch > start.epoch and seen == 0:
                raise InputError(f"There is no training row at {self.sources[0].hook}: collect more text.")
            seen += len(order)
            at = start.row if (epoch, window) == start[:2] else 0
            while at < len(order):
                piece = order[at : at + missing]
                # A row's position in the batch decides whose it is; the piece begins at position batch - missing.
                own = piece[(self.rank + missing - self.batch) % self.world :: self.world]
                pieces.append({name: x.index_select(0, own) for name, x in rows.items()})
                at, missing = at + len(piece), missing - len(piece)
                if missing == 0:
                    yield _join(pieces), Cursor(epoch, window, at)
                    pieces, missing = [], self.batch

    def _windows(self, start: Cursor) -> Iterator[tuple[int, int, Rows, Int[Tensor, " rows"]]]:
        """(epoch, number, rows, order in which to read them) of each window from that of `start` on."""
        places = self._places(start)

        def load() -> tuple[int, int, Rows, Tensor]:
            epoch, number, shards = next(places)
            with torch.cuda.stream(self._stream):  # on a CPU, without one, this does nothing
                window = self._load(epoch, number, shards)
            if self._stream is not None:
                self._stream.synchronize()  # this thread waits for the copies, and nobody else
            return epoch, number, *window

        coming = _in_background(load)
        try:
            while True:
                began = time.perf_counter()
                window = coming.result()
                self.waited += time.perf_counter() - began
                for x in (window[3], *window[2].values()) if self._stream is not None else ():
                    # Made on the side stream: its memory may be given away again only when this one is done with it.
                    x.record_stream(torch.cuda.current_stream(self.device))
                coming = _in_background(load)
                yield window
        finally:  # leave no thread behind that still reads, or runs the model
            for source in self.sources:
                source.given_up.set()
            wait([coming])
            for source in self.sources:
                source.given_up.clear()

    def _places(self, start: Cursor) -> Iterator[tuple[int, int, list[int]]]:
        """(epoch, number, shards) of each window from that of `start` on."""
        for epoch in itertools.count(start.epoch):
            shards = self._shards_of(epoch)
            for number in itertools.count():
                window = list(itertools.islice(shards, self._per_window))
                if not window:
                    break
                if epoch > start.epoch or number >= start.window:
                    yield epoch, number, window

    def _shards_of(self, epoch: int) -> Iterator[int]:
        there = itertools.takewhile(lambda i: all(source.has(i) for source in self.sources), itertools.count())
        if self.order == "stream":
            return there
        shards = list(there)
        if len(shards) <= self._per_window:  # one window holds all: their order is of no matter, and saves a reload
            return iter(shards)
        return iter(np.random.default_rng([self.seed, epoch]).permutation(shards).tolist())

    def _load(self, epoch: int, number: int, shards: list[int]) -> tuple[Rows, Int[Tensor, " rows"]]:
        """The rows of a window and the order in which to read them, on the device."""
        if self._held[0] != shards:
            self._held = ([], {})  # the window before the one that is being read goes before the next one comes
            self._held = (shards, self._gather(shards))
        rows = self._held[1]
        n_rows = len(rows[self.sources[0].hook])
        order = torch.from_numpy(np.random.default_rng([self.seed, epoch, number, 1]).permutation(n_rows))
        return rows, order.to(self.device)

    def _gather(self, shards: Sequence[int]) -> Rows:
        """The training rows of some shards, one shard after another, on the device."""
        keep = [self._training_rows(i) for i in shards]
        n_rows = sum(len(chosen) for chosen in keep)
        out: Rows = {}
        for source in self.sources:
            at = 0
            for i, chosen in zip(shards, keep, strict=True):
                rows = self._shard(source, i)
                if at == 0:
                    out[source.hook] = torch.empty(n_rows, source.d_in, dtype=rows.dtype, device=self.device)
                part = out[source.hook][at : at + len(chosen)]
                torch.index_select(rows, 0, chosen.to(self.device), out=part)
                at += len(chosen)
        return out

    def _shard(self, source: Activations, i: int) -> Float[Tensor, "rows d"]:
        """Shard i on the device, from the GPU's copy of the cache where it has one."""
        if (source.hook, i) in self._in_gpu:
            return self._in_gpu[source.hook, i]
        rows = source.rows(i).to(self.device)
        if self._keep_in_gpu:
            self._in_gpu[source.hook, i] = rows
        return rows

    def _training_rows(self, i: int) -> Int[Tensor, " kept"]:
        """Numbers of the rows of shard i that are trained on: ordinary at every hook, and not held out."""
        mask = ~held_out(self.sources[0].tokens(i).docs)
        for source in self.sources:
            mask = mask & source.mask(i)
        return mask.nonzero().flatten()

    def _fits_in_gpu(self, share: float) -> bool:
        if self.device.type != "cuda":
            return False
        n_rows = sum(self.sources[0].rows_of(i) for i in self._shards_of(0))
        room = share * torch.cuda.get_device_properties(self.device).total_memory
        return n_rows * sum(source.row_bytes for source in self.sources) <= room


def _join(pieces: Sequence[Rows]) -> Rows:
    if len(pieces) == 1:
        return pieces[0]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _in_background(work: Callable[[], T]) -> "Future[T]":
    """Start `work` in a thread that does not keep the process alive (it may be waiting for a capture)."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="window", daemon=True).start()
    return future
