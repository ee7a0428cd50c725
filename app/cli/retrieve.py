"""`sae retrieve`: search by meaning, with latents of the query raised or lowered."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from app.cli.options import COUNT, device_option, json_option

if TYPE_CHECKING:
    from steering.retrieve import Hit

SHOWN = 90
"""Characters of a text that are printed."""


class ChangeOption(click.ParamType[tuple[int, float, bool]]):
    """LATENT=AMOUNT to set, LATENT=+AMOUNT or LATENT=-AMOUNT to add: (latent, amount, whether it is added)."""

    name = "change"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float, bool]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)=([+-]?)(\d+(?:\.\d+)?|\.\d+)", str(value).strip())
        if not match:
            self.fail(f"{value!r} is no change: expected 12=0 to set a latent, or 12=+2, 12=-0.5 to add.", param, ctx)
        amount = float(match[3])
        return int(match[1]), -amount if match[2] == "-" else amount, bool(match[2])


@click.command()
@click.argument("address", metavar="RUN[/ID]")
@click.argument("text", required=False)
@click.option("--row", type=click.IntRange(0), default=None, help="Ask with this row of the run instead of a text.")
@click.option(
    "--latent",
    "changes",
    multiple=True,
    metavar="N=[+-]A",
    type=ChangeOption(),
    help="Set latent N to A of its largest value, or add so much; may be repeated.",
)
@click.option("--limit", type=COUNT, default=10, show_default=True, help="Results of each search.")
@click.option(
    "--controls", type=click.IntRange(0), default=20, show_default=True, help="Random latents to compare with."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random latents.")
@device_option
@json_option
def command(
    address: str,
    text: str | None,
    row: int | None,
    changes: Sequence[tuple[int, float, bool]],
    limit: int,
    controls: int,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Search a run of embeddings with TEXT; with --latent, also as if the text had more or less of something.

    Without --latent it names the query's own latents. Example: sae retrieve runs/texts "a storm at sea" --latent 12=+1
    """
    if (text is None) == (row is None):
        raise click.UsageError("Ask with a TEXT, or with --row NUMBER.")
    from app.retrieval import retrieve_run
    from steering.retrieve import Change

    made = [Change(latent=latent, amount=amount, relative=relative) for latent, amount, relative in changes]
    query = text if text is not None else row
    assert query is not None
    found, texts = retrieve_run(address, query, made, n=limit, n_controls=controls, seed=seed, device=device)
    if as_json:
        click.echo(json.dumps({"query": query, **asdict(found), "texts": texts}))
        return
    own = ", ".join(f"{latent} ({value:.2f})" for latent, value in found.query.items())
    click.echo(f"Latents of the query (1: as on the row where they are largest): {own or 'none'}")
    _show("As asked:", found.base, texts)
    if not made:
        return
    _show("\nSteered:", found.steered, texts)
    click.echo("")
    names = [name.removeprefix("base.") for name in found.metrics if name.startswith("base.")]
    for name in names:
        values = [found.metrics.get(f"{which}.{name}") for which in ("base", "steered", "control.random")]
        numbers = "  ".join("    -" if metric is None else f"{metric.value:.3f}" for metric in values)
        click.echo(f"{name:20} {numbers}  {found.metrics[f'base.{name}'].definition}")
    click.echo(f"{'':20} asked, steered, mean of {controls} random latents raised until the query moved as far")


def _show(title: str, hits: Sequence["Hit"], texts: Mapping[int, str]) -> None:
    click.echo(title)
    for hit in hits:
        fires = "".join(f"  {latent}: {value:.2f}" for latent, value in hit.latents.items() if value)
        text = "".join(c for c in " ".join(texts.get(hit.doc, f"row {hit.row}").split()) if c.isprintable())
        click.echo(f"  {hit.cosine:.3f}  {text[:SHOWN]}{fires}")
