"""A store on object storage: S3, and whatever speaks its protocol. Read only.

DuckDB reads `features.duckdb` with its own reader, which fetches only the blocks that a question needs. It gets the
bytes through pyarrow's file system for S3, so nothing has to be installed: DuckDB's extension httpfs is a download for
every version of it. The name `objects` instead of `s3` keeps DuckDB from asking for that extension.

Keys and region come from where AWS' own tools look for them; AWS_ENDPOINT_URL names another server.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow as pa
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs

from data.store.errors import StoreError
from data.store.place import Listing, Place, is_part
from data.store.schema import STORE_FILE

Answer = TypeVar("Answer")
SCHEME = "s3://"
FRESH = 10.0
"""Seconds for which a listing of the parts is taken as true."""


class Bucket(Place):
    """A dictionary's folder in a bucket. May be used from any thread."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._key = self.address.removeprefix(SCHEME)
        if "/" not in self._key:
            raise StoreError(
                f"{address} is no folder in a bucket: expected s3://BUCKET/FOLDER, the dictionary's folder"
            )
        self.names = tuple(self._key.split("/"))
        self.file = f"{self.address}/{STORE_FILE}"
        self.remedy = "see that the whole file was copied there, and that the connection is up"
        self._lock = threading.Lock()
        self._listings: dict[str, tuple[float, Listing]] = {}
        self._first: tuple[int, int, int] | None = None
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        self._files = fs.S3FileSystem(endpoint_override=endpoint, region=region, connect_timeout=10, request_timeout=60)

    @property
    def folder(self) -> Path:
        """See `Place`: there is none."""
        raise StoreError(f"{self.address} is on object storage, which is read only here: copy it to a disk for that")

    def check(self) -> None:
        """See `Place`."""
        self._first = self.identity()
        if self._first == (0, 0, 0):
            raise StoreError(
                f"{self.address} holds no {STORE_FILE}: expected s3://BUCKET/FOLDER into which the files of a "
                "dictionary's folder were copied"
            )

    def attach(self, connection: duckdb.DuckDBPyConnection) -> None:
        """See `Place`."""
        connection.register_filesystem(_Objects(self._files))
        path = f"{_Objects.protocol}://{self._key}/{STORE_FILE}".replace("'", "''")
        connection.execute(f"ATTACH '{path}' AS store (READ_ONLY, TYPE duckdb)")

    def identity(self) -> tuple[int, int, int]:
        """See `Place`."""
        info = self._ask(lambda: self._files.get_file_info(f"{self._key}/{STORE_FILE}"))
        return (1, info.mtime_ns, info.size) if info.type == fs.FileType.File else (0, 0, 0)

    def listing(self, kind: str) -> Listing:
        """See `Place`; up to `FRESH` seconds old.

        Raises StoreError once another `features.duckdb` has been put in the place of the one that is open, whose blocks
        would be taken for this one's.
        """
        with self._lock:
            asked, listing = self._listings.get(kind, (-FRESH, ()))
            if time.monotonic() - asked < FRESH:
                return listing
            if self.identity() != self._first:
                raise StoreError(f"{self.file} has been replaced while it was open: open it again")
            selector = fs.FileSelector(f"{self._key}/{kind}", allow_not_found=True)
            found = self._ask(lambda: self._files.get_file_info(selector))
            listing = tuple(sorted((f.base_name, f.size, f.mtime_ns) for f in found if is_part(f.base_name)))
            self._listings[kind] = (time.monotonic(), listing)
            return listing

    def source(self, kind: str, name: str) -> pa.BufferReader:
        """See `Place`."""
        path = f"{self._key}/{kind}/{name}"
        return self._ask(lambda: pa.BufferReader(self._files.open_input_file(path).read_buffer()))

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except FileNotFoundError:
            self._listings.clear()  # so that who looks again sees what is there now
            raise
        except OSError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise StoreError(
                f"{self.address} cannot be reached ({reason}): check the address, the keys and AWS_ENDPOINT_URL"
            ) from error


class _Objects(ArrowFSWrapper):
    """pyarrow's file system as DuckDB takes one."""

    protocol = "objects"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix(f"{cls.protocol}://")
