"""What a run's small files say of its dictionaries: settings of train.json, numbers of eval.json and of sweep.json.

The files may come from anybody: what is no finite number is not there, and texts are cut short and made visible.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
