"""What a run's sweep.json says, as rows of a table and as points of a plot. Small JSON only: no model, no weights."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from activations.errors import InputError

RECORD, PLOT = "sweep.json", "sweep.html"
SPARSITY = ("k", "target_l0")
"""Fields of an architecture's config that say how many latents are to be active."""
_NAMED = {"hook", "architecture", "sizes", "d_sae", *SPARSITY, "seed", "order_seed"}
METRICS = ("fvu", "l0", "dead")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One dictionary of a sweep."""

    name: str
    hook: str
    architecture: str
    d_sae: int
    sparsity: float
    """k, or the L0 aimed at."""
    seed: int
    others: str
    """Other settings in which the run's cells differ, such as "lr 0.001"."""
    fvu: float
    l0: float
    dead: float
    """Share of the latents."""
    tokens_per_second: float | None
    seconds: float | None

    @property
    def point(self) -> tuple[str, str, int, str, float]:
        """What cells that differ in their seed alone have in common."""
        return self.hook, self.architecture, self.d_sae, self.others, self.sparsity


@dataclass(frozen=True, kw_only=True)
class Point:
    """Cells that differ in their seed alone."""

    cells: Sequence[Cell]

    def mean(self, metric: str) -> float:
        return statistics.fmean(getattr(cell, metric) for cell in self.cells)

    def spread(self, metric: str) -> float:
        """Standard deviation over seeds (n - 1); 0 of a single one."""
        return statistics.stdev(getattr(cell, metric) for cell in self.cells) if len(self.cells) > 1 else 0.0


def cells_of(record: Mapping[str, Any]) -> list[Cell]:
    """The cells of a sweep.json, sorted by hook, architecture, width, k and seed. Raises InputError when it is none."""
    try:
        entries: dict[str, Any] = record["cells"]
        flat = {name: flat_settings(entry["settings"]) for name, entry in entries.items()}
        others = others_of(flat)
        cells = [_cell(name, flat[name], entry, others[name]) for name, entry in entries.items()]
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise InputError(f"{RECORD} is damaged ({error!r}): run the `sae sweep` again.") from None
    return sorted(cells, key=lambda cell: (cell.hook, cell.architecture, cell.d_sae, cell.sparsity, cell.seed))


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a train.json with its sizes among them."""
    sizes = settings.get("sizes")
    return {**settings, **(sizes if isinstance(sizes, dict) else {})}


def others_of(flat: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """By name: the settings in which dictionaries of one architecture differ, but for those with a column of their own.

    flat: settings with sizes, by name.
    """
    by_architecture: dict[str, list[Mapping[str, Any]]] = {}
    for settings in flat.values():
        by_architecture.setdefault(str(settings["architecture"]), []).append(settings)
    vary: dict[str, list[str]] = {}
    for architecture, group in by_architecture.items():
        keys = sorted({key for settings in group for key in settings} - _NAMED)
        vary[architecture] = [key for key in keys if len({json.dumps(each.get(key)) for each in group}) > 1]
    return {
        name: ", ".join(f"{key} {settings[key]}" for key in vary[str(settings["architecture"])] if key in settings)
        for name, settings in flat.items()
    }


def _cell(name: str, settings: Mapping[str, Any], entry: Mapping[str, Any], others: str) -> Cell:
    rate, seconds = entry["tokens_per_second"], entry["seconds"]
    return Cell(
        name=name,
        hook=str(settings["hook"]),
        architecture=str(settings["architecture"]),
        d_sae=int(settings["d_sae"]),
        sparsity=float(next(settings[key] for key in SPARSITY if key in settings)),
        seed=int(settings["seed"]),
        others=others,
        **{metric: float(entry["metrics"][metric]["value"]) for metric in METRICS},
        tokens_per_second=None if rate is None else float(rate),
        seconds=None if seconds is None else float(seconds),
    )


def points_of(cells: Sequence[Cell]) -> list[Point]:
    """The cells, those that differ in their seed alone together."""
    together: dict[object, list[Cell]] = {}
    for cell in cells:
        together.setdefault(cell.point, []).append(cell)
    return [Point(cells=each) for each in together.values()]


def table(cells: Sequence[Cell]) -> list[str]:
    """Lines of a table for a terminal: a cell each, and under those that differ in their seed alone their spread."""
    width = max(len(cell.name) for cell in cells)
    lines = [f"{'dictionary':{width}}      FVU       L0    dead  tokens/s"]
    for point in points_of(cells):
        for cell in point.cells:
            rate = f"{cell.tokens_per_second:9,.0f}" if cell.tokens_per_second else "        -"
            lines.append(f"{cell.name:{width}}  {cell.fvu:7.4f}  {cell.l0:7.2f}  {cell.dead:5.1%}  {rate}")
        if len(point.cells) > 1:
            said = f"{len(point.cells)} seeds: mean, standard deviation"
            spread = f"{point.spread('fvu'):.4f}, {point.spread('l0'):.2f}, {point.spread('dead'):.1%}"
            means = f"{point.mean('fvu'):7.4f}  {point.mean('l0'):7.2f}  {point.mean('dead'):5.1%}"
            lines.append(f"{said:>{width}}  {means}  sd {spread}")
    return lines
