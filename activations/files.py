"""Files that are whole or absent: write aside and rename, one lock a resource.

A reader never sees half a file, and a process killed at any instruction leaves the old file in place.
"""

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from activations.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


@contextmanager
def write_aside(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file or a folder to; rename it onto `path` on success.

    The temporary name is fixed, so what a killed writer left is overwritten by the next one. A folder may only replace
    nothing; a file replaces the old file. sync: the bytes and the name are on the disk when the block is left, so that
    a power cut takes nothing; without it a kill takes nothing either.
    """
    aside = path.with_name(f".{path.name}.partial")
    _remove(aside)
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        if sync:
            for each in [*aside.iterdir(), aside] if aside.is_dir() else [aside]:
                flush(each)
        os.replace(aside, path)
        if sync:
            flush(path.parent)
    except BaseException:
        _remove(aside)
        raise


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    """Write `value` as indented JSON, aside and renamed (`write_aside`)."""
    with write_aside(path, sync=sync) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError when the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: expected a file written by a `sae` command.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}): restore it, or make it again.") from None


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for the block, or raise InputError naming the holder.

    The operating system's lock ends with its process, so that of a dead holder is free at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = FileLock(path)
    try:
        holder.acquire(timeout=0)
    except Timeout:
        who = path.with_suffix(".holder")
        name = who.read_text(encoding="utf-8") if who.exists() else "another process"
        raise InputError(f"{path.parent} is in use by {name}: wait for it, or stop it, then try again.") from None
    try:
        path.with_suffix(".holder").write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        holder.release()


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock file `path` now."""
    holder = FileLock(path)
    try:
        holder.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # no such folder: nobody has ever locked it
        return False
    holder.release()
    return False


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn the errors of a full disk and of a folder that cannot be written to, inside the block, into InputError."""
    try:
        yield
    except Exception as error:
        path = getattr(error, "filename", None) or place
        if is_full(error):
            raise InputError(
                f"The disk is full at {path}: free some space and run the same command again; it goes on."
            ) from None
        if isinstance(error, OSError) and error.errno in _REFUSED:
            raise InputError(
                f"{path} cannot be written ({error.strerror}): give the rights, or choose another folder."
            ) from None
        raise


def is_full(error: BaseException) -> bool:
    """Whether the error is that of a full disk. safetensors tells the system's number in words alone."""
    return getattr(error, "errno", None) in _FULL or any(f"os error {number}" in str(error) for number in _FULL)


def safe_name(name: str) -> str:
    """Return `name` if it can be one component of a path inside a run, else raise InputError."""
    if not name or name.startswith(".") or len(name) > 200 or any(c in name for c in '/\\:\0\n*?"<>|'):
        raise InputError(
            f"{name!r} cannot be a name: expected letters, digits, '-', '_' or '.', not starting with '.'."
        )
    return name


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
