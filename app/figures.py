"""Data to Plotly figure, and to the sentence that stands for the figure. Knows no Streamlit.

Bars left of zero are blue and bars right of it orange, as in the token strips.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from app.measured import of_cells
from app.metrics import kind_of
from app.pareto import points_of
from app.pareto_figure import pareto_figure
from app.sweep_table import Cell
from app.theme import NEGATIVE_BAR, POSITIVE_BAR, SERIES

HEIGHT = 236
CONFIG = {"displayModeBar": False}
_DASHES = ("solid", "dash", "dot")
MAX_SERIES = len(SERIES) * len(_DASHES)


def activation_histogram(edges: Sequence[float], counts: Sequence[int]) -> go.Figure:
    """How often the feature takes which value, where it fires. Counts on a log axis: large values are rare.

    edges: n + 1 bounds of the bins, signed; counts: n numbers of tokens.
    """
    figure = _histogram(edges, counts, "%{customdata[0]:.3g} to %{customdata[1]:.3g}<br>%{y:,} tokens<extra></extra>")
    top = max(counts, default=1)
    figure.update_yaxes(type="log", range=[-0.3, _log10(top) + 0.15], dtick=_decades(top), title="tokens (log)")
    figure.update_xaxes(title="value")
    return figure


def logit_histogram(edges: Sequence[float], counts: Sequence[int]) -> go.Figure:
    """How the feature's direction moves the logit of every vocabulary entry (logit lens, centred)."""
    figure = _histogram(edges, counts, "%{customdata[0]:.3g} to %{customdata[1]:.3g}<br>%{y:,} entries<extra></extra>")
    figure.update_yaxes(title="vocabulary entries", nticks=4)
    figure.update_xaxes(title="effect on the logit")
    return figure


def histogram_alt(what: str, edges: Sequence[float], counts: Sequence[int]) -> str:
    """The histogram in words, for those who do not see it."""
    total = sum(counts)
    if total == 0:
        return f"Histogram of {what}: empty."
    fullest = max(range(len(counts)), key=lambda i: counts[i])
    return (
        f"Histogram of {what}: {total:,} in {len(counts)} bins from {edges[0]:.3g} to {edges[-1]:.3g}; the fullest, "
        f"{edges[fullest]:.3g} to {edges[fullest + 1]:.3g}, holds {counts[fullest]:,}."
    )


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart. name: escaped already, Plotly reads a part of HTML. colour: of `app.theme.SERIES`."""

    name: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]


def curves(lines: Sequence[Series], *, form: str, log: bool = False) -> go.Figure:
    """A figure of several trainings over the tokens they visited. form: of a value, as d3 writes it."""
    hover = f"%{{fullData.name}}<br>%{{y:{form}}} at %{{x:.3s}} tokens<extra></extra>"
    traces = [
        go.Scatter(
            x=list(line.x),
            y=list(line.y),
            name=line.name,
            mode="lines" if len(line.x) > 1 else "markers",
            line={
                "color": SERIES[line.colour % len(SERIES)],
                "width": 1.8,
                "dash": _DASHES[line.colour // len(SERIES)],
            },
            hovertemplate=hover,
        )
        for line in lines
    ]
    figure = go.Figure(data=traces, layout=_layout())
    figure.update_xaxes(title="tokens", tickformat="~s", rangemode="tozero")
    figure.update_yaxes(tickformat=form, nticks=5, type="log" if log else "linear")
    if log:
        figure.update_yaxes(dtick="D2", minor={"showgrid": False}, tickformat="~g")
    else:
        figure.update_yaxes(rangemode="tozero")
    return figure


def curves_alt(what: str, lines: Sequence[Series], form: str) -> str:
    """The chart in words: where each line begins and ends."""
    said = (f"{line.name} from {line.y[0]:{form}} to {line.y[-1]:{form}}" for line in lines if line.y)
    return f"{what} over tokens: {'; '.join(said) or 'nothing yet'}."


def pareto(cells: Sequence[Cell]) -> go.Figure:
    """The plot that a sweep leaves: held-out FVU against L0 of its cells."""
    return pareto_figure(points_of(of_cells(cells), "fvu"), kind_of("fvu")).update_layout(template="plotly_white")


def _histogram(edges: Sequence[float], counts: Sequence[int], hover: str) -> go.Figure:
    centres = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
    bars = go.Bar(
        x=centres,
        y=list(counts),
        width=[high - low for low, high in zip(edges, edges[1:], strict=False)],
        customdata=[[low, high] for low, high in zip(edges, edges[1:], strict=False)],
        marker={"color": [NEGATIVE_BAR.light if x < 0 else POSITIVE_BAR.light for x in centres], "line": {"width": 0}},
        hovertemplate=hover,
    )
    return go.Figure(data=[bars], layout=_layout())


def _layout() -> go.Layout:
    return go.Layout(
        height=HEIGHT,
        margin={"l": 8, "r": 8, "t": 4, "b": 8},
        bargap=0.08,
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        dragmode=False,
        xaxis={"zeroline": False, "showgrid": False, "automargin": True, "nticks": 6},
        yaxis={"zeroline": False, "automargin": True},
    )


def _log10(count: int) -> float:
    return math.log10(max(count, 1))


def _decades(top: int) -> int:
    """Decades between two ticks, so that there are at most four."""
    return max(1, round(_log10(top) / 4))
