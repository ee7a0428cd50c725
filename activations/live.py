"""Activations straight from the model, none on disk: the same rows, in the same order, as a cache would hold.

The run's tokens are on disk; a shard of rows is computed when it is asked for, and the last few are kept. So training
resumes exactly: the rows of a window are computed again.
"""

import threading
from functools import cached_property, lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.cache import OPENING_SHARDS, SINK_FACTOR, SINK_SEQUENCES, Activations, GivenUp
from activations.errors import InputError
from activations.forward import rows_at
from activations.hooks import resolve
from activations.model import Model
from activations.moments import Moments, merge, moments
from activations.run import Run
from activations.shards import Shards
from activations.tokens import Tokens, from_disk


class LiveActivations(Activations):
    """Rows at `hook` of the run's tokens, computed by `model`.

    Raises InputError for a hook that the model lacks, and a run whose tokens are not all there.
    """

    dtype = "bfloat16"

    def __init__(self, run: Run, model: Model, hook: str, *, rows_per_batch: int | None = None) -> None:
        super().__init__()
        resolve(model.hf, hook)
        self.hook = hook
        self._model = model
        self._rows_per_batch = rows_per_batch
        self._tokens = Shards(run.path / "activations" / "tokens")
        if not self._tokens.complete:
            raise InputError(f"{run.path} has no tokens yet: run `sae collect {run.path} --tokens-only`.")
        # A pass over a shard costs more than its memory: keep those of a window in the order "stream", and one more.
        self._shard = lru_cache(maxsize=OPENING_SHARDS + 1)(self._compute)
        self._one_at_a_time = threading.Lock()

    @property
    def n_shards(self) -> int:
        return len(self._tokens)

    @cached_property
    def d_in(self) -> int:
        return int(self.rows(0).shape[1])

    @property
    def row_bytes(self) -> int:
        return self.d_in * 2

    @cached_property
    def median_norm(self) -> float:
        starts = (self.tokens(0).positions == 0).nonzero().flatten()
        end = int(starts[SINK_SEQUENCES]) if len(starts) > SINK_SEQUENCES else self.rows_of(0)
        return float(self.rows(0)[:end].float().norm(dim=1).median())

    @property
    def sink_threshold(self) -> float:
        return SINK_FACTOR * self.median_norm

    @cached_property
    def opening_moments(self) -> Moments:
        """Of the first shards."""
        each = ((self.rows(i), self.mask(i)) for i in range(min(OPENING_SHARDS, self.n_shards)))
        return merge(moments(rows, rows.float().norm(dim=1), mask) for rows, mask in each)

    def has(self, i: int) -> bool:
        return self._tokens.has(i)

    def rows_of(self, i: int) -> int:
        return int(self._tokens.entry(i)["rows"])

    def rows(self, i: int) -> Float[Tensor, "rows d_in"]:
        """All rows of shard i, on the CPU, as a cache would hold them."""
        return self._shard(i)

    def mask(self, i: int) -> Bool[Tensor, " rows"]:
        """True on ordinary tokens."""
        return (self.tokens(i).positions > 0) & (self.rows(i).float().norm(dim=1) <= self.sink_threshold)

    def tokens(self, i: int) -> Tokens:
        return from_disk(self._tokens.load(i))

    def _compute(self, i: int) -> Tensor:
        tokens = self.tokens(i)
        with self._one_at_a_time:  # the reader's thread and the one that looks ahead share the model
            rows = rows_at(
                self._model,
                tokens.ids,
                tokens.positions,
                [self.hook],
                getattr(torch, self.dtype),
                self._rows_per_batch,
                self._go_on,
            )
        return rows[self.hook].cpu()

    def _go_on(self, n_rows: int) -> None:
        del n_rows
        if self.given_up.is_set():
            raise GivenUp
