"""A line for each training: the colour of its curves, how far it is, what it reached, and the command that goes on."""

from collections.abc import Mapping, Sequence

from app.parts.markup import code, esc
from app.theme import SERIES
from app.trainings import FINISHED, STOPPED, TRAINING, TrainingFolder, number

DASHES = ("", "dash", "dot")


def trainings_html(found: Sequence[TrainingFolder], colours: Mapping[str, int]) -> str:
    """The list. colours: by name, of those whose curves are shown."""
    return f'<div class="train">{"".join(_one(each, colours.get(each.name)) for each in found)}</div>'


def _one(each: TrainingFolder, colour: int | None) -> str:
    swatch = ""
    if colour is not None:
        swatch = f'<span class="swatch c{colour % len(SERIES)} {DASHES[colour // len(SERIES)]}"></span>'
    bar = f'<div class="done {each.state}"><i style="width:{100 * each.done:.1f}%"></i></div>'
    facts = " \u00b7 ".join(_facts(each))
    return (
        f'<div class="one"><span>{swatch}</span><span class="name">{esc(each.name)}</span>'
        f'{bar}<div class="facts">{facts}</div></div>'
    )


def _facts(each: TrainingFolder) -> list[str]:
    """HTML already."""
    if each.state == FINISHED:
        return ["<b>finished</b>", *_reached(each)]
    if each.state == STOPPED:
        return [f"<b>stopped</b> at {each.done:.0%}: {code(each.command)}"]
    rate, left = number(each.progress.get("tokens_per_second")), number(each.progress.get("seconds_left"))
    facts = [f"<b>{TRAINING}</b>" + (f" {each.done:.0%}" if each.lines else ", starting")]
    if rate:
        facts.append(f"{rate:,.0f} tokens/s")
    if left is not None:
        facts.append(f"{duration(left)} left")
    return [*facts, *_reached(each)]


def _reached(each: TrainingFolder) -> list[str]:
    last = each.lines[-1] if each.lines else {}
    shown = (("fvu", "FVU", ".3f"), ("l0", "L0", ".1f"), ("dead", "dead", ".1%"))
    return [f"{name} {last[key]:{form}}" for key, name, form in shown if key in last]


def duration(seconds: float) -> str:
    """12 s, 3 min, 2 h 05 min, 3 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440:,} d {minutes % 1440 // 60} h"
