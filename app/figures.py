"""Data to Plotly figure, and to the sentence that stands for the figure. Knows no Streamlit.

Bars left of zero are blue and bars right of it orange, as in the token strips.
"""

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from app.theme import NEGATIVE_BAR, POSITIVE_BAR

HEIGHT = 236
CONFIG = {"displayModeBar": False}


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
    layout = go.Layout(
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
    return go.Figure(data=[bars], layout=layout)


def _log10(count: int) -> float:
    return math.log10(max(count, 1))


def _decades(top: int) -> int:
    """Decades between two ticks, so that there are at most four."""
    return max(1, round(_log10(top) / 4))
