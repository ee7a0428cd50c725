"""What `sae collect` cached at one hook, read back: rows, masks, tokens, statistics. Memory-mapped, read-only.

All hooks of a run share one row order: a row is a token, sequences stand one after another, each from position 0. The
mask keeps ordinary tokens, neither position 0 (of a language model) nor a sink; several hooks read together are read
through what all their masks keep (`together`).
"""

import copy
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from activations.errors import InputError
from activations.files import is_locked
from activations.moments import Moments, merge, moments
from activations.shards import Shards
from activations.tokens import Tokens, from_disk

SINK_FACTOR = 5.0
SINK_SEQUENCES = 64
OPENING_SHARDS = 4
"""Shards whose moments stand for all of them where later ones do not exist yet."""
POLL_SECONDS = 0.05
GRADIENT_SUFFIX = " gradient"
"""Behind a hook's name: the gradient there."""
_MOMENTS = ("n_ordinary", "mean", "m2", "norms")  # what the manifest calls them


class GivenUp(Exception):
    """The reader for whom rows were waited for, or computed, wants them no more."""


class Activations(ABC):
    """Rows at one hook, shard by shard: from disk (`CachedActivations`) or from the model (`LiveActivations`)."""

    hook: str

    def __init__(self) -> None:
        self.given_up = threading.Event()
        """Set while a reader in another thread is to stop waiting or computing (`GivenUp`)."""

    @property
    def parts(self) -> "list[Activations]":
        """Whose rows stand side by side in a row here, each with a scale of its own: see `activations.joined`."""
        return [self]

    @property
    @abstractmethod
    def d_in(self) -> int: ...

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""

    @property
    @abstractmethod
    def sink_threshold(self) -> float:
        """Norm above which a row is a sink; infinite for rows that are no tokens."""

    @property
    @abstractmethod
    def median_norm(self) -> float:
        """Median norm of the rows of the first 64 sequences."""

    @property
    @abstractmethod
    def opening_moments(self) -> Moments:
        """Of the first shards only, so that they are the same for a cache that is still growing."""

    @abstractmethod
    def has(self, i: int) -> bool:
        """True once shard i is there; False when there are fewer. May wait."""

    @abstractmethod
    def rows_of(self, i: int) -> int: ...

    @abstractmethod
    def rows(self, i: int) -> Float[Tensor, "rows d_in"]:
        """All rows of shard i, on the CPU."""

    @abstractmethod
    def mask(self, i: int) -> Bool[Tensor, " rows"]:
        """True on ordinary tokens (of the chosen roles)."""

    @abstractmethod
    def tokens(self, i: int) -> Tokens: ...


class CachedActivations(Activations):
    """The cache at `hook` in a run's `activations` folder.

    roles: keep only tokens that these say, of a chat ("assistant", ...); () for all. follow: open it also while
    `sae collect` still writes it; `has` waits then for the shards to come.
    Raises InputError when the cache is unfinished (unless `follow`), and for roles that the run has not.
    """

    def __init__(self, folder: Path, hook: str, *, roles: Sequence[str] = (), follow: bool = False) -> None:
        super().__init__()
        self.hook = hook
        self._column = "rows"
        self._folder = folder
        self._shards = Shards(folder / hook)
        self._tokens = Shards(folder / "tokens")
        if not follow and not self._shards.complete:
            raise InputError(
                f"The activations at {hook} are unfinished: run `sae collect {folder.parent}` again to go on."
            )
        if follow:
            self._wait(lambda: "sink_threshold" in self._shards.manifest or self._shards.complete)
        self._roles = self._numbers_of(roles)

    @property
    def complete(self) -> bool:
        return self._shards.complete

    @property
    def n_shards(self) -> int:
        """Number of shards; of an unfinished cache, those that are there."""
        return len(self._shards)

    @property
    def n_rows(self) -> int:
        return sum(self.rows_of(i) for i in range(self.n_shards))

    @property
    def d_in(self) -> int:
        return int(self._shards.manifest["d_in"])

    @property
    def heads(self) -> int | None:
        """How many heads a row joins: `rows.unflatten(1, (heads, -1))` takes them apart. None where there are none."""
        heads = self._shards.manifest.get("heads")
        return None if heads is None else int(heads)

    @property
    def dtype(self) -> str:
        """Precision on disk."""
        return str(self._shards.manifest["dtype"])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""
        return self.d_in * (4 if self.dtype == "float32" else 2)

    @property
    def has_gradients(self) -> bool:
        return bool(self._shards.manifest["gradients"])

    @property
    def sink_threshold(self) -> float:
        """Norm above which a row is a sink; infinite for rows that are no tokens."""
        threshold = self._shards.manifest["sink_threshold"]
        return math.inf if threshold is None else float(threshold)

    @property
    def median_norm(self) -> float:
        """Median norm of the rows of the first 64 sequences."""
        return float(self._shards.manifest["median_norm"])

    @property
    def roles(self) -> list[str]:
        """What `Tokens.roles` means; [] when this is no chat."""
        return list(self._tokens.manifest.get("roles", []))

    @property
    def labels(self) -> list[str]:
        """What `Tokens.labels` means; [] when the corpus has none."""
        return list(self._tokens.manifest.get("labels", []))

    def has(self, i: int) -> bool:
        """True once shard i is there; False when there are fewer. Waits while `sae collect` is at work.

        Raises InputError when the capture stopped before that shard.
        """
        self._wait(lambda: self._shards.has(i) or self._shards.complete)
        return self._shards.has(i)

    def rows_of(self, i: int) -> int:
        return int(self._shards.entry(i)["rows"])

    def offset(self, i: int) -> int:
        """Row number, over the run, of the first row of shard i."""
        return sum(self.rows_of(j) for j in range(i))

    def rows(self, i: int) -> Float[Tensor, "rows d_in"]:
        """All rows of shard i as stored, memory-mapped; float8 rows come scaled back, as bfloat16."""
        rows = self._shards.tensor(i, self._column)
        if rows.dtype == torch.float8_e4m3fn:
            return rows.bfloat16() * self._shards.tensor(i, "scales").bfloat16()[:, None]
        return rows

    def gradients(self) -> "CachedActivations":
        """The same tokens through the same mask; a row is the gradient of its sequence's summed cross-entropy (nats).

        `Shuffled([cache, cache.gradients()], ...)` reads both, aligned; the second is called HOOK + " gradient".
        Raises InputError when the cache was made without.
        """
        if not self.has_gradients:
            raise InputError(
                f"The activations at {self.hook} were cached without gradients: collect them in a new run, "
                "with --gradients."
            )
        other = copy.copy(self)
        other.hook, other._column = self.hook + GRADIENT_SUFFIX, "gradients"
        return other

    def mask(self, i: int) -> Bool[Tensor, " rows"]:
        """True on ordinary tokens (of the chosen roles)."""
        mask = self._shards.tensor(i, "mask")
        if not self._roles:
            return mask
        return mask & torch.isin(self._tokens.tensor(i, "roles"), torch.tensor(self._roles, dtype=torch.int8))

    def tokens(self, i: int) -> Tokens:
        return from_disk(self._tokens.load(i))

    @cached_property
    def moments(self) -> Moments:
        """Of all rows that the mask keeps."""
        facts = self._shards.manifest
        if self._roles or self._column != "rows" or not facts["complete"]:
            return self._moments(self.n_shards)
        n, mean, m2, norms = (torch.tensor(facts[name], dtype=torch.float64) for name in _MOMENTS)
        return Moments(n=n, mean=mean, m2=m2, norms=norms)

    @property
    def opening_moments(self) -> Moments:
        """Of the first shards only, so that they are the same for a cache that is still growing."""
        n = next((i for i in range(OPENING_SHARDS) if not self.has(i)), OPENING_SHARDS)
        return self._moments(n)

    @property
    def n_ordinary(self) -> int:
        return int(self.moments.n)

    @property
    def sink_share(self) -> float:
        """Share of the rows, those at position 0 apart, that are sinks; of a complete cache."""
        n_sinks, n_ordinary = (self._shards.manifest[name] for name in ("n_sinks", "n_ordinary"))
        return float(n_sinks / max(n_sinks + n_ordinary, 1))

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """Mean of the ordinary rows, float32."""
        return self.moments.mean.float()

    def check(self) -> None:
        """Compare all bytes with their hashes. Raises InputError naming a damaged file."""
        self._shards.check()
        self._tokens.check()

    def _moments(self, n_shards: int) -> Moments:
        if self._roles or self._column != "rows":  # the shards recorded the moments of all rows
            each = ((self.rows(i), self.mask(i)) for i in range(n_shards))
            return merge(moments(rows, rows.float().norm(dim=1), mask) for rows, mask in each)
        names = ("n", "mean", "m2", "norms")
        return merge(Moments(**{name: self._shards.tensor(i, name) for name in names}) for i in range(n_shards))

    def _numbers_of(self, roles: Sequence[str]) -> list[int]:
        for role in roles:
            if role not in self.roles:
                have = ", ".join(self.roles) or "none: it is no chat"
                raise InputError(f"{self._folder.parent} has no role {role!r}: expected one of {have}.")
        return [self.roles.index(role) for role in roles]

    def _wait(self, arrived: Callable[[], bool]) -> None:
        """Until `arrived`. Raises InputError when nobody is capturing this hook, so that it never will."""
        while not arrived():
            if self.given_up.is_set():
                raise GivenUp
            if not is_locked(self._folder / ".locks" / f"{self._shards.folder.name}.lock") and not arrived():
                raise InputError(
                    f"The activations at {self.hook} are unfinished and nobody is capturing them: run "
                    f"`sae collect {self._folder.parent}` to go on."
                )
            time.sleep(POLL_SECONDS)


def held_out(docs: Int32[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
    """True for tokens of held-out documents: one in 20, by a hash of the number, so that order does not matter."""
    return ((docs.long() * 2_654_435_761) >> 15) % 20 == 7


def training_mask(activations: Activations, i: int) -> Bool[Tensor, " rows"]:
    """True on ordinary tokens of the documents that are trained on."""
    return activations.mask(i) & ~held_out(activations.tokens(i).docs)


def held_out_mask(activations: Activations, i: int) -> Bool[Tensor, " rows"]:
    """True on ordinary tokens of held-out documents."""
    return activations.mask(i) & held_out(activations.tokens(i).docs)


def scale_of(moments: Moments) -> float:
    """What rows are multiplied by for training: it brings their mean norm to sqrt(d).

    Raises InputError when there is no row.
    """
    if not int(moments.n):
        raise InputError("There is no ordinary row (of the chosen roles): collect more text, or choose other roles.")
    return math.sqrt(len(moments.mean)) / moments.mean_norm
