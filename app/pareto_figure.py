"""A metric against L0: a colour and a symbol an architecture, a line a width, rings on the Pareto front, controls."""

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from app.metrics import Kind
from app.pareto import Control, Point, front_of, lines_of
from app.theme import SERIES

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star", "pentagon")
"""One more than there are colours, so that the pairs of both repeat late."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
CONTROL_DASHES = ("dot", "dash", "dashdot", "4px,2px,1px,2px,1px,2px")
GREY = "#8a94a0"
"""Of what is no dictionary: stands out on either paper."""
HEIGHT = 440


def pareto_figure(
    points: Sequence[Point], kind: Kind, controls: Sequence[Control] = (), *, whole: bool = False
) -> go.Figure:
    """Means over seeds with their standard deviations, in both directions. Lower L0 is better, and `kind` says which
    end of the metric is.

    whole: the axis reaches to all controls; else those that are `off_axis` are left out.
    """
    figure = go.Figure()
    architectures: dict[str, list[str]] = {}
    for name, line in lines_of(points).items():
        architecture = line[0].first.architecture
        before = architectures.setdefault(architecture, [])
        number = list(architectures).index(architecture)
        dash = DASHES[len(before) % len(DASHES)]
        before.append(name)
        figure.add_trace(_line(escape(name), line, kind, number, dash))
    front = front_of(points, kind.better)
    if front:
        figure.add_scatter(
            name="Pareto front",
            x=[point.x for point in front],
            y=[point.y for point in front],
            mode="markers",
            marker={"symbol": "circle-open", "size": 17, "color": GREY, "line": {"width": 2}},
            hoverinfo="skip",
        )
    shown = [control for control in controls if whole or control not in off_axis(points, controls)]
    for number, control in enumerate(shown):
        figure.add_trace(_control(control, points, CONTROL_DASHES[number % len(CONTROL_DASHES)], kind))
    figure.update_layout(
        height=HEIGHT,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        showlegend=True,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0.0, "title": {"text": ""}},
    )
    figure.update_xaxes(title="L0: active latents a token (lower is better)", automargin=True, zeroline=False)
    figure.update_yaxes(title=escape(f"{kind.title} ({kind.direction})"), automargin=True, zeroline=False)
    return figure


def off_axis(points: Sequence[Point], controls: Sequence[Control]) -> list[Control]:
    """The controls that an axis fitted to the points, with their bars and room at both ends, would not hold."""
    low = min(point.y - (point.sd_y or 0.0) for point in points)
    high = max(point.y + (point.sd_y or 0.0) for point in points)
    room = 0.1 * (high - low)
    return [control for control in controls if not all(low - room <= y <= high + room for y in control.y)]


def pareto_alt(points: Sequence[Point], kind: Kind) -> str:
    """The plot in words: where each line begins and ends."""
    said = (
        f"{name} from {line[0].y:.4g} at {line[0].x:.1f} to {line[-1].y:.4g} at {line[-1].x:.1f}"
        for name, line in lines_of(points).items()
    )
    return f"{kind.title} against L0, {kind.direction}: {'; '.join(said)}."


def _line(name: str, line: Sequence[Point], kind: Kind, number: int, dash: str) -> go.Scatter:
    """name: escaped already, Plotly reads a part of HTML."""
    colour = SERIES[number % len(SERIES)]
    return go.Scatter(
        name=name,
        x=[point.x for point in line],
        y=[point.y for point in line],
        error_x=_bars([point.sd_x for point in line]),
        error_y=_bars([point.sd_y for point in line]),
        customdata=[[_said(point), _sd(point.sd_y), _sd(point.sd_x)] for point in line],
        mode="lines+markers",
        line={"color": colour, "dash": dash, "width": 1.8},
        marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 9, "color": colour},
        hovertemplate=f"%{{fullData.name}}, %{{customdata[0]}}<br>{escape(kind.title)} %{{y:.4~g}}%{{customdata[1]}}"
        "<br>L0 %{x:.4~g}%{customdata[2]}<extra></extra>",
    )


def _control(control: Control, points: Sequence[Point], dash: str, kind: Kind) -> go.Scatter:
    """A level across the plot where the control has one, else a line by L0."""
    level, x = control.level, [point.x for point in points]
    return go.Scatter(
        name=escape(f"control: {control.name}"),
        x=list(control.x) if level is None else [min(x), max(x)],
        y=list(control.y) if level is None else [level, level],
        mode="lines",
        line={"color": GREY, "dash": dash, "width": 1.5},
        hovertemplate=f"%{{fullData.name}}<br>{escape(kind.title)} %{{y:.4~g}}<extra></extra>",
    )


def _bars(spreads: Sequence[float | None]) -> dict[str, object]:
    return {"array": [spread or 0.0 for spread in spreads], "thickness": 1.2, "width": 3}


def _said(point: Point) -> str:
    k = point.first.sparsity
    seeds = "1 seed" if point.n == 1 else f"{point.n} seeds"
    return seeds if k is None else f"k {k:g}, {seeds}"


def _sd(spread: float | None) -> str:
    return "" if spread is None else f" \u00b1 {spread:.2g} (sd)"
