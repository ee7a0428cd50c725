"""A folder of numbered safetensors files: written one at a time by any number of processes, hashed, memory-mapped.

While it grows each shard has a small record beside it (`shard-00012.json`: rows and hash), written after the shard
itself: what has a record is whole. `finish` gathers the records into manifest.json. So nothing is lost when a writer is
killed, writers need not know of each other, and a reader can follow while others write.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from activations.errors import InputError
from activations.files import flush, is_full, read_json, write_aside, write_json

FORMAT = 2


class Shards:
    """The shards in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = {"format": FORMAT, "complete": False}
        self.refresh()

    def refresh(self) -> None:
        """Read the manifest again. Raises InputError when it is damaged or of another version."""
        path = self.folder / "manifest.json"
        if not path.exists():
            return
        manifest = read_json(path)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise InputError(
                f"{path} is damaged or of another version: run `sae clean {self.folder.parent.parent}`, then "
                "`sae collect` again."
            )
        self.manifest = manifest

    @property
    def complete(self) -> bool:
        """Whether all shards are there; looks again while they are not."""
        if not self.manifest["complete"]:
            self.refresh()
        return bool(self.manifest["complete"])

    def __len__(self) -> int:
        """Number of shards that stand without a gap."""
        if self.manifest["complete"]:
            return len(self.manifest["shards"])
        n = 0
        while self._record(n).exists():
            n += 1
        return n

    def has(self, i: int) -> bool:
        """Whether shard i is there, whole."""
        if self.manifest["complete"]:
            return i < len(self.manifest["shards"])
        # Between the two looks another process may finish and remove the records.
        return self._record(i).exists() or (self.complete and self.has(i))

    def entry(self, i: int) -> dict[str, Any]:
        """Rows, hash and whatever else was recorded of shard i."""
        if not self.manifest["complete"] and self._record(i).exists():
            entry: dict[str, Any] = read_json(self._record(i))
            return entry
        assert self.complete, f"shard {i} is not there yet"
        return dict(self.manifest["shards"][i])

    def lacks(self, i: int) -> bool:
        """Whether shard i is to be written: it is not there yet, or its file was removed because it was damaged."""
        return not self.has(i) or not self._path(i).exists()

    def write(self, i: int, tensors: Mapping[str, Tensor], *, sync: bool = True, **record: Any) -> None:
        """Write shard i and its record; the first tensor says how many rows there are.

        sync: the shard is on the disk when its record says that it is there; else only once `finish` has returned.
        Raises InputError when the disk is full; what was written before stays, and a later call goes on.
        """
        path = self._path(i)
        try:
            # One flush a shard, of its bytes: the record is renamed after the shard, so it reaches the disk after it.
            with write_aside(path, sync=False) as aside:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
                aside.chmod(0o644)  # safetensors leaves it to its owner alone
                if sync:
                    flush(aside)
            record = {"rows": len(next(iter(tensors.values()))), "sha256": _sha256(path), **record}
            if not self.manifest["complete"]:  # else it takes the place of a damaged one, and the record stands
                write_json(self._record(i), record, sync=False)
        except (OSError, SafetensorError) as error:
            if is_full(error):
                raise InputError(
                    f"The disk is full at {path}: free some space and run the same command again; it goes on there."
                ) from None
            raise InputError(f"{path} could not be written ({error}): mend that and run the command again.") from None

    def update(self, **facts: Any) -> None:
        """Add facts to the manifest."""
        self.refresh()
        self.manifest = {**self.manifest, **facts}
        write_json(self.folder / "manifest.json", self.manifest)

    def finish(self, n_shards: int, **facts: Any) -> None:
        """Gather the records of all `n_shards` shards into the manifest, which is complete then."""
        if not self.manifest["complete"]:
            for i in range(n_shards):
                flush(self._path(i))
            entries = [self.entry(i) for i in range(n_shards)]
            self.update(shards=entries, rows=sum(entry["rows"] for entry in entries), complete=True, **facts)
        self.tidy()

    def tidy(self) -> None:
        """Remove the records that the manifest has taken in, and what a killed writer left half done.

        Only for the one who holds the folder's lock, while nobody writes: safetensors has temporary files of its own.
        """
        done = self.folder.glob("shard-*.json") if self.complete else ()
        for path in [*done, *self.folder.glob(".tmp*"), *self.folder.glob(".*.partial")]:
            path.unlink(missing_ok=True)

    def tensor(self, i: int, name: str) -> Tensor:
        """One tensor of shard i, memory-mapped. Raises InputError naming a damaged file."""
        try:
            with safe_open(self._path(i), framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise self._damaged(i, str(error)) from None

    def load(self, i: int) -> dict[str, Tensor]:
        """All tensors of shard i."""
        try:
            return load_file(self._path(i))
        except (SafetensorError, OSError) as error:
            raise self._damaged(i, str(error)) from None

    def check(self) -> None:
        """Compare every shard that is there with its hash. Raises InputError naming the first that differs."""
        for i in range(len(self)):
            if not self._path(i).exists():
                raise self._damaged(i, "it is missing")
            if _sha256(self._path(i)) != self.entry(i)["sha256"]:
                raise self._damaged(i, "its bytes are not those that were written")

    def _path(self, i: int) -> Path:
        return self.folder / f"shard-{i:05d}.safetensors"

    def _record(self, i: int) -> Path:
        return self.folder / f"shard-{i:05d}.json"

    def _damaged(self, i: int, why: str) -> InputError:
        return InputError(f"{self._path(i)} is damaged ({why}): remove that file and run `sae collect` again.")


def _sha256(path: Path) -> str:
    """In large pieces: between two of them the interpreter's lock is taken from the forward pass."""
    digest = hashlib.sha256()
    piece = bytearray(4 << 20)
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(piece):
            digest.update(memoryview(piece)[:n])
    return digest.hexdigest()
