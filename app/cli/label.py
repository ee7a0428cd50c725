"""`sae label`: explains features and scores the explanations."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from app.cli.options import COUNT, feature_numbers, json_option

if TYPE_CHECKING:
    from autointerp.client import ChatClient
    from autointerp.job import LabelReport

LIMIT = 20
"""Features that a language model explains when none are named."""
WINDOWS, WINDOWS_LOCAL = 10, 5
"""Judged of each kind: what a server answers in no time takes this machine a while."""


@click.command()
@click.argument("address", metavar="RUN[/ID]")
@click.option(
    "--features",
    metavar="NUMBERS",
    callback=feature_numbers,
    help="Which, such as 0-499 or 3,7,12. [default: see --limit]",
)
@click.option(
    "--limit",
    type=COUNT,
    help=f"So many features in a random order, out of those that fire on 0.01 % to 10 % of tokens; a larger number "
    f"goes on with the same list. [default: {LIMIT}; with --explainer lexical all that fire]",
)
@click.option(
    "--explainer",
    type=click.Choice(["llm", "lexical"]),
    default="llm",
    show_default=True,
    help="Who explains: a language model, or a search over simple rules that costs nothing.",
)
@click.option("--local", is_flag=True, help="Ask a model on this machine: the embedded one, or the GGUF file in --llm.")
@click.option(
    "--base-url", metavar="URL", help="Ask a server with OpenAI's protocol, such as http://127.0.0.1:8000/v1."
)
@click.option("--llm", metavar="NAME", help="The model's name at the server.")
@click.option("--concurrency", type=COUNT, default=4, show_default=True, help="Requests under way at once.")
@click.option("--budget", type=COUNT, metavar="TOKENS", help="Stop before more tokens than this are read and written.")
@click.option(
    "--windows",
    type=click.IntRange(3, 1000),
    help="Judge so many windows in which the feature fires, and as many in which it does not. "
    f"[default: {WINDOWS}; {WINDOWS_LOCAL} with --local]",
)
@click.option("--score/--no-score", default=True, help="Have explanations judged on unseen text.")
@click.option("--redo", is_flag=True, help="Explain again what is explained already.")
@json_option
def command(
    address: str,
    features: list[int] | None,
    limit: int | None,
    explainer: Literal["llm", "lexical"],
    local: bool,
    base_url: str | None,
    llm: str | None,
    concurrency: int,
    budget: int | None,
    windows: int | None,
    score: bool,
    redo: bool,
    as_json: bool,
) -> None:
    """Explain features and score the explanations, by a language model or by simple rules (--explainer lexical).

    The key for a paid server is read from OPENAI_API_KEY. A job that was killed goes on where it stopped; nothing is
    paid twice.

    Examples: sae label runs/demo --local --limit 50; sae label runs/demo --explainer lexical;
    sae label runs/demo --llm gpt-5-mini --features 0-499 --budget 2M
    """
    if features is not None and limit is not None:
        raise click.UsageError("Give --features or --limit, not both.")
    if local and base_url:
        raise click.UsageError("Give --local or --base-url, not both.")
    from autointerp.label import label, pick_features
    from autointerp.scorers.detection import DetectionOptions
    from data.store import open_store

    if features is None and (explainer == "llm" or limit is not None):
        with open_store(address) as store:
            features = pick_features(store, limit or LIMIT)
    if explainer == "lexical":
        report = label(address, features=features, explainer="lexical", scorer=score, redo=redo)
    else:
        n = windows or (WINDOWS_LOCAL if local else WINDOWS)
        options = DetectionOptions(n_active=n, n_off=n)
        with _client(local, base_url, llm, concurrency) as client:
            report = label(
                address,
                features=features,
                client=client,
                scorer=score,
                redo=redo,
                budget_tokens=budget,
                options=options,
            )
    found = {**dataclasses.asdict(report), "scores": _scores(address, features, explainer)}
    click.echo(json.dumps(found) if as_json else _told(report, found["scores"]))
    if report.n_failed and not report.n_explained + report.n_scored + report.n_skipped:
        raise SystemExit(1)


@contextmanager
def _client(local: bool, base_url: str | None, llm: str | None, concurrency: int) -> "Iterator[ChatClient]":
    """The client that the options ask for; a server that was started for it is stopped again."""
    from activations.errors import InputError
    from autointerp.client import ChatClient
    from autointerp.local_server import default_model, local_server, model_alias

    if local:
        path = Path(llm) if llm else default_model()
        with local_server(path) as url:
            yield ChatClient(model_alias(path), url, concurrency=concurrency)
    elif llm:
        yield ChatClient(llm, base_url, concurrency=concurrency)
    elif base_url:
        raise InputError(f"Which model of {base_url}? Name it with --llm NAME.")
    else:
        raise InputError(
            "No language model was named. Three ways: --local (the embedded model, on this machine); "
            "--base-url URL --llm NAME (a server of yours); --llm NAME with a key in OPENAI_API_KEY (OpenAI). "
            "Or none: --explainer lexical."
        )


def _scores(address: str, features: list[int] | None, explainer: str) -> dict[str, float | int | None]:
    """Mean detection score and mean control of the explanations of one kind; None where there is none."""
    from data.store import DETECTION, open_store

    with open_store(address) as store:
        kept = {e.id for e in store.explanations(features) if e.source == explainer}
        scores = [s for s in store.scores(features) if s.explanation_id in kept and s.scorer == DETECTION]
    controls = [s.control for s in scores if s.control is not None]
    return {
        "n": len(scores),
        "balanced_accuracy": sum(s.value for s in scores) / len(scores) if scores else None,
        "control": sum(controls) / len(controls) if controls else None,
    }


def _told(report: "LabelReport", scores: dict[str, Any]) -> str:
    """The report in lines for people."""
    lines = [
        f"{report.n_explained:,} explained, {report.n_scored:,} scored, {report.n_failed:,} failed, "
        f"{report.n_skipped:,} skipped (done before, or too rare)."
    ]
    if report.tokens_in:
        lines.append(f"Tokens: {report.tokens_in:,} read, {report.tokens_out:,} written.")
    if scores["balanced_accuracy"] is not None:
        control = "" if scores["control"] is None else f"; with another feature's explanation {scores['control']:.2f}"
        mean = f"mean of {scores['n']:,}: {scores['balanced_accuracy']:.2f}"
        lines.append(f"Balanced accuracy on unseen text, {mean} (chance 0.50{control}).")
    lines += [f"Failed {n:,} {'time' if n == 1 else 'times'}: {reason}." for reason, n in report.reasons]
    if report.stopped:
        lines.append(f"Stopped early: {report.stopped}. The same command with a larger --budget goes on.")
    return "\n".join(lines)
