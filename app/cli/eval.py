"""`sae eval`: metrics of a dictionary with their definitions."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from app.cli.options import COUNT, device_option, json_option


@click.command()
@click.argument("address", metavar="RUN[/ID]")
@click.option("--metric", "names", multiple=True, metavar="NAME", help="Only this, instead of the cheap ones.")
@click.option("--against", default=None, metavar="RUN/ID", help="The dictionary to compare with.")
@click.option("--contexts", type=COUNT, default=64, show_default=True, help="Contexts through the model for CE and KL.")
@click.option("--sets", type=COUNT, default=None, help="Labelled sets that are probed, drawn. [default: all 113]")
@click.option("--set-rows", type=COUNT, default=1500, show_default=True, help="Texts of each labelled set.")
@click.option("--sets-from", default=None, metavar="PATH", help="Folder of CSV files, or wheel, with labelled sets.")
@click.option("--model-dtype", default=None, help="Precision of the model. [default: the run's]")
@click.option("--seed", type=int, default=0, show_default=True)
@device_option
@json_option
def command(
    address: str,
    names: Sequence[str],
    against: str | None,
    contexts: int,
    sets: int | None,
    set_rows: int,
    sets_from: str | None,
    model_dtype: str | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure a dictionary into eval.json. Example: sae eval runs/mine --metric geometry --metric controls"""
    from pathlib import Path

    from activations.model import Model, load_model, pick_device
    from activations.run import Run, dictionary_folder
    from data.senses import sense_contexts
    from sae.evals.subject import Options, SenseContext
    from sae.evals.suite import check_names, evaluate, reads_model

    folder = dictionary_folder(address)
    check_names(names)
    run = Run.open(folder.parent.parent)
    model: Model | None = None
    if run.has_text and reads_model(names):
        model = load_model(run.model_name, dtype=model_dtype or run.meta["model_dtype"], device=device)
    options = Options(
        seed=seed,
        contexts=contexts,
        sets=sets,
        set_rows=set_rows,
        sets_from=None if sets_from is None else Path(sets_from),
        senses=[SenseContext(*each) for each in sense_contexts()],
        say=lambda name: click.echo(f"{name} ...", err=True),
    )
    metrics = evaluate(folder, model, names=names, against=against, options=options, device=str(pick_device(device)))
    if as_json:
        click.echo(json.dumps({name: asdict(metric) for name, metric in metrics.items()}))
        return
    wide = max(len(name) for name in metrics)
    for name, metric in metrics.items():
        interval = f" [{metric.lo:.4f}, {metric.hi:.4f}]" if metric.lo is not None else ""
        click.echo(
            f"{name:{wide}} {metric.value:10.4f}{interval:20}  {metric.definition}; n = {metric.n:,} {metric.of}"
        )
