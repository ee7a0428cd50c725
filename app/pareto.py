"""Dictionaries as points of a plot of any metric against L0: means over seeds, lines, the Pareto front, controls."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from app.measured import CONTROL, L0, Measured, Reading
from app.metrics import FIRST, HIGHER, Kind, kind_of


@dataclass(frozen=True, kw_only=True)
class Point:
    """Dictionaries that differ in their seed alone, with a metric."""

    of: Sequence[Measured]
    metric: str

    @property
    def x(self) -> float:
        return statistics.fmean(self._values(L0))

    @property
    def y(self) -> float:
        return statistics.fmean(self._values(self.metric))

    @property
    def sd_x(self) -> float | None:
        return _spread(self._values(L0))

    @property
    def sd_y(self) -> float | None:
        """Standard deviation over seeds (n - 1); None of a single one."""
        return _spread(self._values(self.metric))

    @property
    def n(self) -> int:
        return len(self.of)

    @property
    def first(self) -> Measured:
        return self.of[0]

    def _values(self, metric: str) -> list[float]:
        return [each.readings[metric].value for each in self.of]


@dataclass(frozen=True, kw_only=True)
class Control:
    """What learnt nothing: a value where it is the same for all dictionaries, else values by L0."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    @property
    def level(self) -> float | None:
        return self.y[0] if len(self.y) == 1 else None


def choices(found: Sequence[Measured]) -> dict[str, Kind]:
    """The metrics that two dictionaries or more have, those first that are looked at most."""
    counts: dict[str, int] = {}
    for each in found:
        for name in each.readings if L0 in each.readings else ():
            counts[name] = counts.get(name, 0) + 1
    names = [name for name, n in counts.items() if n > 1 and not name.startswith(CONTROL) and name.split(" ")[0] != L0]
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    return {name: kind_of(name, reading(found, name).row) for name in names}


def reading(found: Sequence[Measured], metric: str) -> Reading:
    """The first dictionary's that has one."""
    return next(each.readings[metric] for each in found if metric in each.readings)


def points_of(found: Sequence[Measured], metric: str) -> list[Point]:
    """The dictionaries that have the metric, those that differ in their seed alone together, by line and L0."""
    together: dict[object, dict[object, Measured]] = {}
    for each in found:
        if each.has(metric):  # the same settings and seed twice are one dictionary under two names
            together.setdefault((each.line, each.sparsity), {}).setdefault(each.seeds, each)
    points = [Point(of=list(each.values()), metric=metric) for each in together.values()]
    return sorted(points, key=lambda point: (*point.first.line, point.x))


def lines_of(points: Sequence[Point]) -> dict[str, list[Point]]:
    """A line an architecture and width (and hook, and whatever else differs), its points by L0."""
    several_hooks = len({point.first.hook for point in points}) > 1
    lines: dict[str, list[Point]] = {}
    for point in points:
        first = point.first
        parts = [f"{first.architecture} {first.d_sae:,}", first.others, first.hook if several_hooks else ""]
        lines.setdefault(", ".join(filter(None, parts)), []).append(point)
    return lines


def front_of(points: Sequence[Point], better: int) -> list[Point]:
    """The points than which none of the same hook is as good in both and better in one; the lower L0 is the better.

    better: `app.metrics.HIGHER` or LOWER; else there is no front.
    """
    if not better:
        return []
    sign = -1 if better == HIGHER else 1
    places = [(point, point.x, sign * point.y) for point in points]
    return [
        point
        for point, x, y in places
        if not any(
            x2 <= x and y2 <= y and (x2, y2) != (x, y)
            for other, x2, y2 in places
            if other.first.hook == point.first.hook
        )
    ]


def controls_of(found: Sequence[Measured], metric: str) -> list[Control]:
    """What random dictionaries, PCA, identity, mean (and the dense probe) reach in this metric; by hook."""
    several_hooks = len({each.hook for each in found}) > 1
    by_name: dict[str, list[tuple[float, float]]] = {}
    for each in found:
        for key, value in each.readings.items():
            if not key.startswith(CONTROL) or not each.has(metric):
                continue
            name, _, of = key.removeprefix(CONTROL).partition(".")
            if metric in (of, f"{of}_{metric.rpartition('_')[2]}"):  # the dense probe has one AUC for all k
                shown = f"{name}, {each.hook}" if several_hooks else name
                x = each.readings.get(f"{CONTROL}{name}.{L0}", each.readings[L0]).value
                by_name.setdefault(shown, []).append((x, value.value))
    return [_control(name, places) for name, places in sorted(by_name.items())]


def _control(name: str, places: Sequence[tuple[float, float]]) -> Control:
    """Where it is not the same for all: the mean at each L0, to a whole number."""
    values = [y for _, y in places]
    if max(values) - min(values) <= max(1e-3 * max(map(abs, values)), 1e-9):
        return Control(name=name, x=[0.0], y=[statistics.fmean(values)])
    by_l0: dict[int, list[tuple[float, float]]] = {}
    for x, y in places:
        by_l0.setdefault(round(x), []).append((x, y))
    means = [tuple(map(statistics.fmean, zip(*by_l0[l0], strict=True))) for l0 in sorted(by_l0)]
    return Control(name=name, x=[x for x, _ in means], y=[y for _, y in means])


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
