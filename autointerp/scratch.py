"""The finished parts of an index that is being built: a killed `sae index` goes on from them.

A part is a Parquet file of a stage, `codes-00012.parquet`, whole or absent: written aside, flushed, renamed.
`plan.json` says what the parts are of (dictionary, cache, options); parts of anything else are removed. Any number of
processes may write parts, each its own; a part holds the same whoever writes it, and when.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from activations.files import read_json, write_aside, write_json
from activations.ranks import Ranks

ALONE = Ranks()
FACT = "fact "
GROUP_BYTES = 1 << 24
"""Of a row group, before compression: what a writer and a reader hold at once."""


class Scratch:
    """The parts in `folder`. ranks: the processes that share the work, and which of them this is."""

    def __init__(self, folder: Path, ranks: Ranks = ALONE) -> None:
        self.folder = folder
        self.ranks = ranks

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Keep the parts that are of this plan (JSON values), remove those of another."""
        path = self.folder / "plan.json"
        if path.exists() and read_json(path) == plan:
            return
        self.remove()
        self.folder.mkdir()
        write_json(path, plan)

    def remove(self) -> None:
        """Remove all parts; the plan first, since parts without one are never read."""
        (self.folder / "plan.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, stage: str, number: int = 0) -> Path:
        return self.folder / f"{stage}-{number:05}.parquet"

    def lacking(self, stage: str, n: int) -> list[int]:
        """Those of the `n` parts of a stage that are not there and are this rank's to make."""
        mine = range(self.ranks.rank, n, self.ranks.world)
        return [number for number in mine if not self.path(stage, number).exists()]

    def parts(self, stage: str) -> list[Path]:
        """The parts of a stage that are there, by number."""
        return sorted(self.folder.glob(f"{stage}-*.parquet"))

    def write(
        self, stage: str, number: int, tables: Iterable[pa.Table], facts: Mapping[str, str] | None = None
    ) -> None:
        """Write a part from tables of one schema, one at least; facts: what `facts` gives back."""
        with write_aside(self.path(stage, number)) as aside:
            write_tables(aside, tables, facts or {})

    def facts(self, stage: str) -> dict[str, str]:
        """What was said of the first part of a stage when it was written."""
        said = pq.read_metadata(self.path(stage)).metadata
        return {
            key.decode()[len(FACT) :]: value.decode() for key, value in said.items() if key.startswith(FACT.encode())
        }

    def fingerprint(self) -> str:
        """Of the plan."""
        return hashlib.sha256((self.folder / "plan.json").read_bytes()).hexdigest()


def write_tables(path: Path, tables: Iterable[pa.Table], facts: Mapping[str, str]) -> None:
    """A Parquet file of tables of any length, in row groups of about `GROUP_BYTES`."""
    held: list[pa.Table] = []
    file: pq.ParquetWriter | None = None
    try:
        for table in tables:
            held.append(table)
            file = file or pq.ParquetWriter(path, table.schema, compression="lz4")
            if sum(each.nbytes for each in held) >= GROUP_BYTES:
                file.write_table(pa.concat_tables(held))
                held = []
        assert file is not None, f"{path} would have no schema"
        if held:
            file.write_table(pa.concat_tables(held))
        file.add_key_value_metadata({FACT + key: value for key, value in facts.items()})
    finally:
        if file is not None:
            file.close()


def batches(parts: Sequence[Path], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of the rows of several parts, in order, a million at a time."""
    for part in parts:
        with pq.ParquetFile(part) as file:
            yield from file.iter_batches(1 << 20, columns=list(columns))
