"""The card of a run: its dictionaries with their figures, and the command for what is missing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.parts.markup import code, esc, link
from app.runs import Dictionary, RunFolder, sae
from data.store import Summary

EVALUATED = (
    ("l0", "L0", ".1f"),
    ("fvu", "FVU", ".3f"),
    ("delta_ce", "\u0394 CE, nats", ".3f"),
    ("dead", "dead", ".1%"),
)
"""(metric in eval.json, name, format); definition, n and interval stand beside the value in the file."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the overview says of a feature store."""

    features: int
    alive: int
    explained: int
    scored: int
    tokens: int

    @classmethod
    def of(cls, summary: Summary) -> "Counts":
        return cls(
            features=summary.n_features,
            alive=summary.n_alive,
            explained=summary.n_explained,
            scored=summary.n_scored,
            tokens=summary.n_tokens,
        )


def run_html(run: RunFolder, counts: Mapping[str, Counts | str]) -> str:
    """One run. counts: by address of a dictionary, those of its store or what is wrong with it."""
    body = "".join(_dictionary(d, counts.get(d.address)) for d in run.dictionaries)
    if run.fault:
        body = f'<div class="dict"><p class="todo">{esc(run.fault)}</p></div>' + body
    elif not run.dictionaries:
        body = f'<div class="dict"><p class="todo">No dictionary yet: {code(next_for_run(run))}</p></div>'
    return f'<section class="run"><header><h2>{esc(run.name)}</h2><p>{_about(run)}</p></header>{body}</section>'


def next_for_run(run: RunFolder) -> str:
    """The command that a run without dictionaries needs next."""
    return sae("train", run.address, "--arch", "topk") if run.hooks else sae("collect", run.address)


def missing(dictionary: Dictionary, counts: Counts | str | None) -> list[tuple[str, str]]:
    """(what is missing, the command that makes it) of one dictionary, in the order to make them."""
    todo = []
    if dictionary.evaluation is None:
        todo.append(("not evaluated", sae("eval", dictionary.address)))
    if counts is None:
        todo.append(("no feature store", sae("index", dictionary.address)))
    elif isinstance(counts, str):
        todo.append((counts, sae("index", dictionary.address, "--overwrite")))
    elif counts.explained < counts.alive:
        todo.append((f"{counts.alive - counts.explained:,} features unexplained", sae("label", dictionary.address)))
    return todo


def _about(run: RunFolder) -> str:
    parts = [str(run.meta[key]) for key in ("model", "corpus") if run.meta.get(key)]
    tokens = run.meta.get("n_tokens")
    if isinstance(tokens, int):
        parts.append(f"{tokens:,} tokens")
    if run.meta.get("created"):
        parts.append(str(run.meta["created"])[:10])
    return esc(" \u00b7 ".join(parts))


def _dictionary(dictionary: Dictionary, counts: Counts | str | None) -> str:
    name = esc(dictionary.name)
    if isinstance(counts, Counts):
        name = link("features", {"run": dictionary.run, "dictionary": dictionary.name}, name)
    todo = "".join(f'<p class="todo">{esc(what)}: {code(command)}</p>' for what, command in missing(dictionary, counts))
    facts = "".join(_fact(*fact) for fact in figures(dictionary, counts))
    more = "".join(_group(name, each) for name, each in further(dictionary).items())
    folded = f"<details><summary>All that was measured</summary>{more}</details>" if more else ""
    return f'<article class="dict"><h3>{name}</h3><div class="facts">{facts}</div>{folded}{todo}</article>'


def _group(name: str, facts: list[tuple[str, str | None, str]]) -> str:
    return f'<h4>{esc(name)}</h4><div class="facts">{"".join(_fact(*fact) for fact in facts)}</div>'


def _fact(name: str, value: str | None, definition: str) -> str:
    shown = f'<span class="v">{esc(value)}</span>' if value is not None else '<span class="v none">\u2013</span>'
    return f'<div title="{esc(definition)}"><span class="k">{esc(name)}</span>{shown}</div>'


def figures(dictionary: Dictionary, counts: Counts | str | None) -> list[tuple[str, str | None, str]]:
    """(name, value or None, definition) of every figure on the card."""
    measured = _measured(dictionary)
    shown = [
        ("architecture", dictionary.architecture, "How latents are chosen and trained."),
        ("d_sae", _whole(dictionary.config.get("d_sae")), "Number of latents."),
    ]
    shown += [(name, *_metric(measured.get(key), form)) for key, name, form in EVALUATED]
    if isinstance(counts, Counts):
        shown.append(
            ("alive", f"{counts.alive:,}", f"Features that fire somewhere in {counts.tokens:,} ordinary tokens.")
        )
        shown.append(
            ("explained", f"{counts.explained:,}", f"Features with an explanation; {counts.scored:,} have a score.")
        )
    return shown


def further(dictionary: Dictionary) -> dict[str, list[tuple[str, str | None, str]]]:
    """Everything in eval.json, by the row of the suite that measured it: (name, value or None, definition)."""
    groups: dict[str, list[tuple[str, str | None, str]]] = {}
    for key, metric in _measured(dictionary).items():
        if isinstance(metric, dict):
            row = str(metric.get("row", "metrics"))
            groups.setdefault(row, []).append((key.removeprefix(f"{row}."), *_metric(metric, ".4g")))
    return groups


def _measured(dictionary: Dictionary) -> dict[str, Any]:
    metrics = (dictionary.evaluation or {}).get("metrics")
    return metrics if isinstance(metrics, dict) else {}


def _whole(value: object) -> str | None:
    """A count with thousands marked, None for what is no count: the file may come from anybody."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else None


def _metric(metric: object, form: str) -> tuple[str | None, str]:
    """Value and definition of one metric of eval.json; None for what is not there or no number."""
    if not isinstance(metric, dict):
        return None, "Not measured yet."
    value = _number(metric.get("value"), form)
    low, high = _number(metric.get("lo"), form), _number(metric.get("hi"), form)
    interval = f" 95 % interval {low} to {high}." if low and high else ""
    n = _whole(metric.get("n"))
    return value, f"{metric.get('definition', '')}.{interval}" + (f" n = {n} {metric.get('of', '')}." if n else "")


def _number(value: object, form: str) -> str | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return format(value, form).replace("%", " %").replace("-", "\u2212")
