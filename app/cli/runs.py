"""`sae runs`: what is in the runs folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from app.cli.options import json_option

if TYPE_CHECKING:
    from activations.run import Run


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
@json_option
def command(folder: Path, as_json: bool) -> None:
    """List the runs in FOLDER (default: runs) with their dictionaries and sizes."""
    from activations.run import Run
    from app.cleaning import size_of

    rows = []
    for path in sorted(p.parent for p in folder.glob("*/run.json")):
        run = Run.open(path)
        rows.append(
            {
                "run": str(path),
                "model": run.meta["model"],
                "corpus": run.meta["corpus"],
                "hooks": {hook: _hook(run, hook) for hook in run.hooks()},
                "dictionaries": [p.name for p in run.dictionaries()],
                "bytes": size_of(path),
            }
        )
    if as_json:
        click.echo(json.dumps(rows))
    elif not rows:
        click.echo(f"No runs in {folder}. Make one with `sae demo`, or `sae collect {folder}/mine`.")
    for row in [] if as_json else rows:
        of = "no model yet" if row["model"] is None else f"{row['model']} on {row['corpus']}"
        click.echo(f"{row['run']}: {of}, {row['bytes'] / 1e6:,.0f} MB")
        for hook, has in row["hooks"].items():
            state = "" if has["complete"] else f", unfinished: sae collect {row['run']} goes on"
            click.echo(f"  at {hook}: {has['rows']:,} rows, {has['bytes'] / 1e6:,.0f} MB{state}")
        for name in row["dictionaries"]:
            click.echo(f"  {row['run']}/{name}")


def _hook(run: "Run", hook: str) -> dict[str, Any]:
    from activations.shards import Shards
    from app.cleaning import size_of

    shards = Shards(run.path / "activations" / hook)
    rows = sum(shards.entry(i)["rows"] for i in range(len(shards)))
    return {"rows": rows, "complete": shards.complete, "bytes": size_of(shards.folder)}
