"""A corpus by name: the shipped sample, a local file or folder, or a Hugging Face dataset, as a stream of documents.

Nothing is held in memory but the rows being read (a `.txt`, `.md` or `.py` file is one document). A document's `id` is
its position among all rows of the corpus, empty ones too, so that it stays the same whatever a reader skips.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SAMPLE = Path(__file__).parent / "samples" / "corpus.parquet"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one half ("\ud83d"), and no tokenizer takes it

Row = tuple[str | None, str]
"""Text (None or blank: no document) and source ('' when there is none)."""


@dataclass(frozen=True, slots=True)
class Document:
    id: int
    """Position in the corpus."""
    text: str
    source: str
    """Where the text is from, as its `source` column says; '' when the corpus has none."""


class CorpusError(ValueError):
    """A corpus that cannot be read; the message is one line: what was wrong, what was expected, what to do."""


def read_corpus(
    name: str, *, revision: str | None = None, text_column: str = "text", split: str = "train"
) -> Iterator[Document]:
    """The documents of a corpus, in order, without blank ones.

    name: "sample" (the shipped corpus); a .txt, .md, .py, .jsonl, .json (an object a line) or .parquet file; a folder
    of such files, read in the order of their paths; or a Hub dataset, NAME or NAME:CONFIG, which is streamed.
    revision, split: of a Hub dataset; local corpora have neither.
    text_column: the column (the key in JSON lines) with the text; plain-text files have no columns.
    Raises CorpusError; at once for a name that leads nowhere, else where the fault is met.
    """
    path = _local(name)
    if path is None:
        rows = _hub_rows(name, revision, text_column, split)
    elif revision is not None or split != "train":
        asked = f"revision={revision!r}" if revision is not None else f"split={split!r}"
        raise CorpusError(f"{asked} was given with the local corpus {name!r}, which has none: leave it out.")
    else:
        rows = _folder_rows(path, text_column) if path.is_dir() else _reader(path)(path, text_column)
    return _documents(rows, name)


def corpus_fingerprint(name: str, *, revision: str | None = None) -> str:
    """What was read, in one word: 16 hex digits of SHA-256 (a folder: of paths, sizes and bytes), or HUB_NAME@REVISION.

    A Hub dataset without a revision is given as HUB_NAME@main, which can change: pin the revision to be exact.
    """
    path = _local(name)
    if path is None:
        return f"{name}@{revision or 'main'}"
    if path.is_file():
        return _sha256(path).hex()[:16]
    whole = hashlib.sha256()
    for file in _folder_files(path):
        whole.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        whole.update(_sha256(file))
    return whole.hexdigest()[:16]


def _documents(rows: Iterator[Row], name: str) -> Iterator[Document]:
    empty, position = True, -1
    for position, (text, source) in enumerate(rows):
        if text and not text.isspace():
            empty = False
            yield Document(position, text, source)
    if empty:
        raise CorpusError(
            f"{name!r} has no text in its {position + 1} rows, expected at least one document: choose another corpus."
        )


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


def _reader(path: Path) -> Callable[[Path, str], Iterator[Row]]:
    if path.suffix not in READERS:
        raise CorpusError(f"{path} is of no known kind, expected one of {', '.join(READERS)}: rename or convert it.")
    return READERS[path.suffix]


def _folder_files(folder: Path) -> list[Path]:
    """The readable files below `folder`, by path; hidden files and folders left out."""
    files = []
    for file in folder.rglob("*"):
        inside = file.relative_to(folder)
        if file.suffix in READERS and file.is_file() and not any(part.startswith(".") for part in inside.parts):
            files.append(file)
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _folder_rows(folder: Path, text_column: str) -> Iterator[Row]:
    for file in _folder_files(folder):
        yield from _reader(file)(file, text_column)


def _plain_rows(path: Path, text_column: str) -> Iterator[Row]:  # noqa: ARG001  (a plain text has no columns)
    try:
        yield path.read_text(encoding="utf-8-sig"), ""
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path}", error) from None


def _json_rows(path: Path, text_column: str) -> Iterator[Row]:
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
            yield _row(row, text_column, where)


def _parquet_rows(path: Path, text_column: str) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                raise _no_column(str(path), text_column, names)
            columns = [text_column, *({"source"} & set(names) - {text_column})]
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    yield _row(row, text_column, str(path))
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error) from None
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            f"{path} cannot be read as Parquet ({_first_line(error)}), expected a whole Parquet file: fetch it again."
        ) from None


def _hub_rows(name: str, revision: str | None, text_column: str, split: str) -> Iterator[Row]:
    import datasets  # seconds to import, and only needed here

    path, _, config = name.partition(":")
    try:
        stream = datasets.load_dataset(path, config or None, revision=revision, split=split, streaming=True)
        for row in stream:
            yield _row(row, text_column, f"{name!r} on the Hub")
    except CorpusError:
        raise
    except datasets.exceptions.DatasetNotFoundError:
        at = f" at revision {revision!r}" if revision else ""
        raise CorpusError(
            f"{name!r} is no file or folder here and no public Hub dataset{at}: check the name, or log in."
        ) from None
    except (ConnectionError, TimeoutError) as error:
        raise CorpusError(
            f"{name!r} is no file or folder here, and the Hub cannot be reached ({_first_line(error)}): "
            "go online, or name a local file, a folder or 'sample'."
        ) from None
    except Exception as error:  # an unknown split or config, a dataset that is a script, whatever its reader raises
        raise CorpusError(
            f"{name!r} cannot be streamed from the Hub ({type(error).__name__}: {_first_line(error)}), "
            f"expected a dataset with split {split!r}: check the split and the config (NAME:CONFIG)."
        ) from error


def _row(row: dict[str, Any], text_column: str, where: str) -> Row:
    if text_column not in row:
        raise _no_column(where, text_column, list(row))
    text, source = row[text_column], row.get("source") if text_column != "source" else None
    if text is not None and not isinstance(text, str):
        raise CorpusError(
            f"{where} has a {type(text).__name__} in {text_column!r}, expected text: set text_column to another."
        )
    if text is not None and SURROGATE.search(text):
        raise CorpusError(
            f"{where} has half a surrogate pair in {text_column!r}, expected whole characters: mend the row."
        )
    return text, source if isinstance(source, str) else ""


def _no_column(where: str, text_column: str, names: list[str]) -> CorpusError:
    return CorpusError(
        f"{where} has no column {text_column!r}, expected one of {', '.join(names) or 'its columns (there are none)'}: "
        "name the one with the text by text_column."
    )


def _not_utf8(where: str, error: UnicodeDecodeError) -> CorpusError:
    return CorpusError(f"{where} is not UTF-8 (byte {error.start}), expected UTF-8 text: convert it, e.g. with iconv.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": _plain_rows,
    ".md": _plain_rows,
    ".py": _plain_rows,
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}
