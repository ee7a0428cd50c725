"""`sae demo`: the whole pipeline on the embedded model and corpus."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import click

from app.cli.options import device_option


@click.command()
@click.option(
    "--run", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Where to put it."
)
@device_option
def command(run: Path, device: str) -> None:
    """Cache activations, train, measure, index, label; ends with the line that opens the app. Killed, it goes on."""
    from app.pipeline import demo

    folder = demo(run, device=device, say=click.echo)
    metrics = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["metrics"]
    figures = {name: metrics[name]["value"] for name in ("fvu", "l0", "delta_ce", "dead")}
    sae = _this_command()
    click.echo(
        f"\n{run}: FVU {figures['fvu']:.3f}, L0 {figures['l0']:.1f}, delta CE {figures['delta_ce']:.3f} nats, "
        f"dead {figures['dead']:.1%}. This is a small dictionary of a small model; for a longer run:\n"
        f"  {sae} collect runs/long --tokens 3M && {sae} train runs/long --tokens 50M && {sae} index runs/long\n"
        f"\nOpen http://127.0.0.1:8501 after:\n  {sae} app {shlex.quote(str(run.parent))}"
    )


def _this_command() -> str:
    """How this `sae` is called from here: by its path (.venv/bin/sae) where the name alone finds none or another."""
    here = Path(sys.argv[0])
    found = shutil.which("sae")
    return "sae" if found and Path(found).resolve() == here.resolve() else shlex.quote(str(here))
