"""A corpus by name: the shipped sample, a local file or folder, or a Hugging Face dataset, as a stream of documents.

Nothing is held in memory but the rows being read (a `.txt`, `.md` or `.py` file is one document). A document's `id` is
its position among all rows of the corpus, empty ones too, so that it stays the same whatever a reader skips.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

SAMPLE = Path(__file__).parent / "samples" / "corpus.parquet"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one half ("\ud83d"), and no tokenizer takes it
MOST_LABELS = 10_000
CSV_BLOCK = 1 << 24  # bytes read at a time, and so the longest row


class Row(NamedTuple):
    """A row of a corpus as its file has it."""

    where: str
    """For messages: the file and the line, or the row, both counted from 1."""
    values: dict[str, Any]
    """Of the wanted columns at least, as far as they are there."""
    columns: Iterable[str]
    """The names of all columns."""


@dataclass(frozen=True, slots=True)
class Document:
    id: int
    """Position in the corpus."""
    text: str
    source: str
    """Where the text is from, as its `source` column says; '' when the corpus has none."""
    label: str | None = None
    """Its class, as the label column says; None when no label column was named."""


class CorpusError(ValueError):
    """A corpus that cannot be read; the message is one line: what was wrong, what was expected, what to do."""


def read_corpus(
    name: str,
    *,
    revision: str | None = None,
    text_column: str = "text",
    split: str = "train",
    label_column: str | None = None,
) -> Iterator[Document]:
    """The documents of a corpus, in order, without blank ones.

    name: "sample" (the shipped corpus); a .txt, .md, .py, .jsonl, .json (an object a line), .csv (with a header line)
    or .parquet file; a folder of such files, read in the order of their paths; or a Hub dataset, NAME or NAME:CONFIG,
    which is streamed.
    revision, split: of a Hub dataset; local corpora have neither.
    text_column: the column (the key in JSON lines) with the text; plain-text files have no columns.
    label_column: the column with each document's class; numbers and booleans become their text. None: no labels.
    Raises CorpusError; at once for a name that leads nowhere, else where the fault is met.
    """
    wanted = (text_column, "source", *([label_column] if label_column is not None else []))
    return _documents(read_rows(name, wanted, revision=revision, split=split), name, text_column, label_column)


def label_names(
    name: str, label_column: str, *, revision: str | None = None, text_column: str = "text", split: str = "train"
) -> list[str]:
    """The different labels of a corpus, sorted (as numbers, when all are), from a first pass over all of it.

    Raises CorpusError at over 10,000 of them, and whatever `read_corpus` raises.
    """
    names: set[str] = set()
    for document in read_corpus(
        name, revision=revision, text_column=text_column, split=split, label_column=label_column
    ):
        assert document.label is not None
        names.add(document.label)
        if len(names) > MOST_LABELS:
            raise CorpusError(
                f"{name!r} has over {MOST_LABELS:,} different labels in {label_column!r}, expected a few classes and "
                "no free text or measurements: set label_column to another."
            )
    numbers = {label: _number(label) for label in names}
    return sorted(names) if None in numbers.values() else sorted(names, key=lambda label: (numbers[label], label))


def read_rows(
    name: str, wanted: tuple[str, ...], *, revision: str | None = None, split: str = "train"
) -> Iterator[Row]:
    """The rows of a corpus, see `read_corpus`, for whoever makes something else than documents of them.

    wanted: the columns to read; whether a row has them is left to the caller. A plain text is a row of the first one.
    """
    path = _local(name)
    if path is None:
        return _hub_rows(name, revision, split)
    if revision is not None or split != "train":
        asked = f"revision={revision!r}" if revision is not None else f"split={split!r}"
        raise CorpusError(f"{asked} was given with the local corpus {name!r}, which has none: leave it out.")
    return _folder_rows(path, wanted) if path.is_dir() else _reader(path)(path, wanted)


def corpus_fingerprint(name: str, *, revision: str | None = None) -> str:
    """What was read, in one word: 16 hex digits of SHA-256 (a folder: of paths, sizes and bytes), or HUB_NAME@REVISION.

    A Hub dataset without a revision is given as HUB_NAME@main, which can change: pin the revision to be exact.
    """
    path = _local(name)
    return f"{name}@{revision or 'main'}" if path is None else path_fingerprint(path, READERS)


def path_fingerprint(path: Path, suffixes: Collection[str]) -> str:
    """16 hex digits of SHA-256 of a file, or of the paths, sizes and bytes of the files that `files_below` gives."""
    if path.is_file():
        return _sha256(path).hex()[:16]
    whole = hashlib.sha256()
    for file in files_below(path, suffixes):
        whole.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        whole.update(_sha256(file))
    return whole.hexdigest()[:16]


def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files below `folder` with one of `suffixes`, by path; hidden files and folders left out."""
    files = []
    for file in folder.rglob("*"):
        inside = file.relative_to(folder)
        if file.suffix in suffixes and file.is_file() and not any(part.startswith(".") for part in inside.parts):
            files.append(file)
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def no_column(row: Row, asked: str, what: str) -> CorpusError:
    """The error for a row without the column `asked` (said as it should be read), which holds the row's `what`."""
    names = ", ".join(row.columns) or "its columns (there are none)"
    return CorpusError(
        f"{row.where} has no column {asked}, expected one of {names}: name the one with the {what} by {what}_column."
    )


def check_whole(text: str, row: Row, column: str) -> None:
    """Raise CorpusError for text with half a surrogate pair."""
    if SURROGATE.search(text):
        raise CorpusError(
            f"{row.where} has half a surrogate pair in {column!r}, expected whole characters: mend the row."
        )


def first_line(error: BaseException) -> str:
    """What an error says, short enough to quote."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _documents(rows: Iterator[Row], name: str, text_column: str, label_column: str | None) -> Iterator[Document]:
    empty, position = True, -1
    for position, row in enumerate(rows):
        text = _text(row, text_column)
        if text and not text.isspace():
            empty = False
            source = row.values.get("source") if text_column != "source" else None
            label = None if label_column is None else _label(row, label_column)
            yield Document(position, text, source if isinstance(source, str) else "", label)
    if empty:
        raise CorpusError(
            f"{name!r} has no text in its {position + 1} rows, expected at least one document: choose another corpus."
        )


def _text(row: Row, column: str) -> str | None:
    if column not in row.values:
        raise no_column(row, repr(column), "text")
    text = row.values[column]
    if text is None:
        return None
    if not isinstance(text, str):
        raise CorpusError(
            f"{row.where} has a {type(text).__name__} in {column!r}, expected text: set text_column to another."
        )
    check_whole(text, row, column)
    return text


def _label(row: Row, column: str) -> str:
    if column not in row.values:
        raise no_column(row, repr(column), "label")
    label = row.values[column]
    if label is None or label == "" or label != label:  # != itself: not a number, how pandas writes "missing"
        raise CorpusError(f"{row.where} has no label in {column!r}, expected one a document: remove or mend the row.")
    if not isinstance(label, str | int | float):
        raise CorpusError(
            f"{row.where} has a {type(label).__name__} in {column!r}, expected a text or a number: "
            "set label_column to another."
        )
    check_whole(str(label), row, column)
    return str(label)


def _number(label: str) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _local(name: str) -> Path | None:
    """The file or folder that `name` means; None for a Hub dataset. Raises CorpusError when it can be neither."""
    if name == "sample":
        return SAMPLE
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if path.suffix in READERS or not HUB_NAME.fullmatch(name):
        raise CorpusError(
            f"{name!r} does not exist, expected 'sample', a file ({', '.join(READERS)}), a folder or a Hub dataset: "
            "check the path."
        )
    return None


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _reader(path: Path) -> Callable[[Path, tuple[str, ...]], Iterator[Row]]:
    if path.suffix not in READERS:
        raise CorpusError(f"{path} is of no known kind, expected one of {', '.join(READERS)}: rename or convert it.")
    return READERS[path.suffix]


def _folder_rows(folder: Path, wanted: tuple[str, ...]) -> Iterator[Row]:
    for file in files_below(folder, READERS):
        yield from _reader(file)(file, wanted)


def _plain_rows(path: Path, wanted: tuple[str, ...]) -> Iterator[Row]:
    try:
        yield Row(str(path), {wanted[0]: path.read_text(encoding="utf-8-sig")}, wanted[:1])
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path}", error) from None


def _json_rows(path: Path, wanted: tuple[str, ...]) -> Iterator[Row]:  # noqa: ARG001  (a line has all its keys anyway)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise _not_utf8(where, error) from None
            except json.JSONDecodeError as error:
                array = line.lstrip().startswith(b"[")
                todo = "write the items of the array a line each" if array else "mend or remove the line"
                raise CorpusError(f"{where} is no JSON ({error.msg}), expected one object a line: {todo}.") from None
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise CorpusError(f"{where} is a JSON {kind}, expected one object a line: write one object a line.")
            yield Row(where, row, row)


def _parquet_rows(path: Path, wanted: tuple[str, ...]) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in wanted]
            yield from _batch_rows(path, file.iter_batches(batch_size=256, columns=columns), names)
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error) from None
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            f"{path} cannot be read as Parquet ({first_line(error)}), expected a whole Parquet file: fetch it again."
        ) from None


def _csv_rows(path: Path, wanted: tuple[str, ...]) -> Iterator[Row]:
    read, parse = pc.ReadOptions(block_size=CSV_BLOCK), pc.ParseOptions(newlines_in_values=True)
    try:
        with pc.open_csv(path, read_options=read, parse_options=parse) as header:
            names = header.schema.names
        columns = [name for name in names if name in wanted]
        as_text = pc.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), include_columns=columns)
        with pc.open_csv(path, read_options=read, parse_options=parse, convert_options=as_text) as batches:
            yield from _batch_rows(path, batches, names)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            f"{path} cannot be read as CSV ({first_line(error)}), expected UTF-8, a header line and the same number of "
            "fields in every row: mend the file."
        ) from None


def _batch_rows(path: Path, batches: Iterable[pa.RecordBatch], names: list[str]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{path}, row {number}", values, names)


def _hub_rows(name: str, revision: str | None, split: str) -> Iterator[Row]:
    import datasets  # seconds to import, and only needed here

    path, _, config = name.partition(":")
    try:
        stream = datasets.load_dataset(path, config or None, revision=revision, split=split, streaming=True)
        for number, row in enumerate(stream, 1):
            yield Row(f"{name!r} on the Hub, row {number}", row, row)
    except datasets.exceptions.DatasetNotFoundError:
        at = f" at revision {revision!r}" if revision else ""
        raise CorpusError(
            f"{name!r} is no file or folder here and no public Hub dataset{at}: check the name, or log in."
        ) from None
    except (ConnectionError, TimeoutError) as error:
        raise CorpusError(
            f"{name!r} is no file or folder here, and the Hub cannot be reached ({first_line(error)}): "
            "go online, or name a local file, a folder or 'sample'."
        ) from None
    except Exception as error:  # an unknown split or config, a dataset that is a script, whatever its reader raises
        raise CorpusError(
            f"{name!r} cannot be streamed from the Hub ({type(error).__name__}: {first_line(error)}), "
            f"expected a dataset with split {split!r}: check the split and the config (NAME:CONFIG)."
        ) from error


def _not_utf8(where: str, error: UnicodeDecodeError) -> CorpusError:
    return CorpusError(f"{where} is not UTF-8 (byte {error.start}), expected UTF-8 text: convert it, e.g. with iconv.")


READERS: dict[str, Callable[[Path, tuple[str, ...]], Iterator[Row]]] = {
    ".txt": _plain_rows,
    ".md": _plain_rows,
    ".py": _plain_rows,
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
