"""`sae eval`: metrics of a dictionary, or of all of a run, with their definitions."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from app.cli.options import COUNT, device_option, json_option

if TYPE_CHECKING:
    from activations.model import Model
    from activations.run import Run
    from data.planted import World
    from sae.evals.subject import Options
    from sae.evals.whole_run import Report

NAMED = 3
"""Dictionaries with the same fault that are named; the others are counted."""


@click.command()
@click.argument("address", metavar="RUN[/ID]")
@click.option("--all", "whole", is_flag=True, help="Every finished dictionary of RUN, without what is there already.")
@click.option("--metric", "names", multiple=True, metavar="NAME", help="Only this, instead of the cheap ones.")
@click.option("--overwrite", is_flag=True, help="With --all: measure again what is there.")
@click.option("--against", default=None, metavar="RUN/ID", help="The dictionary to compare with.")
@click.option("--contexts", type=COUNT, default=64, show_default=True, help="Contexts through the model for CE and KL.")
@click.option("--sets", type=COUNT, default=None, help="Labelled sets that are probed, drawn. [default: all 113]")
@click.option("--set-rows", type=COUNT, default=1500, show_default=True, help="Texts of each labelled set.")
@click.option("--sets-from", default=None, metavar="PATH", help="Folder of CSV files, or wheel, with labelled sets.")
@click.option("--world", default=None, metavar="FOLDER", help="The planted world. [default: the run's vectors' folder]")
@click.option("--model-dtype", default=None, help="Precision of the model. [default: the run's]")
@click.option("--seed", type=int, default=0, show_default=True)
@device_option
@json_option
def command(
    address: str,
    whole: bool,
    names: Sequence[str],
    overwrite: bool,
    against: str | None,
    contexts: int,
    sets: int | None,
    set_rows: int,
    sets_from: str | None,
    world: str | None,
    model_dtype: str | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure a dictionary into eval.json. Example: sae eval runs/mine --metric geometry --metric controls

    With --all every finished dictionary of RUN is measured, and one that cannot be is named at the end.
    """
    if whole and against is not None:
        raise click.UsageError("--against compares a dictionary with another: leave out --all.")
    if overwrite and not whole:
        raise click.UsageError("--overwrite goes with --all: a single dictionary is always measured again.")
    from activations.model import load_model, pick_device
    from activations.run import Run, dictionary_folder
    from data.senses import sense_contexts
    from sae.evals.subject import Options, SenseContext
    from sae.evals.suite import check_names, evaluate, reads_model

    check_names(names)
    folder = None if whole else dictionary_folder(address)
    run = Run.open(address if folder is None else folder.parent.parent)
    options = Options(
        seed=seed,
        contexts=contexts,
        sets=sets,
        set_rows=set_rows,
        sets_from=None if sets_from is None else Path(sets_from),
        senses=[SenseContext(*each) for each in sense_contexts()],
        world=_world(run, world) if world is not None or "truth" in names else None,
        say=lambda name: click.echo(f"{name} ...", err=True),
    )

    def load() -> "Model":
        return load_model(run.model_name, dtype=model_dtype or run.meta["model_dtype"], device=device)

    at = str(pick_device(device))
    if folder is None:
        _all(run, load, names, options, at, overwrite=overwrite, as_json=as_json)
        return
    model = load() if run.has_text and reads_model(names) else None
    metrics = evaluate(folder, model, names=names, against=against, options=options, device=at)
    if as_json:
        click.echo(json.dumps({name: asdict(metric) for name, metric in metrics.items()}))
        return
    wide = max(len(name) for name in metrics)
    for name, metric in metrics.items():
        interval = f" [{metric.lo:.4f}, {metric.hi:.4f}]" if metric.lo is not None else ""
        click.echo(
            f"{name:{wide}} {metric.value:10.4f}{interval:20}  {metric.definition}; n = {metric.n:,} {metric.of}"
        )


def _all(
    run: "Run",
    load: "Callable[[], Model]",
    names: Sequence[str],
    options: "Options",
    device: str,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure all of them and print a line each. Raises InputError, after all, for those that could not be."""
    from activations.errors import InputError
    from sae.evals.whole_run import evaluate_run

    report = evaluate_run(run, load, names=names, options=options, device=device, overwrite=overwrite)
    if as_json:
        found = {id_: {name: asdict(each) for name, each in made.items()} for id_, made in report.found.items()}
        click.echo(json.dumps({"found": found, "failed": report.failed}))
    else:
        _print(report)
    if report.failed:
        n = len(report.failed) + len(report.found)
        raise InputError(f"{len(report.failed)} of {n} dictionaries were not measured: {_faults(report.failed)}")


def _print(report: "Report") -> None:
    wide = max(map(len, report.found), default=0)
    for name, made in report.found.items():
        click.echo(f"{name:{wide}}  " + (f"{len(made)} numbers" if made else "was measured before"))
    if any(not made for made in report.found.values()):
        click.echo("--overwrite measures again what is there.")


def _faults(failed: Mapping[str, str]) -> str:
    """One line; dictionaries with the same fault together."""
    by_fault: dict[str, list[str]] = {}
    for name, why in failed.items():
        by_fault.setdefault(why, []).append(name)
    parts = []
    for why, those in by_fault.items():
        more = f" and {len(those) - NAMED} more" if len(those) > NAMED else ""
        parts.append(f"{', '.join(those[:NAMED])}{more}: {why}")
    return " | ".join(parts)


def _world(run: "Run", given: str | None) -> "World | None":
    """The world in the folder given, else in the one that the run's vectors came from; None when that has none."""
    from activations.errors import InputError
    from data.planted import CONFIG, load_world

    folder = Path(str(run.meta["corpus"]) if given is None else given)
    if given is None and not (folder / CONFIG).is_file():
        return None
    try:
        return load_world(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder} holds no planted world ({error}): expected what data.planted.plant wrote."
        ) from None
