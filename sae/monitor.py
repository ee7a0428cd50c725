"""What a running training tells: a progress bar, a line in train.jsonl now and then, how fast it is in progress.json.

The log holds nothing of the clock, so that a killed and resumed run leaves the same bytes; progress.json is there only
while the dictionary is not finished. Trackers (`sae.tracking`) are told the lines of the log.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from activations.files import write_aside, write_json
from sae.settings import Training
from sae.tracking import tracker

LOG, PROGRESS = "train.jsonl", "progress.json"
PROGRESS_SECONDS = 2.0


class Monitor:
    """The log of one dictionary in `folder`, and who else hears of it.

    begin: the step that training starts from; later lines are cut off. track: names of trackers.
    """

    def __init__(self, folder: Path, settings: Training, begin: int, track: Sequence[str] = ()) -> None:
        self._folder, self._settings = folder, settings
        path = folder / LOG
        lines = list(_whole_lines(path, begin))
        with write_aside(path) as aside:
            aside.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._first: tuple[float, int] | None = None
        self._told = -PROGRESS_SECONDS
        with ExitStack() as stack:
            self._file = stack.enter_context(path.open("a", encoding="utf-8"))
            self._trackers = [stack.enter_context(closing(tracker(kind, folder, settings))) for kind in track]
            for line in lines:
                for each in self._trackers:
                    each.line(line)
            self._open = stack.pop_all()

    def line(self, step: int, tokens: int, figures: Mapping[str, float]) -> None:
        """Log the figures of one step."""
        line = {"step": step, "tokens": tokens, **{key: float(f"{value:.6g}") for key, value in figures.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for each in self._trackers:
            each.line(line)
        now = time.monotonic()
        self._first = self._first or (now, tokens)
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            write_json(self._folder / PROGRESS, self._progress(now, tokens), sync=False)

    def finish(self) -> None:
        """Once the dictionary is saved: nothing is in progress any more."""
        (self._folder / PROGRESS).unlink(missing_ok=True)

    def close(self) -> None:
        self._open.close()

    def _progress(self, now: float, tokens: int) -> dict[str, Any]:
        assert self._first is not None
        since, first = self._first  # what came before the first line is starting up
        rate = (tokens - first) / (now - since) if now > since else None
        return {
            "tokens": tokens,
            "n_tokens": self._settings.n_steps * self._settings.batch,
            "tokens_per_second": rate and round(rate, 1),
            "seconds_left": rate and round((self._settings.n_steps * self._settings.batch - tokens) / rate, 1),
            "started": self._started,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }


def _whole_lines(path: Path, last: int) -> Iterator[dict[str, Any]]:
    """The lines of a log up to step `last`. What a kill or a full disk cut in half ends them."""
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            return
        if line["step"] > last:
            return
        yield line


class Bar:
    """A bar over tokens with speed and time left; silent where the output is no terminal, or it is not `shown`."""

    def __init__(self, total: int, initial: int, *, shown: bool = True) -> None:
        hidden = None if shown else True
        self._bar = tqdm(total=total, initial=initial, unit="token", unit_scale=True, desc="train", disable=hidden)

    def step(self, tokens: int) -> None:
        self._bar.update(tokens)

    def figures(self, each: Sequence[Mapping[str, float]]) -> None:
        """Show the figures of the dictionaries that are trained together, with "dead" as a share."""
        self._bar.set_postfix_str(", ".join(_span(name, form, each) for name, form in SHOWN), refresh=False)

    def close(self) -> None:
        self._bar.close()


SHOWN = (("loss", ".3f"), ("fvu", ".3f"), ("l0", ".1f"), ("dead", ".1%"))


def _span(name: str, form: str, each: Sequence[Mapping[str, float]]) -> str:
    low, high = min(figures[name] for figures in each), max(figures[name] for figures in each)
    return f"{name} {low:{form}}" + (f" to {high:{form}}" if high > low else "")
