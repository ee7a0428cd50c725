"""What a benchmark gives out: JSON lines, and notes for who waits."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from activations.errors import InputError


def give_out(rows: Iterable[Mapping[str, Any]], file: Path | None = None) -> list[dict[str, Any]]:
    """Print each row as it comes, also into `file`; returns all. Wrong input ends the program with one line."""
    given = []
    try:
        for row in rows:
            given.append({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
            line = json.dumps(given[-1])
            print(line, flush=True)
            if file is not None:
                with file.open("a", encoding="utf-8") as lines:
                    print(line, file=lines)
    except InputError as error:
        raise SystemExit(f"Error: {error}") from None
    return given


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def count(text: str) -> int:
    """ "1.5M" as 1500000."""
    return round(float(text.rstrip("kMB")) * {"k": 1e3, "M": 1e6, "B": 1e9}.get(text[-1], 1))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
