"""The windows that explainers and scorers may see: each asks for its own split here, and gets no other.

Splits are by document and made before anything is drawn (`data.store.build`), so that what an explanation was written
from never shares a document with what it is scored on. A latent that goes negative has two poles, each with its own
windows; "off" means off on both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Bool

from data.store import Example

Split = Literal["explain", "score"]
MARK_SHARE = 0.3
"""A token counts as marked when its value exceeds this share of its window's peak (as in delphi)."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Windows of the score split: what explanations of one pole are judged on."""

    docs: list[int]
    token_ids: list[list[int]]
    active: Bool[np.ndarray, " n"]
    """Whether the pole fires in each; where it does not, the feature is off altogether."""


@dataclass(frozen=True, kw_only=True)
class ActiveWindow:
    """A window in which one pole of a feature fires."""

    doc: int
    kind: str
    """The sample it comes from: 'top', 'interval' or 'random'."""
    token_ids: list[int]
    strengths: list[float]
    """Size of the pole's value at each token, 0 where that pole is off."""

    def marked(self) -> list[bool]:
        """Which tokens fire at more than `MARK_SHARE` of the window's peak."""
        peak = max(self.strengths)
        return [strength > MARK_SHARE * peak for strength in self.strengths]


def poles(examples: Iterable[Example]) -> list[str]:
    """The poles that a feature shows in its examples; '+' for one that has none."""
    return sorted({example.pole for example in examples}) or ["+"]


def active_windows(examples: Iterable[Example], pole: str, split: Split) -> list[ActiveWindow]:
    """The different windows of one pole and split among a feature's examples, strongest first.

    Those by rank are for people: with them, a score would be of other windows than in an older store.
    """
    sign = -1.0 if pole == "-" else 1.0
    mine = {e.start: e for e in examples if e.pole == pole and e.split == split and e.kind != "quantile"}
    return [
        ActiveWindow(
            doc=example.doc,
            kind=example.kind,
            token_ids=example.token_ids,
            strengths=[max(0.0, sign * act) for act in example.acts],
        )
        for example in sorted(mine.values(), key=lambda e: (-sign * e.peak, e.start))
    ]


def spread(items: Sequence[T], n: int) -> list[T]:
    """`n` items at equal distances, the first and the last among them; all of them when there are no more."""
    if len(items) <= n:
        return list(items)
    if n == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]
