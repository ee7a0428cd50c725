"""`sae clean`: drop what can be made again."""

import json
from pathlib import Path

import click

from app.cli.options import json_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--activations/--no-activations", default=True, help="Drop the cached rows; the tokens stay.")
@click.option(
    "--checkpoints/--no-checkpoints",
    default=True,
    help="Drop checkpoints of finished dictionaries, and unfinished indexes.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def command(run: Path, activations: bool, checkpoints: bool, dry_run: bool, as_json: bool) -> None:
    """Drop RUN's activations and the checkpoints of its finished dictionaries. Example: sae clean runs/mine

    Dictionaries, stores and explanations stay. `sae collect` makes the same activations again.
    """
    from activations.run import Run
    from app.cleaning import clean

    gone = clean(Run.open(run), activations=activations, checkpoints=checkpoints, dry_run=dry_run)
    total = sum(gone.values())
    if as_json:
        click.echo(json.dumps({"freed": 0 if dry_run else total, "folders": {str(p): n for p, n in gone.items()}}))
        return
    for path, size in gone.items():
        click.echo(f"{path}: {size / 1e6:,.0f} MB")
    verb = "would be freed" if dry_run else "freed"
    click.echo(f"{total / 1e6:,.0f} MB {verb}." if gone else f"{run} has nothing to drop.")
