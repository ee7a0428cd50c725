"""Sizes of a run's parts, and dropping those that can be made again."""

import shutil
from contextlib import ExitStack
from pathlib import Path

from activations.files import lock
from activations.run import Run
from data.store.schema import STORE_FILE

UNFINISHED = (".index", f".{STORE_FILE}.building")
"""Folders of an index that is not done, beside the store."""


def clean(run: Run, *, activations: bool = True, checkpoints: bool = True, dry_run: bool = False) -> dict[Path, int]:
    """Drop the rows cached at every hook, the checkpoints of finished dictionaries and, with these, what a killed index
    left; returns what went, in bytes.

    Tokens stay, so that the same rows can be collected again. dry_run: drop nothing.
    Raises InputError, before anything is dropped, when some of it is in use.
    """
    doomed = []
    with ExitStack() as locks:
        if activations:
            for hook in run.hooks():
                locks.enter_context(lock(run.path / "activations" / ".locks" / f"{hook}.lock"))
                doomed.append(run.path / "activations" / hook)
        if checkpoints:
            for folder in run.dictionaries():
                if (folder / "checkpoints").is_dir():
                    locks.enter_context(lock(folder / ".train.lock"))
                    doomed.append(folder / "checkpoints")
                if unfinished := [path for path in (folder / name for name in UNFINISHED) if path.is_dir()]:
                    locks.enter_context(lock(folder / ".index.lock"))
                    doomed += unfinished
        sizes = {path: size_of(path) for path in doomed}
        for path in [] if dry_run else doomed:
            # What names it first: something half removed must not pass for whole.
            for name in ("manifest.json", "plan.json", "of.txt"):
                (path / name).unlink(missing_ok=True)
            shutil.rmtree(path)
    return sizes


def size_of(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
