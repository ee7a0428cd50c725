"""Shuffled batches of cached activations, seekable: the whole state is how many batches were served.

Each epoch permutes the shards, loads as many as fit in the memory budget (a window), and permutes the rows inside the
window; both permutations are derived from (seed, epoch, window), so nothing but a count has to be saved. Every training
row is visited once an epoch; a batch may straddle windows and epochs.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations.shards import CachedActivations


class Shuffled:
    """Batches of the training rows of `cache`, without end.

    batch: rows in a batch. budget: bytes of rows held in memory at once; below the size of the cache, mixing is by
    window.
    """

    def __init__(self, cache: CachedActivations, *, batch: int, seed: int, budget: int = 4 << 30) -> None:
        assert cache.n_training > 0, "a cache without training rows"
        self.cache, self.batch, self.seed, self.budget = cache, batch, seed, budget
        self._loaded: tuple[list[int], Tensor] = ([], torch.empty(0))

    def batches(self, served: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Batches from the one after the first `served`, in the dtype of the cache, on the CPU."""
        pieces: list[Tensor] = []
        missing = self.batch
        for rows, order in self._windows(served * self.batch):
            for chosen in _split(order, missing, self.batch):
                pieces.append(rows[chosen])
                missing -= len(chosen)
                if missing == 0:
                    yield torch.cat(pieces) if len(pieces) > 1 else pieces[0]
                    pieces, missing = [], self.batch

    def _windows(self, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows of a window, order in which to read them), after the first `skip` rows of all epochs."""
        counts = self.cache.training_of
        first_epoch, skip = divmod(skip, self.cache.n_training)
        for epoch in itertools.count(first_epoch):
            for number, window in enumerate(self._shards_by_window(epoch)):
                n_rows = sum(counts[i] for i in window)
                if skip >= n_rows:
                    skip -= n_rows
                    continue
                order = torch.from_numpy(np.random.default_rng([self.seed, epoch, number, 1]).permutation(n_rows))
                yield self._rows(window), order[skip:]
                skip = 0

    def _shards_by_window(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.cache.n_shards).tolist()
        row_bytes = self.cache.d_in * getattr(torch, self.cache.dtype).itemsize
        windows: list[list[int]] = [[]]
        held = 0
        for i in order:
            size = self.cache.training_of[i] * row_bytes
            if windows[-1] and held + size > self.budget:
                windows.append([])
                held = 0
            windows[-1].append(i)
            held += size
        # One window holds all: then the order of its shards is of no matter, and keeping it fixed saves a reload.
        return windows if len(windows) > 1 else [sorted(order)]

    def _rows(self, window: list[int]) -> Tensor:
        if self._loaded[0] != window:
            self._loaded = ([], torch.empty(0))  # free the old window before the new one is read
            self._loaded = (window, torch.cat([self.cache.rows(i)[self.cache.training_mask(i)] for i in window]))
        return self._loaded[1]


def _split(order: Tensor, first: int, size: int) -> Iterator[Tensor]:
    """`order` in pieces: the first of `first`, the others of `size`, the last of what is left."""
    if len(order):
        yield order[:first]
    for start in range(first, len(order), size):
        yield order[start : start + size]
