"""`sae sweep`: a grid of dictionaries of one run from a TOML file; those of a hook are trained in one pass.

    [base]            # options of `sae train`, the same for all
    tokens = "10M"
    [grid]            # lists; a dictionary for each combination
    k = [16, 32, 64]
    d_sae = [4608, 9216]
    options.auxk_weight = [0, 0.03125]   # a field of the architecture's config, as after `-o`

RUN/sweep.json holds the settings and held-out metrics of the cells of every sweep of the run.
"""

import dataclasses
import itertools
import json
import shutil
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import click

from activations.errors import InputError
from activations.files import lock, read_json, write_aside, write_json
from activations.model import pick_device
from activations.run import Run, versions
from app.cli.train import command as train_command
from app.figures import pareto
from app.recipe import Recipe, hooks_of, training
from app.sweep_table import PLOT, RECORD, Cell, cells_of
from sae.evals.density import density
from sae.evals.metric import over_hooks
from sae.evals.reconstruction import reconstruction
from sae.evals.suite import measured_on
from sae.files import CFG, load_sae
from sae.plan import check_memory
from sae.rows import rows_for, width_read
from sae.settings import Training, default_name
from sae.train import Outcome, begun_with, train_together

SHARED = ("tokens", "batch", "roles", "order_seed")
"""Keys that all cells of a sweep have in common, since they see the same batches."""
OWN = "options."
"""What keys of fields of the architecture's config begin with."""
IN_NAME = ("hook", "target_hook", "arch", "d_sae", "expansion", "k", "seed")


def sweep(
    path: Path, file: Path, *, device: str = "auto", keep: int = 2, overwrite: bool = False
) -> tuple[list[Cell], int]:
    """Train and measure the cells of `file` that the run at `path` has not; all cells of the run, how many were there.

    Writes sweep.json and sweep.html into the run. Raises InputError before anything is trained for a file that is
    wrong, cells that cannot be, that are there twice or need more memory than there is.
    """
    run = Run.open(path)
    cells = read_cells(file, run)
    left = [cell for name, cell in cells.items() if overwrite or not (run.dictionary(name) / CFG).exists()]
    for rows in {cell.rows for cell in left}:  # before anything is given up for it
        here = [cell for cell in left if cell.rows == rows]
        d_in = width_read(here[0], rows_for(here[0], partial(run.activations, roles=here[0].roles)))
        check_memory(here, d_in, pick_device(device))
    with lock(run.path / ".sweep.lock"):
        if overwrite:
            for name in cells:
                shutil.rmtree(run.dictionary(name), ignore_errors=True)
        outcomes = train_together(run, cells, device=device, keep=keep)
        record = _still_there(run)
        for name, outcome in outcomes.items():
            if outcome.n_tokens or name not in record:
                record[name] = _measured(outcome, device)
                write_json(run.path / RECORD, {"versions": versions(), "cells": record})
        done = cells_of({"cells": record})
        with write_aside(run.path / PLOT) as aside:
            aside.write_text(pareto(done).to_html(include_plotlyjs=True, div_id="sweep"), encoding="utf-8")
    return done, sum(outcome.n_tokens == 0 for outcome in outcomes.values())


def read_cells(file: Path, run: Run | None, *, d_in: int | None = None) -> dict[str, Training]:
    """ID: settings of each cell of the grid in `file`. Raises InputError.

    run: whose activations they are of; None, for a plan: of some that are d_in wide.
    """
    base, grid = _read(file)
    cells: dict[str, Training] = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        recipe = base | point
        if own := {key.removeprefix(OWN): recipe.pop(key) for key in [*recipe] if key.startswith(OWN)}:
            recipe["options"] = own
        if recipe.get("seed", 0) != 0:  # that of seed 0, so that all seeds see the same batches
            recipe.setdefault("order_seed", 0)
        hooks = hooks_of(cast(Recipe, recipe)) or ("hook" if run is None else _only_hook(run, file),)
        try:
            widths = dict.fromkeys((*hooks, *recipe.get("target_hook", ())), d_in or 0)
            if run is not None:
                widths = {hook: run.activations(hook, roles=recipe.get("roles", ())).d_in for hook in widths}
            settings = training(cast(Recipe, recipe), hook=hooks[0], d_in=widths[hooks[0]], widths=widths)
        except InputError as error:
            said = ", ".join(f"{key}={_text(value)}" for key, value in point.items())
            raise InputError(f"{file}: the cell {said} cannot be: {error}" if said else f"{file}: {error}") from None
        others = [f"{key.removeprefix(OWN)}{_text(value)}" for key, value in point.items() if key not in IN_NAME]
        name = "-".join([default_name(settings), *others])
        if name in cells:
            raise InputError(f"{file}: the cell {name} is there twice: expected each value of a list once.")
        cells[name] = settings
    return cells


def _read(file: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """[base] and [grid] with the names and the types that `training` takes."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): expected a file with [base] and [grid].") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no TOML: {error}.") from None
    base, grid = content.pop("base", {}), content.pop("grid", {})
    if content or not isinstance(base, dict) or not isinstance(grid, dict):
        raise InputError(f"{file}: expected the tables [base] and [grid] alone, not {', '.join(content) or 'others'}.")
    base, grid, options = _flat(base, file), _flat(grid, file), _options()
    chosen = {_known(key, options, file): value for key, value in base.items()}
    lists = {_known(key, options, file): value for key, value in grid.items()}
    for key, value in lists.items():
        if key in SHARED:
            raise InputError(f"{file}: {key} is one for all cells, which see the same batches: put it into [base].")
        if key in chosen or len(lists) + len(chosen) < len(base) + len(grid):
            raise InputError(f"{file}: {key} is there twice: expected it once, in [base] or in [grid].")
        if not isinstance(value, list) or not value:
            raise InputError(f"{file}: {key} = {value!r} in [grid]: expected a list of values.")
    if {"d_sae", "expansion"} <= {*chosen, *lists}:
        raise InputError(f"{file}: d_sae and expansion both say how many latents: expected one of them.")
    return (
        {key: _converted(options.get(key), value, file) for key, value in chosen.items()},
        {key: [_converted(options.get(key), value, file) for value in values] for key, values in lists.items()},
    )


def _flat(table: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """{"options.a": 1} of {"options": {"a": 1}}."""
    own = table.get("options", {})
    if not isinstance(own, dict):
        raise InputError(f"{file}: options = {own!r}: expected a table, such as options = {{auxk_weight = 0}}.")
    return {key: value for key, value in table.items() if key != "options"} | {OWN + k: v for k, v in own.items()}


def _options() -> dict[str, click.Option]:
    """The options of `sae train` that describe a dictionary, by their name in Python."""
    fields = Recipe.__annotations__.keys() - {"live", "options"}
    return {o.name: o for o in train_command.params if isinstance(o, click.Option) and o.name in fields}


def _known(key: str, options: Mapping[str, click.Option], file: Path) -> str:
    if key.startswith(OWN):
        return key
    for name, option in options.items():
        if key.replace("_", "-") == option.opts[0].lstrip("-"):
            return name
    names = sorted(["options", *(option.opts[0].lstrip("-") for option in options.values())])
    raise InputError(f"{file}: {key!r} is no option of `sae train` for a sweep: expected one of {', '.join(names)}.")


def _converted(option: click.Option | None, value: Any, file: Path) -> Any:
    if option is None:  # a field of the config, which checks it
        return value
    if option.multiple:
        if not isinstance(value, str | list):
            raise InputError(f"{file}: {option.name} = {value!r}: expected a text, or a list of them.")
        return (value,) if isinstance(value, str) else tuple(map(str, value))
    try:
        if isinstance(value, bool | list | dict):
            raise click.BadParameter(f"expected a {option.type.name}.")
        return option.type.convert(str(value), option, None)
    except click.BadParameter as error:
        raise InputError(f"{file}: {option.opts[0].lstrip('-')} = {value!r}: {error.message}") from None


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "+".join(map(_text, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _only_hook(run: Run, file: Path) -> str:
    hooks = run.hooks()
    if len(hooks) != 1:
        raise InputError(f"{run.path} has {len(hooks)} hooks ({', '.join(hooks) or 'none'}): name some in {file}.")
    return hooks[0]


def _still_there(run: Run) -> dict[str, Any]:
    """The cells of sweep.json whose dictionaries are still those that were measured."""
    path = run.path / RECORD
    cells = read_json(path).get("cells", {}) if path.exists() else {}
    return {name: entry for name, entry in cells.items() if _settings(run.dictionary(name)) == entry.get("settings")}


def _settings(folder: Path) -> Any:
    """The settings of a finished dictionary as JSON reads them back."""
    begun = begun_with(folder) if (folder / CFG).exists() else None
    return None if begun is None else json.loads(json.dumps(dataclasses.asdict(begun)))


def _measured(outcome: Outcome, device: str) -> dict[str, Any]:
    """An entry of sweep.json. The speed is None when the dictionary had been trained before."""
    sae = load_sae(outcome.folder, device=str(pick_device(device)))
    measured = {hook: reconstruction(whole, rows) for hook, whole, rows in measured_on(outcome.folder, sae)}
    metrics = {**over_hooks(measured), **density(sae)}
    trained = outcome.n_tokens > 0
    return {
        "settings": _settings(outcome.folder),
        "tokens": outcome.n_tokens,
        "seconds": round(outcome.seconds, 1) if trained else None,
        "tokens_per_second": round(outcome.n_tokens / outcome.seconds, 1) if trained else None,
        "metrics": {name: dataclasses.asdict(metric) for name, metric in metrics.items()},
    }
