"""Answers already paid for: one line of JSON a request, appended as soon as the answer is there.

A killed job that is started again asks only what was never answered. The key is a hash of what was asked (model,
parameters, messages), so that the file holds answers and token counts, but no key and no prompt. A line that a kill cut
short is ignored, and the next one starts on a line of its own.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from activations.errors import InputError


def request_key(request: dict[str, Any]) -> str:
    """SHA-256 of a request, the same for equal requests whatever the order of their keys."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class RequestCache:
    """Answers by request key, in the file `requests.jsonl` of a folder; memory holds only where each one lies."""

    def __init__(self, folder: Path) -> None:
        """Open or make the cache. Raises InputError when the folder cannot be written."""
        path = folder / "requests.jsonl"
        self._places: dict[str, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}): look at disk and permissions.") from None
        self._file.seek(0)
        start, line = 0, b"\n"
        for line in self._file:
            if row := _row(line):
                self._places[row[0]] = start
            start += len(line)
        if not line.endswith(b"\n"):
            self._file.write(b"\n")

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer stored under `key`, or None."""
        if key not in self._places:
            return None
        self._file.seek(self._places[key])
        row = _row(self._file.readline())
        return row[1] if row else None

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Store `answer`; it is out of this process' hands when this returns, so that a kill cannot lose it."""
        self._places[key] = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _row(line: bytes) -> tuple[str, dict[str, Any]] | None:
    try:
        row = json.loads(line)
        key, answer = row["key"], row["answer"]
    except (ValueError, TypeError, KeyError):
        return None
    return (key, answer) if isinstance(key, str) and isinstance(answer, dict) else None
