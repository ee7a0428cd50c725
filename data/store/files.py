"""Where a store lies, and how a file is put in its place: written aside, synced, renamed, never half there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.store.errors import StoreError
from data.store.schema import STORE_FILE


def store_folder(address: str | Path) -> Path:
    """The dictionary folder that `address` names: RUN (its only dictionary), RUN/ID, or the folder itself.

    Raises StoreError, with the choices, when there is none or more than one.
    """
    path = Path(address)
    try:
        return _folder_of(path)
    except OSError as error:  # a name that no file can have, or a folder that may not be looked into
        reason = error.strerror or str(error)
        raise StoreError(
            f"{path} cannot be looked up ({reason}): expected RUN, RUN/ID, or a folder with cfg.json"
        ) from None


def _folder_of(path: Path) -> Path:
    if (path / "cfg.json").is_file() or (path / STORE_FILE).is_file():
        return path
    if (path / "dictionaries").is_dir():
        choices = _dictionaries(path)
        if len(choices) == 1:
            return choices[0]
        if not choices:
            raise StoreError(f"{path} has no dictionary yet: train one with `sae train {path}`")
        raise StoreError(
            f"{path} has {len(choices)} dictionaries, expected the name of one: "
            + ", ".join(f"{path}/{choice.name}" for choice in choices)
        )
    inside = path.parent / "dictionaries" / path.name
    if path.name not in ("", ".", "..") and (inside / "cfg.json").is_file():
        return inside
    if (path.parent / "dictionaries").is_dir():
        names = ", ".join(f"{path.parent}/{choice.name}" for choice in _dictionaries(path.parent)) or "none yet"
        raise StoreError(f"{path.parent} has no dictionary {path.name!r}, expected one of: {names}")
    raise StoreError(f"{path} is no run and no dictionary folder: expected RUN, RUN/ID, or a folder with cfg.json")


def short_address(folder: Path) -> str:
    """The address that a person types for a dictionary folder: RUN/ID where it lies in a run."""
    if folder.parent.name == "dictionaries":
        return str(folder.parent.parent / folder.name)
    return str(folder)


def _dictionaries(run: Path) -> list[Path]:
    return sorted(folder for folder in (run / "dictionaries").iterdir() if (folder / "cfg.json").is_file())


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to; on success it is synced and renamed to `path`, else removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
