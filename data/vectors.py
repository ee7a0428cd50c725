"""A matrix of vectors from files, as blocks of float32 rows: `.npy`, Parquet, or a folder of such files of one width.

They may be anything that a dictionary can be trained on: another tool's activations, embeddings, a planted world. A
`.npy` is mapped and a Parquet file is read in pieces, so that a file may be larger than the memory. Rows are counted
from 0, as numpy does.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .corpora import CorpusError, files_below, first_line, path_fingerprint

BLOCK_ROWS = 65_536
BLOCK_VALUES = 1 << 25  # 128 MiB of float32: wider vectors come in shorter blocks

Columns = str | Sequence[str] | None


def read_vectors(path: str | Path, column: Columns = None) -> Iterator[np.ndarray]:
    """The rows of a matrix in order, in blocks of shape (n, d), float32, n at most 65,536; all blocks have one d.

    path: a .npy (2-D, floats), a .parquet, or a folder of such files, read in the order of their paths.
    column: of Parquet files; the one with a list of d numbers a row, or a list of d columns with a number each; None
    takes the only column of lists. A .npy has no columns.
    The same arguments give the same blocks. Raises CorpusError; at once for a path that leads nowhere, else where the
    fault is met.
    """
    files = _files(Path(path).expanduser())
    if isinstance(column, list | tuple) and not column:
        raise CorpusError("column is an empty list, expected the names of the columns of numbers: name at least one.")
    if column is not None and all(file.suffix == ".npy" for file in files):
        raise CorpusError(f"column={column!r} was given with {path}, a .npy has no columns: leave it out.")
    return _checked(files, column)


def vectors_fingerprint(path: str | Path) -> str:
    """What was read, in one word: 16 hex digits of SHA-256 (a folder: of paths, sizes and bytes)."""
    path = Path(path).expanduser()
    _files(path)  # else a path that leads nowhere would have a fingerprint too
    return path_fingerprint(path, READERS)


def _files(path: Path) -> list[Path]:
    """The files to read. Raises CorpusError when there are none."""
    files = files_below(path, READERS) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise CorpusError(f"{path} holds no vectors, expected {' or '.join(READERS)}, or a folder: check the path.")
    if any(file.suffix not in READERS for file in files):
        raise CorpusError(
            f"{path} is of no known kind, expected one of {', '.join(READERS)}: save the matrix with numpy.save."
        )
    return files


def _checked(files: list[Path], column: Columns) -> Iterator[np.ndarray]:
    width = None
    for file in files:
        row = 0
        for block in READERS[file.suffix](file, column):
            if not block.size:
                break
            if width is None:
                width = block.shape[1]
            if block.shape[1] != width:
                raise CorpusError(
                    f"{file} has vectors of {block.shape[1]} numbers, expected {width} as in {files[0]}: "
                    "keep files of another width in another folder."
                )
            bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
            if len(bad):
                raise CorpusError(
                    f"{file}, row {row + bad[0]} (counted from 0) has a value that is NaN, infinite or missing, "
                    "expected finite float32 numbers: mend or remove the row."
                )
            row += len(block)
            yield block
        if row == 0:
            raise CorpusError(f"{file} has no vectors, expected at least one row and one column: remove the file.")


def _rows_a_block(width: int) -> int:
    return max(1, min(BLOCK_ROWS, BLOCK_VALUES // max(1, width)))


def _float32(block: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite, and is then refused as such
        return np.array(block, dtype=np.float32, order="C")


def _npy_blocks(path: Path, column: Columns) -> Iterator[np.ndarray]:  # noqa: ARG001  (a .npy has no columns)
    try:
        matrix = np.lib.format.open_memmap(path, mode="r")  # takes no pickle
    except (ValueError, OSError) as error:
        raise CorpusError(
            f"{path} cannot be read as a .npy ({first_line(error)}), expected a whole file with one matrix of floats: "
            "save it again with numpy.save."
        ) from None
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise CorpusError(
            f"{path} has shape {matrix.shape} and type {matrix.dtype}, expected a matrix of floats, a vector a row: "
            "reshape or convert it."
        )
    step = _rows_a_block(matrix.shape[1])
    for at in range(0, len(matrix), step):
        yield _float32(matrix[at : at + step])


def _parquet_blocks(path: Path, column: Columns) -> Iterator[np.ndarray]:
    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow, column)
            width, row = len(columns), 0
            if _is_list(file.schema_arrow.field(columns[0]).type):
                first = next(file.iter_batches(batch_size=1, columns=columns), None)
                width = len(first[0][0].as_py() or ()) if first else 0
            for batch in file.iter_batches(batch_size=_rows_a_block(width), columns=columns):
                yield _float32(_matrix(path, row, batch, columns, width))
                row += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            f"{path} cannot be read as Parquet ({first_line(error)}), expected a whole Parquet file: fetch it again."
        ) from None


def _columns(path: Path, schema: pa.Schema, column: Columns) -> list[str]:
    """The columns to read: one of lists, or several of numbers."""
    lists = [field.name for field in schema if _is_list(field.type)]
    if column is None:
        if len(lists) != 1:
            raise CorpusError(
                f"{path} has {len(lists)} columns of number lists, expected one: name by column the one to take, or a "
                f"list of number columns, of {', '.join(schema.names) or '(none)'}."
            )
        return lists
    wanted = [column] if isinstance(column, str) else list(column)
    fits, expected = (
        (_is_list, "a list of numbers a row") if isinstance(column, str) else (_is_number, "a number a row")
    )
    for name in wanted:
        if name not in schema.names:
            raise CorpusError(
                f"{path} has no column {name!r}, expected one of {', '.join(schema.names) or '(none)'}: "
                "name another by column."
            )
        if not fits(schema.field(name).type):
            raise CorpusError(
                f"{path} has {schema.field(name).type} in {name!r}, expected {expected}: name another by column."
            )
    return wanted


def _matrix(path: Path, row: int, batch: pa.RecordBatch, columns: list[str], width: int) -> np.ndarray:
    """The rows of a batch, of which the first is row `row` of the file; what is missing becomes NaN."""
    if not _is_list(batch.schema.field(columns[0]).type):
        return np.stack([_numbers(batch[name]) for name in columns], axis=1)
    lists = batch[columns[0]]
    lengths = pc.fill_null(pc.list_value_length(lists), -1).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(lengths != width)
    if len(bad):
        found = f"{lengths[bad[0]]} numbers" if lengths[bad[0]] >= 0 else "no list"
        raise CorpusError(
            f"{path}, row {row + bad[0]} (counted from 0) has {found}, expected lists of one length ({width} in row "
            "0): mend or remove the row."
        )
    return _numbers(lists.flatten()).reshape(len(batch), width)


def _numbers(array: pa.Array) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False)


def _is_list(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and _is_number(kind.value_type)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


READERS: dict[str, Callable[[Path, Columns], Iterator[np.ndarray]]] = {".npy": _npy_blocks, ".parquet": _parquet_blocks}
