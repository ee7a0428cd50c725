"""Explanations that Neuronpedia exports (batch-N.jsonl or .jsonl.gz) as explanations of a dictionary of ours.

A row has `index`, `description` and, where a model wrote it, `typeName` and `explanationModelName`; one that we
exported has the same in `notes`. The files are untrusted: a line and a text have a largest length, control characters
go, and what is kept is text. Where it came from stands in each explanation: explainer `neuronpedia TYPE`, its model,
and modelId/layer as the version.
"""

import gzip
import json
import zlib
from collections.abc import Generator
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

from activations.errors import InputError
from autointerp.neuronpedia import NOTED
from data.store import POLES, SOURCES, Explanation, open_store

LONGEST_LINE = 2**20
"""Characters; a row with an embedding has some 6,000."""
LONGEST_TEXT = 1000
LONGEST_NAME = 100
MOST_ROWS = 4_000_000


class Imported(NamedTuple):
    """What was done."""

    n_added: int
    n_empty: int
    """Rows without a text, which are passed over."""
    origin: str
    """modelId/layer of the rows."""


def is_export(path: Path) -> bool:
    """Whether a path is a file or a folder of such rows."""
    return bool(_files(path))


def import_explanations(path: Path, address: str | Path) -> Imported:
    """Add the explanations in a file, or in a folder's batches, to a dictionary (RUN, RUN/ID or its folder).

    Raises InputError, and adds nothing, for rows of several sources, of features that the dictionary has not, and for
    a damaged file; StoreError where there is no store yet.
    """
    if not (files := _files(path)):
        raise InputError(f"{path} has no explanations: expected batch-N.jsonl or .jsonl.gz, or a folder of them.")
    found: list[Explanation] = []
    origins: dict[str, None] = {}
    n_empty = 0
    with open_store(address) as store:
        for file in files:
            with closing(_rows(file)) as rows:
                for place, row in rows:
                    if len(found) >= MOST_ROWS:
                        raise InputError(f"{path} has over {MOST_ROWS:,} rows: import its files one by one.")
                    feature = _feature(row, store.n_features, f"{place} of {file}", address)
                    text = _clean(row.get("description"), LONGEST_TEXT)
                    if not text:
                        n_empty += 1
                        continue
                    origin = "/".join(_clean(row.get(key), LONGEST_NAME) for key in ("modelId", "layer"))
                    origins[origin] = None
                    found.append(_explanation(row, feature, text, origin))
        if len(origins) > 1:
            raise InputError(f"{path} has rows of {', '.join(list(origins)[:3])}: import one source at a time.")
        store.add_explanations(found)
    return Imported(len(found), n_empty, next(iter(origins), ""))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.name.endswith((".jsonl", ".jsonl.gz")) else []
    folder = path / "explanations" if (path / "explanations").is_dir() else path
    return sorted([*folder.glob("batch-*.jsonl"), *folder.glob("batch-*.jsonl.gz")])


def _rows(file: Path) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """(where, row) of each line that is not blank."""
    try:
        with _opened(file) as lines:
            for number in range(1, 2**62):
                line = lines.readline(LONGEST_LINE + 1)
                if not line:
                    return
                if len(line) > LONGEST_LINE:
                    raise InputError(
                        f"line {number} of {file} is longer than {LONGEST_LINE:,} characters: no such row."
                    )
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f"line {number} of {file} is no JSON object: expected an explanation.")
                yield f"line {number}", row
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged ({error}): fetch it again.") from None


def _opened(file: Path) -> TextIOWrapper:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def _feature(row: dict[str, Any], n_features: int, place: str, address: str | Path) -> int:
    told = row.get("index")
    if not isinstance(told, int | str) or isinstance(told, bool) or not str(told).isdecimal() or len(str(told)) > 12:
        raise InputError(f"{place} has index {str(told)[:50]!r}: expected the number of a feature.")
    if int(told) >= n_features:
        raise InputError(
            f"{place} names feature {told}, and {address} has {n_features:,}: it is of another dictionary."
        )
    return int(told)


def _explanation(row: dict[str, Any], feature: int, text: str, origin: str) -> Explanation:
    kind, model = (_clean(row.get(key), LONGEST_NAME) for key in ("typeName", "explanationModelName"))
    noted = _noted(row.get("notes"))
    kind, model = kind or noted.get("explainer", ""), model or noted.get("model", "")
    source, pole = noted.get("source"), noted.get("pole")
    return Explanation.new(
        feature=feature,
        text=text,
        source=source if source in SOURCES else "llm" if kind or model else "person",
        pole=pole if pole in POLES else "+",
        explainer=f"neuronpedia {kind}".strip(),
        model=model,
        prompt_version=origin,
    )


def _noted(notes: object) -> dict[str, str]:
    """What `autointerp.neuronpedia` noted; nothing of notes that are others'."""
    try:
        found = json.loads(notes) if isinstance(notes, str) and len(notes) < LONGEST_TEXT else None
    except (ValueError, RecursionError):
        return {}
    return {key: _clean(found.get(key), LONGEST_NAME) for key in NOTED} if isinstance(found, dict) else {}


def _clean(value: object, longest: int) -> str:
    """One line of printable text, cut to a largest length; '' for anything else."""
    if not isinstance(value, str):
        return ""
    line = " ".join("".join(c if c.isprintable() else " " for c in value[: 4 * longest]).split())
    return line if len(line) <= longest else line[: longest - 1] + "\u2026"
