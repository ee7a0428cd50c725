"""A histogram small enough for a line of a list."""

from collections.abc import Sequence
from math import log1p

BARS = 24


def spark_html(edges: Sequence[float], counts: Sequence[int]) -> str:
    """Bars of log(1 + count), at most 24; blue left of zero. Decoration beside figures, so screen readers skip it."""
    if not counts:
        return ""
    merged = merge(edges, counts, BARS)
    tallest = log1p(max(count for _, count in merged)) or 1.0
    bars = "".join(
        f'<i{" class=n" if centre < 0 else ""} style="height:{100 * log1p(count) / tallest:.0f}%"></i>'
        for centre, count in merged
    )
    return f'<span class="spark" aria-hidden="true">{bars}</span>'


def merge(edges: Sequence[float], counts: Sequence[int], most: int) -> list[tuple[float, int]]:
    """(centre, count) of at most `most` bins, neighbours added together."""
    step = -(-len(counts) // most)
    return [
        ((edges[i] + edges[min(i + step, len(counts))]) / 2, sum(counts[i : i + step]))
        for i in range(0, len(counts), step)
    ]
