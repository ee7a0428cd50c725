"""A score with what it takes to judge it: interval, number of windows, chance and control, in figures and as a line."""

from app.parts.markup import esc
from data.store import DETECTION, Score


def score_html(score: Score) -> str:
    """The value with a line from 0 to 1: band = 95 % interval, dashed = chance, ring = the control."""
    return (
        f'<span class="score" title="{esc(sentence(score))}"><b>{score.value:.2f}</b><span class="line">'
        f'<span class="span" style="left:{_percent(score.lo)};width:{_percent(score.hi - score.lo)}"></span>'
        f'<span class="chance" style="left:{_percent(score.chance)}"></span>{_control(score)}'
        f'<span class="dot" style="left:{_percent(score.value)}"></span></span></span>'
        f'<span class="small muted">{esc(figures(score))}</span>'
    )


def figures(score: Score) -> str:
    """Interval, n, chance, control and unreadable replies in one short line."""
    control = "control not measured" if score.control is None else f"control {score.control:.2f}"
    failed = f", unreadable replies {score.failures}" if score.failures else ""
    interval = f"{score.lo:.2f}\u2013{score.hi:.2f}"
    return f"{score.scorer} {interval}, n = {score.n}, chance {score.chance:.2f}, {control}{failed}"


def sentence(score: Score) -> str:
    """The same, spelled out."""
    what = f"Score of the scorer {score.scorer}"
    if score.scorer == DETECTION:
        what = (
            "Balanced accuracy of telling, from this explanation alone, the windows where the feature fires from those "
            "where it does not"
        )
    control = "not measured" if score.control is None else f"{score.control:.2f}"
    judge = f" Judged by {score.model}." if score.model else ""
    return (
        f"{what}: {score.value:.2f}, 95 % interval {score.lo:.2f} to {score.hi:.2f}, on {score.n} windows that "
        f"the explainer has not seen. Guessing gets {score.chance:.2f}; another feature's text: {control}.{judge}"
    )


def _control(score: Score) -> str:
    if score.control is None:
        return ""
    return f'<span class="control" style="left:{_percent(score.control)}"></span>'


def _percent(value: float) -> str:
    return f"{100 * min(1.0, max(0.0, value)):.1f}%"
