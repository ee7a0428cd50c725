"""`sae sweep`: a grid of dictionaries in one pass over a run's activations."""

import dataclasses
import json
from pathlib import Path

import click

from app.cli.options import device_option, json_option, overwrite_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.toml")
@click.option("--keep", type=click.IntRange(1), default=2, show_default=True, help="Checkpoints of each that stay.")
@overwrite_option
@device_option
@json_option
def command(run: Path, file: Path, keep: int, overwrite: bool, device: str, as_json: bool) -> None:
    """Train a grid of dictionaries on what RUN has cached. Example: sae sweep runs/mine grid.toml

    FILE.toml has options of `sae train` under [base] and lists of them under [grid]. Finished cells are passed over, a
    killed sweep goes on, and cells that are added later are trained beside the others.
    """
    from app.sweep import sweep
    from app.sweep_table import PLOT, RECORD, table

    cells, before = sweep(run, file, device=device, keep=keep, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(cell) for cell in cells]))
        return
    click.echo("\n".join(table(cells)))
    if before:
        click.echo(f"{before} of the file's cells were trained before (--overwrite replaces them).")
    click.echo(f"{run / RECORD}   {run / PLOT}")
