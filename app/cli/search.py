"""`sae search`: features by label, token, prompt or another feature."""

import json
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from app.cli.options import COUNT, SHARE, device_option, json_option

if TYPE_CHECKING:
    from autointerp.search import Found, Hit

WIDE = 160
"""Columns where the output is no terminal."""
NARROWEST = 30
"""Columns of a label, however narrow the terminal is."""
_PERCENT = ("of_firings", "of_token", "of_max")
_COUNTS = ("words", "n", "tokens")


@click.command()
@click.argument("address", metavar="RUN[/ID]")
@click.argument("text", metavar="TEXT")
@click.option(
    "--by",
    type=click.Choice(["words", "meaning", "token", "prompt", "feature"]),
    default="words",
    show_default=True,
    help="Words or meaning of the labels; a token that features fire on; a prompt they fire on; a feature's number, "
    "for those like it.",
)
@click.option(
    "--rank",
    default=None,
    metavar="ORDER",
    help="By token: firings or value. By prompt: activation, rarity or loss. By feature: cosine, phi or jaccard. "
    "[default: the first]",
)
@click.option("--candidates", type=COUNT, default=50, show_default=True, help="Features measured by --rank loss.")
@click.option("--limit", type=COUNT, default=20, show_default=True, help="Features to show.")
@click.option("--min-density", type=SHARE, default=0.0, show_default=True, help="Share of tokens on which it fires.")
@click.option("--max-density", type=SHARE, default=1.0, show_default=True, help="And at most.")
@click.option("--min-score", type=SHARE, default=None, help="Detection score of the label. [default: also unscored]")
@click.option("--max-score", type=SHARE, default=None, help="And at most.")
@click.option("--source", type=click.Choice(["person", "llm", "lexical"]), default=None, help="Who wrote the label.")
@click.option("--cluster", type=click.IntRange(0), default=None, help="Cluster of the decoder row, 0 the largest.")
@click.option(
    "--state",
    type=click.Choice(["all", "alive", "dead"]),
    default="all",
    show_default=True,
    help="Whether it fired in the indexed text.",
)
@device_option
@json_option
def command(
    address: str,
    text: str,
    by: str,
    rank: str | None,
    candidates: int,
    limit: int,
    min_density: float,
    max_density: float,
    min_score: float | None,
    max_score: float | None,
    source: str | None,
    cluster: int | None,
    state: str,
    device: str,
    as_json: bool,
) -> None:
    """Find features of a dictionary that fit TEXT.

    Example: sae search runs/demo "The ship sailed at dawn" --by prompt --rank rarity
    """
    from autointerp.search import search
    from data.store import Filters

    filters = Filters(
        state=state,
        min_density=min_density,
        max_density=max_density,
        min_score=min_score,
        max_score=max_score,
        source=source,
        cluster=cluster,
    )
    found = search(address, text, by=by, rank=rank, filters=filters, limit=limit, candidates=candidates, device=device)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    click.echo("\n".join(lines(found, shutil.get_terminal_size((WIDE, 24)).columns)))


def lines(found: "Found", columns: int) -> list[str]:
    """The answer as a table of so many columns, with what its numbers mean; or what to do instead."""
    if not found.hits:
        return [f"Nothing found in {_printable(found.address)}. {_printable(found.next_step)}"]
    names = list(found.hits[0].numbers)
    names += [name for hit in found.hits for name in hit.numbers if name not in names]
    with_token = any(hit.token is not None for hit in found.hits)
    head = ["feature", *names, *(["token"] if with_token else []), "density", "score"]
    table = [head] + [_cells(hit, names, with_token=with_token) for hit in found.hits]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    room = max(columns - sum(widths) - 2 * len(widths), NARROWEST)
    labels = ["label", *(_label(hit, room) for hit in found.hits)]
    text_column = len(head) - 3 if with_token else -1
    body = []
    for row, label in zip(table, labels, strict=True):
        cells = [
            cell.ljust(width) if i == text_column else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        body.append("  ".join([*cells, label]).rstrip())
    shown = f"{len(found.hits):,}" + ("" if found.total is None else f" of {found.total:,}")
    order = f", by {found.rank}" if found.rank else ""
    about = f"{shown} features of {_printable(found.address)} ({_printable(found.hook)}){order}."
    legend = [f"{name}: {found.definitions[name]}" for name in names]
    return [*body, "", about, *legend, *map(_printable, found.notes)]


def _cells(hit: "Hit", names: list[str], *, with_token: bool) -> list[str]:
    facts = hit.facts
    numbers = [_number(name, hit.numbers[name]) if name in hit.numbers else "-" for name in names]
    token = [_token(hit.token or "")] if with_token else []
    density = f"{100 * facts.density:#.3g} %" if facts.alive else "dead"
    return [str(facts.feature), *numbers, *token, density, "-" if facts.score is None else f"{facts.score:.2f}"]


def _number(name: str, value: float) -> str:
    if name in _COUNTS:
        return f"{value:.0f}"
    if name in _PERCENT:
        return f"{100 * value:.1f} %"
    return f"{value:+.4f}" if name == "nats" else f"{value:.3f}" if abs(value) <= 1 else f"{value:.2f}"


def _label(hit: "Hit", room: int) -> str:
    if hit.facts.label is None:
        return "-"
    text = _printable(" ".join(hit.facts.label.split()))
    return text if len(text) <= room else text[: room - 1] + "\u2026"


def _token(text: str) -> str:
    """In quotes, what cannot be printed written out, at most 20 characters."""
    shown = repr(text)
    return shown if len(shown) <= 20 else shown[:19] + "\u2026"


def _printable(text: str) -> str:
    """Without control characters: a label must not steer the terminal."""
    return "".join(c for c in text if c.isprintable())
