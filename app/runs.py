"""The runs and dictionaries in the runs folder, and the only way from a name in the URL to a path: this listing.

Reads small JSON files only, never a model or a store. A folder that is damaged is listed with what is wrong with it, so
that nothing disappears in silence.
"""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST_JSON = 16 * 2**20  # a run folder may come from anybody: read no more than this into memory
STORE_FILE = "features.duckdb"


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """One dictionary of a run, as its small files describe it."""

    run: str
    name: str
    folder: Path
    address: str
    """RUN/ID as a person types it in the shell where the app was started."""
    model_dtype: str | None
    """Precision that the run's activations were taken in; None where the run does not say."""
    config: dict[str, Any]
    evaluation: dict[str, Any] | None

    @property
    def architecture(self) -> str:
        """The name that it was trained under; SAELens may know the finished dictionary by another."""
        return str(self.config.get("trained_architecture", self.config.get("architecture", "?")))

    @property
    def has_store(self) -> bool:
        return (self.folder / STORE_FILE).is_file()


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """One run."""

    name: str
    folder: Path
    address: str
    meta: dict[str, Any]
    hooks: Sequence[str]
    """Hooks with cached activations."""
    dictionaries: Sequence[Dictionary]
    fault: str = ""
    """What is wrong with run.json; empty when nothing is."""


def runs_root() -> Path:
    """The folder that `sae app` was started on."""
    return Path(os.environ.get("SAE_RUNS_DIR", "runs")).absolute()


def list_runs(root: Path) -> list[RunFolder]:
    """The runs in `root`, by name; `root` itself when it is a run; none when there is no such folder."""
    if (root / "run.json").is_file():
        return [_run(root)]
    if not root.is_dir():
        return []
    folders = sorted(p for p in root.iterdir() if not p.name.startswith(".") and (p / "run.json").is_file())
    return [_run(folder) for folder in folders]


def find(runs: Sequence[RunFolder], run: str, dictionary: str) -> Dictionary | None:
    """The listed dictionary of that name. Names are compared, never joined to a path, so none can lead outside."""
    for each in runs:
        if each.name == run:
            return next((d for d in each.dictionaries if d.name == dictionary), None)
    return None


def _run(folder: Path) -> RunFolder:
    address = shown_path(folder)
    meta, fault = read_object(folder / "run.json")
    inside = folder.resolve()
    found = sorted(p.parent for p in folder.glob("dictionaries/*/cfg.json"))
    return RunFolder(
        name=folder.name,
        folder=folder,
        address=address,
        meta=meta or {},
        fault=fault,
        hooks=sorted(p.parent.name for p in folder.glob("activations/*/manifest.json") if p.parent.name != "tokens"),
        dictionaries=[
            Dictionary(
                run=folder.name,
                name=each.name,
                folder=each,
                address=f"{address}/{each.name}",
                model_dtype=dtype if isinstance(dtype := (meta or {}).get("model_dtype"), str) else None,
                config=read_object(each / "cfg.json")[0] or {},
                evaluation=read_object(each / "eval.json")[0],
            )
            for each in found
            if not each.name.startswith(".") and each.resolve().is_relative_to(inside)
        ],
    )


def read_object(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The JSON object in `path` and what is wrong with it."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            return None, f"{path.name} is larger than {LARGEST_JSON >> 20} MiB: it is not one of ours."
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"{path.name} is missing."
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{path.name} cannot be read ({error}): restore it, or make the run again."
    return (value, "") if isinstance(value, dict) else (None, f"{path.name} holds no JSON object: restore it.")


def sae(*words: str) -> str:
    """A command of ours as it is typed, safe to paste whatever a folder is called."""
    return shlex.join(["sae", *words])


def shown_path(path: Path) -> str:
    """`path` as it is typed from the current folder, if it lies below that; else in full."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
