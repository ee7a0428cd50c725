"""The trainings of a run, as their small files describe them: settings, state, and the curves of train.jsonl, thinned.

A training goes on while its lock is held, whatever its files say: the operating system lets go of a dead process's.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from activations.files import is_locked
from app.runs import RunFolder, read_object, sae

TRAINING, FINISHED, STOPPED = "training", "finished", "stopped"
POINTS = 400
"""Points of a curve; more lines of the log than pixels tell nothing."""
Line = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainingFolder:
    """One dictionary that training was begun for."""

    name: str
    state: str
    d_sae: int | None
    progress: dict[str, Any]
    """progress.json; only while it is not finished."""
    lines: Sequence[Line] = field(repr=False)
    """Of the log, at most about POINTS of them and always the last: step, tokens and figures, with "dead" a share."""
    command: str
    """What goes on with it."""

    @property
    def done(self) -> float:
        """Share of the tokens that were visited; 0 where that is not known."""
        tokens, n_tokens = self.lines[-1]["tokens"] if self.lines else 0, number(self.progress.get("n_tokens"))
        return 1.0 if self.state == FINISHED else min(tokens / n_tokens, 1.0) if n_tokens else 0.0


def trainings(run: RunFolder) -> list[TrainingFolder]:
    """The trainings of a run, by name; what lies outside the run's folder is none of them."""
    inside = run.folder.resolve()
    found = sorted(path.parent for path in run.folder.glob("dictionaries/*/train.json"))
    return [_training(run, each) for each in found if each.name[0] != "." and each.resolve().is_relative_to(inside)]


def _training(run: RunFolder, folder: Path) -> TrainingFolder:
    settings = read_object(folder / "train.json")[0] or {}
    sizes = settings.get("sizes")
    d_sae = sizes.get("d_sae") if isinstance(sizes, dict) else None
    d_sae = d_sae if isinstance(d_sae, int) and d_sae > 0 else None
    progress = read_object(folder / "progress.json")[0] or {}
    if "n_tokens" not in progress:
        progress["n_tokens"] = settings.get("n_tokens")
    state = FINISHED if (folder / "cfg.json").exists() else STOPPED
    if state == STOPPED and (folder / ".train.lock").exists() and is_locked(folder / ".train.lock"):
        state = TRAINING
    return TrainingFolder(
        name=folder.name,
        state=state,
        d_sae=d_sae,
        progress=progress,
        lines=_lines(folder / "train.jsonl", d_sae),
        command=sae("train", run.address, "--name", folder.name, "--resume"),
    )


def _lines(path: Path, d_sae: int | None) -> list[Line]:
    try:
        texts = path.read_bytes().splitlines()
    except OSError:
        return []
    step = max(-(-len(texts) // POINTS), 1)
    lines = [_line(text, d_sae) for text in [*texts[:-1:step], *texts[-1:]]]
    return [line for line in lines if "tokens" in line]


def _line(text: bytes, d_sae: int | None) -> Line:
    """The finite numbers of a line; nothing of one that is being written or was damaged."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    line = {key: n for key, v in value.items() if (n := number(v)) is not None} if isinstance(value, dict) else {}
    if d_sae and "n_dead" in line:
        line["dead"] = line["n_dead"] / d_sae
    return line


def number(value: object) -> float | None:
    """`value` if it is a finite number: the file may come from anybody."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e300 and math.isfinite(value) else None
