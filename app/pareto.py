"""A run's dictionaries as points of a plot: L0 against any number that eval.json, or sweep.json, has of them.

Small JSON only: no model, no weights. The files may come from anybody: what is no finite number is not there.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from app.metrics import FIRST, HIGHER, Kind, kind_of
from app.parts.markup import visible
from app.runs import Dictionary, RunFolder, read_object
from app.sweep_table import RECORD, SPARSITY, Cell, flat_settings, others_of
from app.trainings import number

L0 = "l0"
CONTROL = "control."
PROVENANCE = ("versions", "threads")
"""Of a train.json: what it was trained with, which is no setting."""
LONGEST = 80
"""Characters of a name from a file."""
MOST = 2000
"""Numbers of one dictionary that are read."""


class Reading(NamedTuple):
    """One number of eval.json."""

    value: float
    definition: str = ""
    of: str = ""
    """What it was taken over, and how many of them."""
    row: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One dictionary and its numbers, those of the controls too."""

    name: str
    hook: str
    architecture: str
    d_sae: int
    sparsity: float | None
    """k, or the L0 aimed at."""
    seeds: tuple[object, object]
    """Of the weights and, where it has its own, of the order of the rows."""
    others: str
    """Other settings in which the architecture's dictionaries differ, such as "lr 0.001"."""
    readings: Mapping[str, Reading] = field(repr=False)
    tokens_per_second: float | None = None

    @property
    def line(self) -> tuple[str, str, int, str]:
        """What the points of one line have in common."""
        return self.hook, self.architecture, self.d_sae, self.others

    def has(self, metric: str) -> bool:
        """Whether it has a place in the plot of this metric."""
        return metric in self.readings and L0 in self.readings


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


def measured_of(run: RunFolder) -> tuple[list[Measured], list[str]]:
    """The finished dictionaries of a run, sorted, and the names of those that no train.json describes."""
    flat = {each.name: _plain(read_object(each.folder / "train.json")[0] or {}) for each in run.dictionaries}
    known = {name: settings for name, settings in flat.items() if _described(settings)}
    others = others_of({name: {**settings, "hooks": None} for name, settings in known.items()})
    swept = _swept(run)
    here = [each for each in run.dictionaries if each.name in known]
    found = [_measured(each, known[each.name], others[each.name], swept) for each in here]
    return in_order(found), [name for name in flat if name not in known]


def of_cells(cells: Sequence[Cell]) -> list[Measured]:
    """The cells of a sweep.json."""
    return [
        Measured(
            name=cell.name,
            hook=cell.hook,
            architecture=cell.architecture,
            d_sae=cell.d_sae,
            sparsity=cell.sparsity,
            seeds=(cell.seed, None),
            others=cell.others,
            readings={"fvu": Reading(cell.fvu), L0: Reading(cell.l0), "dead": Reading(cell.dead)},
        )
        for cell in cells
    ]


def in_order(found: Sequence[Measured]) -> list[Measured]:
    return sorted(found, key=lambda each: (*each.line, each.sparsity or 0.0, str(each.seeds), each.name))


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


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a train.json that are values and lists of them, sizes among them; not on what it was trained."""
    flat = {key: each for key, each in flat_settings(settings).items() if key not in PROVENANCE}
    lists = {key: each if isinstance(each, list) else [each] for key, each in flat.items()}
    return {key: flat[key] for key, each in lists.items() if all(isinstance(v, str | int | float | None) for v in each)}


def _described(settings: Mapping[str, Any]) -> bool:
    """Whether settings say what a dictionary is."""
    texts = all(isinstance(settings.get(key), str) for key in ("hook", "architecture"))
    d_sae = settings.get("d_sae")
    return texts and isinstance(d_sae, int) and 0 < d_sae < 1 << 40


def _measured(of: Dictionary, settings: Mapping[str, Any], others: str, swept: Mapping[str, Any]) -> Measured:
    hooks = settings.get("hooks")
    hook = " + ".join(map(str, hooks)) if isinstance(hooks, list) and hooks else settings["hook"]
    cell = swept.get(of.name)
    cell = cell if isinstance(cell, dict) and _same(cell.get("settings"), settings) else {}
    return Measured(
        name=_text(of.name),
        hook=_text(hook),
        architecture=_text(settings["architecture"]),
        d_sae=settings["d_sae"],
        sparsity=next((n for key in SPARSITY if (n := number(settings.get(key))) is not None), None),
        seeds=(_seed(settings.get("seed")), _seed(settings.get("order_seed"))),
        others=_text(others, 5 * LONGEST),
        readings={**_readings(cell), **_readings(of.evaluation or {})},
        tokens_per_second=number(cell.get("tokens_per_second")),
    )


def _same(recorded: object, settings: Mapping[str, Any]) -> bool:
    """Whether a cell of sweep.json is of the dictionary that is there now."""
    return isinstance(recorded, dict) and _plain(recorded) == settings


def _readings(record: Mapping[str, Any]) -> dict[str, Reading]:
    metrics = record.get("metrics")
    found: dict[str, Reading] = {}
    for name, each in list(metrics.items())[:MOST] if isinstance(metrics, dict) else ():
        value = number(each.get("value")) if isinstance(each, dict) and len(name) <= 2 * LONGEST else None
        if value is not None:
            n, row = number(each.get("n")), each.get("row")
            of = f"n = {n:,} {_text(each.get('of', ''), 2 * LONGEST)}" if n is not None else ""
            definition = _text(each.get("definition", ""), 5 * LONGEST)
            found[_text(name, 2 * LONGEST)] = Reading(
                float(value), definition, of, row if isinstance(row, str) else None
            )
    return found


def _swept(run: RunFolder) -> Mapping[str, Any]:
    cells = (read_object(run.folder / RECORD)[0] or {}).get("cells")
    return cells if isinstance(cells, dict) else {}


def _seed(seed: object) -> object:
    return seed if isinstance(seed, int | None) else _text(seed)


def _text(value: object, longest: int = LONGEST) -> str:
    return visible(str(value)[:longest])
