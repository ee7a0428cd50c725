"""Activations on disk: safetensors shards and a manifest for each hook, token ids once a run.

All hooks share one row order: a row is a token, contexts stand one after another, a context starts at position 0. Each
hook's shard holds, beside the rows, a mask of ordinary tokens (neither position 0 nor a sink) and the sums that its
statistics are made of, so that statistics of an interrupted capture are exact.

Sinks: rows whose norm is over 5 times the median of the first 64 contexts at that hook. They are 0.2 % of the tokens
and nearly all of the variance in the middle of many models, so whatever is fitted or scored leaves them out.
"""

import hashlib
import math
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from activations.errors import InputError
from activations.files import read_json, write_aside, write_json

SINK_FACTOR = 5.0
SINK_CONTEXTS = 64


class Tokens(NamedTuple):
    """The tokens behind the rows of a shard."""

    ids: Int32[Tensor, " rows"]
    docs: Int32[Tensor, " rows"]
    """Number of the document in the corpus."""
    positions: Int32[Tensor, " rows"]
    """Position in the context."""


class Shards:
    """A folder of numbered safetensors files and their manifest.json (name, rows, SHA-256 of each)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "manifest.json"
        self.manifest: dict[str, Any] = read_json(path) if path.exists() else {"shards": [], "complete": False}

    def __len__(self) -> int:
        return len(self.manifest["shards"])

    def append(self, tensors: dict[str, Tensor], n_rows: int) -> None:
        """Write the next shard, then the manifest that names it: a killed writer leaves a shard that nobody names."""
        path = self._path(len(self))
        with write_aside(path) as aside:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
        entry = {"file": path.name, "rows": n_rows, "sha256": _sha256(path)}
        self.update(shards=[*self.manifest["shards"], entry])

    def update(self, **changes: Any) -> None:
        self.manifest = {**self.manifest, **changes}
        write_json(self.folder / "manifest.json", self.manifest)

    def tensor(self, i: int, name: str) -> Tensor:
        """One tensor of shard i, memory-mapped. Raises InputError naming a damaged file."""
        try:
            with safe_open(self._path(i), framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise self._damaged(i, str(error)) from None

    def load(self, i: int) -> dict[str, Tensor]:
        try:
            return load_file(self._path(i))
        except (SafetensorError, OSError) as error:
            raise self._damaged(i, str(error)) from None

    def check(self) -> None:
        """Compare every shard with its hash. Raises InputError naming the first that differs."""
        for i, entry in enumerate(self.manifest["shards"]):
            if not self._path(i).exists():
                raise self._damaged(i, "it is missing")
            if _sha256(self._path(i)) != entry["sha256"]:
                raise self._damaged(i, "its bytes are not those that were written")

    def _path(self, i: int) -> Path:
        return self.folder / f"shard-{i:05d}.safetensors"

    def _damaged(self, i: int, why: str) -> InputError:
        return InputError(f"{self._path(i)} is damaged ({why}): remove {self.folder} and run `sae collect` again.")


class CachedActivations:
    """What `sae collect` cached at one hook: rows, masks, tokens, statistics. Read-only."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.hook = hook
        self._shards = Shards(folder / hook)
        self._tokens = Shards(folder / "tokens")
        if not self._shards.manifest["complete"]:
            raise InputError(
                f"The activations at {hook} are unfinished: run `sae collect {folder.parent}` again to go on."
            )

    @property
    def n_shards(self) -> int:
        return len(self._shards)

    @property
    def n_rows(self) -> int:
        return sum(self.rows_of(i) for i in range(self.n_shards))

    @property
    def d_in(self) -> int:
        return int(self._shards.manifest["d_in"])

    @property
    def dtype(self) -> str:
        return str(self._shards.manifest["dtype"])

    @property
    def sink_threshold(self) -> float:
        """Norm above which a row is a sink."""
        return float(self._shards.manifest["sink_threshold"])

    @property
    def median_norm(self) -> float:
        """Median norm of the rows of the first 64 contexts."""
        return self.sink_threshold / SINK_FACTOR

    def rows_of(self, i: int) -> int:
        return int(self._shards.manifest["shards"][i]["rows"])

    def offset(self, i: int) -> int:
        """Row number, over the run, of the first row of shard i."""
        return sum(self.rows_of(j) for j in range(i))

    def rows(self, i: int) -> Float[Tensor, "rows d_in"]:
        """All rows of shard i as stored, memory-mapped."""
        return self._shards.tensor(i, "rows")

    def mask(self, i: int) -> Bool[Tensor, " rows"]:
        """True on ordinary tokens."""
        return self._shards.tensor(i, "mask")

    def tokens(self, i: int) -> Tokens:
        return Tokens(**self._tokens.load(i))

    def training_mask(self, i: int) -> Bool[Tensor, " rows"]:
        """True on ordinary tokens of the documents that are trained on."""
        return self.mask(i) & ~held_out(self.tokens(i).docs)

    def held_out_mask(self, i: int) -> Bool[Tensor, " rows"]:
        """True on ordinary tokens of held-out documents."""
        return self.mask(i) & held_out(self.tokens(i).docs)

    @cached_property
    def training_of(self) -> list[int]:
        """Number of training rows in each shard."""
        return [int(self.training_mask(i).sum()) for i in range(self.n_shards)]

    @property
    def n_training(self) -> int:
        return sum(self.training_of)

    def check(self) -> None:
        """Compare all bytes with their hashes. Raises InputError naming a damaged file."""
        self._shards.check()
        self._tokens.check()

    @cached_property
    def _sums(self) -> dict[str, Tensor]:
        names = ("n_ordinary", "n_sinks", "sum", "sum_square", "sum_norm")
        return {name: torch.stack([self._shards.tensor(i, name) for i in range(self.n_shards)]) for name in names}

    @property
    def n_ordinary(self) -> int:
        return int(self._sums["n_ordinary"].sum())

    @property
    def sink_share(self) -> float:
        """Share of the rows past position 0 that are sinks."""
        sinks = int(self._sums["n_sinks"].sum())
        return sinks / max(sinks + self.n_ordinary, 1)

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """Mean of the ordinary rows, float32."""
        return (self._sums["sum"].sum(dim=0) / self.n_ordinary).float()

    @property
    def mean_norm(self) -> float:
        """Mean norm of the ordinary rows."""
        return float(self._sums["sum_norm"].sum() / self.n_ordinary)

    @property
    def scale(self) -> float:
        """What rows are multiplied by for training: it brings their mean norm to sqrt(d_in)."""
        return math.sqrt(self.d_in) / self.mean_norm


def held_out(docs: Int32[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
    """True for tokens of held-out documents: one in 20, by a hash of the number, so that order does not matter."""
    return ((docs.long() * 2_654_435_761) >> 15) % 20 == 7


def statistics(rows: Float[Tensor, "rows d_in"], mask: Bool[Tensor, " rows"], n_sinks: int) -> dict[str, Tensor]:
    """The sums that a shard keeps of its ordinary rows, in float64."""
    ordinary = rows[mask].double()
    return {
        "n_ordinary": mask.sum(),
        "n_sinks": torch.tensor(n_sinks),
        "sum": ordinary.sum(dim=0),
        "sum_square": ordinary.square().sum(dim=0),
        "sum_norm": ordinary.norm(dim=1).sum(),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
