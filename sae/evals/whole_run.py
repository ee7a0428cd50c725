"""The suite over every finished dictionary of a run: the model is loaded once, what is there stays, and a dictionary
that cannot be measured does not keep the others from it.

What the dictionaries share is made once: the model here, controls by `sae.evals.baselines`, and the rows of labelled
texts by `probing`, which keeps them in the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from activations.errors import InputError
from activations.model import Model
from activations.run import Run
from sae.evals.metric import Metric
from sae.evals.subject import Options
from sae.evals.suite import cheap, check_names, evaluate, reads_model, rows_measured


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of it, by the dictionary's ID."""

    found: dict[str, dict[str, Metric]]
    """What was measured now; empty for those that had all of it."""
    failed: dict[str, str]
    """Why some were not."""


def evaluate_run(
    run: Run,
    load: Callable[[], Model],
    *,
    names: Sequence[str] = (),
    options: Options = Options(),  # noqa: B008  (immutable)
    device: str = "cpu",
    overwrite: bool = False,
) -> Report:
    """Measure each dictionary of `run` (`sae.evals.suite.evaluate`), but for the rows that its eval.json has already.

    load: gives the run's model; called once, and only when there is something to measure that reads it.
    overwrite: measure these rows too. Raises InputError for an unknown metric and a run without dictionaries.
    """
    check_names(names)
    folders = run.dictionaries()
    if not folders:
        raise InputError(f"{run.path} has no dictionary yet: run `sae train {run.path} --arch topk`.")
    report = Report(found={}, failed={})
    skip: dict[Path, set[str]] = {}
    for folder in folders:
        try:
            skip[folder] = set() if overwrite else rows_measured(folder)
        except InputError as error:
            report.failed[folder.name] = str(error)
    left = {folder: [name for name in names or cheap() if name not in rows] for folder, rows in skip.items()}
    model = load() if run.has_text and any(rows and reads_model(rows) for rows in left.values()) else None
    kept: dict[object, Any] = {}
    for number, (folder, rows) in enumerate(left.items(), 1):
        given = replace(options, kept=kept, say=_numbered(options.say, f"{folder.name} ({number} of {len(left)})"))
        try:
            made = evaluate(folder, model, names=names, skip=skip[folder], options=given, device=device) if rows else {}
            report.found[folder.name] = made
        except InputError as error:
            report.failed[folder.name] = str(error)
    return report


def _numbered(say: Callable[[str], None], which: str) -> Callable[[str], None]:
    return lambda name: say(f"{which}: {name}")
