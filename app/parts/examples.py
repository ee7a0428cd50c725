"""The stored windows of a feature in groups: largest values, value intervals from high to low, random; for each pole.

The largest values alone mislead: they show what a feature does once in ten thousand tokens. So the intervals and a
random sample of all windows in which it fires stand below them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from app.parts.cards import share
from app.parts.markup import esc
from app.parts.strip import Row, Tip, number, rows_html
from app.queries import FeatureView
from data.store import Example, Feature


@dataclass(frozen=True, kw_only=True)
class Group:
    """Windows under one heading."""

    title: str
    about: str
    rows: Sequence[Row]


def groups_html(view: FeatureView, tops: int, bands: int, around: int | None, tip: Tip = "data-v") -> str:
    """All groups of a feature.

    tops: windows of largest value that the store holds; what follows them completes a split. bands: its value
    intervals. around: tokens shown either side of the peak, None for all. tip: see `rows_html`.
    """
    scale = scale_of(view.feature)
    return "".join(
        f'<div class="group"><div class="section">{esc(group.title)} '
        f'<span class="muted">{esc(group.about)}</span></div>'
        f"{rows_html(group.rows, scale, around, tip)}</div>"
        for group in groups(view, tops, bands)
    )


def scale_of(feature: Feature) -> float:
    """The feature's largest |value| over the corpus, on either side of zero: full colour."""
    return max(abs(feature.max), abs(feature.min))


def groups(view: FeatureView, tops: int, bands: int) -> list[Group]:
    """The groups that have windows, in the order in which they are shown."""
    rows = [
        (example, pieces)
        for example, pieces in zip(view.examples, view.pieces, strict=True)
        if example.kind != "top" or example.rank < tops
    ]
    poles = [p for p in ("+", "-") if any(e.pole == p for e in view.examples)]
    shown = []
    for kind, band in [("top", None), *(("interval", b) for b in reversed(range(bands))), ("random", None)]:
        for pole in poles:
            inside = [(e, p) for e, p in rows if (e.kind, e.pole) == (kind, pole) and band in (None, e.band)]
            if inside:
                title, about = _heading(view.feature, kind, pole, band, bands, len(inside))
                side = "" if len(poles) == 1 else ", positive pole" if pole == "+" else ", negative pole"
                shown.append(Group(title=title + side, about=about, rows=list(_rows(inside))))
    return shown


def _heading(feature: Feature, kind: str, pole: str, band: int | None, bands: int, n: int) -> tuple[str, str]:
    if kind == "top":
        return "Largest values", f"{n} windows, at most one a document while documents last"
    if kind == "random":
        return "Random", f"{n} of all windows in which it fires"
    assert band is not None
    extreme = feature.max if pole == "+" else feature.min
    low, high = sorted((extreme * band / bands, extreme * (band + 1) / bands))
    part = share_between(feature.hist_edges, feature.hist_counts, low, high)
    return f"Values {number(low)} to {number(high)}", f"about {share(part)} of its firings; windows by their peak"


def share_between(edges: Sequence[float], counts: Sequence[int], low: float, high: float) -> float:
    """Share of a histogram that lies between two values, bins cut in proportion."""
    total = sum(counts)
    inside = 0.0
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        covered = min(high, right) - max(low, left)
        if covered > 0 and right > left:
            inside += count * covered / (right - left)
    return inside / total if total else 0.0


def _rows(inside: Sequence[tuple[Example, list[str]]]) -> Iterator[Row]:
    for example, pieces in inside:
        split = "shown to explainers" if example.split == "explain" else "kept for scoring"
        origin = f"peak of this window; document {example.doc}, row {example.start:,} of the run, {split}"
        yield Row(pieces=pieces, acts=example.acts, peak_index=example.peak_index, origin=origin)


def legend_html(feature: Feature, signed: bool) -> str:
    """What the colours mean, in the feature's own numbers."""
    low = number(-scale_of(feature)) if signed else "0"
    ramp = "ramp both" if signed else "ramp"
    return (
        f'<span class="legend">{low}<span class="{ramp}"></span>{number(scale_of(feature))} value at each token</span>'
    )
