"""Where the files of a store lie: a folder on a disk here, object storage in `data.store.bucket`."""

import os
from abc import ABC, abstractmethod
from pathlib import Path

import duckdb
import pyarrow as pa

from data.store.errors import StoreError
from data.store.files import short_address
from data.store.schema import STORE_FILE

Listing = tuple[tuple[str, int, int], ...]
"""(name, size, time) of every part, oldest first: equal listings mean equal rows."""


class Place(ABC):
    """What a store asks of the place where it lies."""

    address: str
    """As a person types it."""
    names: tuple[str, ...]
    """The names of the folders that lead to it, its own the last."""
    file: str
    """`features.duckdb` as it is named in messages."""
    remedy: str
    """What to do when that file cannot be read."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder on a disk; StoreError where there is none."""

    @abstractmethod
    def check(self) -> None:
        """Raise StoreError unless that file is there."""

    @abstractmethod
    def attach(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Attach it, read-only, as `store`."""

    @abstractmethod
    def identity(self) -> tuple[int, int, int]:
        """Differs once another file has taken its place; zeros when there is none."""

    @abstractmethod
    def listing(self, kind: str) -> Listing:
        """The parts of 'explanations' or 'scores'."""

    @abstractmethod
    def source(self, kind: str, name: str) -> Path | pa.BufferReader:
        """A part, to read from. FileNotFoundError, now or on reading, when it has gone."""


class Disk(Place):
    """A dictionary's folder on a disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names = folder.absolute().parts
        self.address = short_address(folder)
        self.file = str(folder / STORE_FILE)
        self.remedy = f"build it again with `sae index {self.address} --overwrite`"

    @property
    def folder(self) -> Path:
        """See `Place`."""
        return self._folder

    def check(self) -> None:
        """See `Place`."""
        if not (self._folder / STORE_FILE).is_file():
            raise StoreError(f"{self._folder} has no feature store yet: build it with `sae index {self.address}`")

    def attach(self, connection: duckdb.DuckDBPyConnection) -> None:
        """See `Place`."""
        path = str((self._folder / STORE_FILE).resolve()).replace("'", "''")
        connection.execute(f"ATTACH '{path}' AS store (READ_ONLY)")

    def identity(self) -> tuple[int, int, int]:
        """See `Place`."""
        try:
            stat = (self._folder / STORE_FILE).stat()
        except FileNotFoundError:
            return (0, 0, 0)
        return (stat.st_ino, stat.st_mtime_ns, stat.st_size)

    def listing(self, kind: str) -> Listing:
        """See `Place`."""
        folder = self._folder / kind
        try:
            with os.scandir(folder) as entries:
                parts = [entry for entry in entries if is_part(entry.name)]
            found = [(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
        except FileNotFoundError:
            return () if not folder.is_dir() else self.listing(kind)
        return tuple(sorted(found))

    def source(self, kind: str, name: str) -> Path:
        """See `Place`."""
        return self._folder / kind / name


def is_part(name: str) -> bool:
    """Whether a file of that name is a part."""
    return name.startswith("part-") and name.endswith(".parquet")
