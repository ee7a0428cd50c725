"""The growing tables: folders of small Parquet parts, each written aside and renamed, read while others write.

A part is never changed. More than `MAX_PARTS` of them are joined into one that keeps the newest row of each key; a
reader that misses a part which the joining has just removed looks again. A part that cannot be read costs its own rows
only: it is named in `warnings` and left where it is.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.store.errors import StoreError
from data.store.files import aside, sync
from data.store.place import Listing, Place
from data.store.schema import Explanation, Score

MAX_PARTS = 32

_ARROW: dict[Any, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), float | None: pa.float64()}


class Parts:
    """One folder of parts with the rows of one dataclass. Not thread-safe: the store calls it under its own lock."""

    def __init__(self, place: Place, kind: str, row: type[Explanation] | type[Score], key: Sequence[str]) -> None:
        self.place = place
        self.kind = kind
        self.key = list(key)
        self.schema = pa.schema([(field.name, _ARROW[field.type]) for field in dataclasses.fields(row)])
        self.warnings: dict[str, str] = {}
        self._read: dict[tuple[str, int, int], pa.Table | None] = {}

    @property
    def folder(self) -> Path:
        """The folder on a disk; StoreError where there is none."""
        return self.place.folder / self.kind

    def listing(self) -> Listing:
        """(name, size, time) of every part, oldest first: equal listings mean equal rows."""
        return self.place.listing(self.kind)

    def rows(self, listing: Listing) -> pa.Table:
        """The valid row of each key. Raises FileNotFoundError when a part has gone since it was listed."""
        self._read = {part: table for part, table in self._read.items() if part in listing}
        self.warnings = {name: text for name, text in self.warnings.items() if name in {part[0] for part in listing}}
        for part in listing:
            if part not in self._read:
                self._read[part] = self._load(part[0])
        tables = [table for part in listing if (table := self._read[part]) is not None]
        return self._newest(pa.concat_tables(tables) if tables else self.schema.empty_table())

    def append(self, rows: Sequence[Explanation] | Sequence[Score]) -> None:
        """Write one part with these rows; join the parts when there are too many."""
        if not rows:
            return
        self.folder.mkdir(exist_ok=True)
        self._write(pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=self.schema), _name())
        if len(self.listing()) > MAX_PARTS:
            self._compact()

    def _load(self, name: str) -> pa.Table | None:
        """The rows of one part; None, with a warning, when it is damaged."""
        try:
            table = pq.read_table(
                self.place.source(self.kind, name), page_checksum_verification=True, partitioning=None
            )
            table = table.select(self.schema.names).cast(self.schema)
            table.validate(full=True)
        except (FileNotFoundError, StoreError):
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            path = f"{self.place.address}/{self.kind}/{name}"
            self.warnings[name] = f"{path} is damaged and its rows are missing ({reason}): remove it or restore a copy"
            return None
        self.warnings.pop(name, None)
        return table

    def _newest(self, table: pa.Table) -> pa.Table:
        """Of each key the row created last; among equals the one written last."""
        place = pa.array(range(table.num_rows), pa.int64())
        order = pc.sort_indices(
            pa.table({"created": table["created"], "place": place}),
            sort_keys=[("created", "ascending"), ("place", "ascending")],
        )
        table = table.take(order).append_column("place", place)
        last = table.group_by(self.key).aggregate([("place", "max")])["place_max"]
        return table.select(self.schema.names).take(last.sort())

    def _compact(self) -> None:
        """Join all readable parts into one. Skipped while another process does it."""
        lock = filelock.FileLock(self.folder / ".compact.lock", timeout=0)
        try:
            with lock:
                name = _name()
                listing = self.listing()
                self._write(self.rows(listing), name)
                for part, _, _ in listing:
                    if part not in self.warnings:
                        (self.folder / part).unlink(missing_ok=True)
                sync(self.folder)
        except (filelock.Timeout, FileNotFoundError):
            pass

    def _write(self, table: pa.Table, name: str) -> None:
        with aside(self.folder / name) as path:
            pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def _name() -> str:
    """A name that nobody else chooses; names sort by the time of writing."""
    return f"part-{time.time_ns():020d}-{os.getpid()}-{os.urandom(3).hex()}.parquet"
