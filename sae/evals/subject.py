"""What is measured, and with what: the one argument of every row of the suite's table."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from activations.cache import Activations, CachedActivations
from activations.model import Model
from sae.base import SAE


class SenseContext(NamedTuple):
    """A sentence with a word in one of its senses."""

    word: str
    sense: str
    context: str


@runtime_checkable
class World(Protocol):
    """What `truth` asks of a planted world, such as `data.planted.World`."""

    @property
    def directions(self) -> Tensor:
        """(n_features, d_in), of norm 1."""

    @property
    def parent(self) -> Tensor:
        """Of each feature, -1 for none."""

    def to(self, device: str) -> "World":
        """The same world on another device."""

    def batches(self, n: int, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        """n rows (x, z), some at a time."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is measured; what costs little is read in full."""

    seed: int = 0
    contexts: int = 64
    """Contexts through the model, of `splice` and `controls`."""
    sets: int | None = None
    """Labelled sets that are probed; None: all."""
    set_rows: int = 1500
    """Texts of each labelled set."""
    sets_from: Path | None = None
    """The folder, or the wheel, that holds the labelled sets; None: fetched."""
    senses: Sequence[SenseContext] = ()
    """What `polysemy` reads."""
    world: World | None = None
    """What the rows were drawn from, for `truth`."""
    kept: dict[object, Any] | None = field(default=None, repr=False)
    """Of several dictionaries of one run: what was measured for one and is the same for another; None keeps nothing."""
    say: Callable[[str], None] = field(default=lambda _: None)


@dataclass(frozen=True, kw_only=True)
class Other:
    """A dictionary to compare with."""

    sae: SAE
    cache: CachedActivations
    name: str
    """RUN/ID."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A dictionary with what its run has."""

    sae: SAE
    cache: CachedActivations
    """Of the hook that it reads, of the first of several."""
    rows: Activations | None = None
    """What it is trained on, where that is several hooks side by side (`sae.rows`); None: the cache."""
    model: Model | None = None
    """None for a run of vectors."""
    against: Other | None = None
    folder: Path | None = None
    """The dictionary's folder; None when nothing is to be kept."""
    options: Options = Options()  # noqa: B008  (immutable)

    @cached_property
    def l0(self) -> int:
        """Active latents a token, on average, rounded: those of the controls."""
        assert self.sae.statistics is not None, "a dictionary without statistics"
        return max(round(float(self.sae.statistics.density.sum())), 1)
