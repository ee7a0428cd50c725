"""`sae eval`: metrics of a dictionary with their definitions."""

import json
from dataclasses import asdict

import click

from app.cli.options import COUNT, device_option, json_option


@click.command()
@click.argument("address", metavar="RUN[/ID]")
@click.option("--contexts", type=COUNT, default=64, show_default=True, help="Contexts through the model for CE and KL.")
@click.option("--model-dtype", default=None, help="Precision of the model. [default: the run's]")
@click.option("--seed", type=int, default=0, show_default=True)
@device_option
@json_option
def command(address: str, contexts: int, model_dtype: str | None, seed: int, device: str, as_json: bool) -> None:
    """Measure a dictionary into eval.json. Example: sae eval runs/mine"""
    from activations.model import Model, load_model
    from activations.run import Run, dictionary_folder
    from sae.evals.suite import evaluate

    folder = dictionary_folder(address)
    run = Run.open(folder.parent.parent)
    model: Model | None = None
    if run.has_text:
        model = load_model(run.meta["model"], dtype=model_dtype or run.meta["model_dtype"], device=device)
    metrics = evaluate(folder, model, n_contexts=contexts, seed=seed)
    if as_json:
        click.echo(json.dumps({name: asdict(metric) for name, metric in metrics.items()}))
        return
    for name, metric in metrics.items():
        interval = f" [{metric.lo:.4f}, {metric.hi:.4f}]" if metric.lo is not None else ""
        click.echo(f"{name:16} {metric.value:9.4f}{interval:20}  {metric.definition}; n = {metric.n:,} {metric.of}")
