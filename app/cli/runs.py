"""`sae runs`: what is in the runs folder."""

import json
from pathlib import Path

import click

from app.cli.options import json_option


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
@json_option
def command(folder: Path, as_json: bool) -> None:
    """List the runs in FOLDER (default: runs) with their dictionaries and sizes."""
    from activations.run import Run

    rows = []
    for path in sorted(p.parent for p in folder.glob("*/run.json")):
        run = Run.open(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        names = [p.name for p in run.dictionaries()]
        rows.append(
            {"run": str(path), "model": run.meta["model"], "hooks": run.hooks(), "dictionaries": names, "bytes": size}
        )
    if as_json:
        click.echo(json.dumps(rows))
    elif not rows:
        click.echo(f"No runs in {folder}. Make one with `sae demo`, or `sae collect {folder}/mine`.")
    for row in [] if as_json else rows:
        click.echo(f"{row['run']}: {row['model']}, {row['bytes'] / 1e6:,.0f} MB, hooks {', '.join(row['hooks'])}")
        for name in row["dictionaries"]:
            click.echo(f"  {row['run']}/{name}")
