"""A labelling job's bookkeeping: what is known already, what was made now, what failed, and when it is written."""

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from autointerp.stats import CHANCE, Estimate
from data.store import DETECTION, Explanation, Score, Store
from data.store.schema import now

_FLUSH_S = 30.0
_FLUSH_ROWS = 5_000

MIN_WINDOWS = 3
"""Windows of each class that a score needs; with fewer there is none."""

T = TypeVar("T")
Target = tuple[int, str]
"""What an explanation is of: (feature, pole)."""


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """What a job did. Counts are of explanations: a latent that goes negative has one for each pole."""

    n_explained: int
    n_scored: int
    n_failed: int
    """Got no explanation, or no score, because of the model's or the server's answer."""
    n_skipped: int
    """Were there already, or have too few windows for what is left to do."""
    tokens_in: int = 0
    tokens_out: int = 0
    """Sent to and written by the model in this job; answers from the cache cost nothing."""
    reasons: tuple[tuple[str, int], ...] = ()
    """Why the failed ones failed, and how often."""
    stopped: str = ""
    """Why the job ended before its list did; empty when it did not."""


class Job:
    """Collects explanations and scores, and writes them every 30 s or 5,000 rows, so that a kill loses little."""

    def __init__(self, store: Store, *, source: str, explainer: str, model: str, redo: bool) -> None:
        """redo: take nothing as known."""
        self.store = store
        self.source, self.explainer, self.model = source, explainer, model
        key = (source, explainer, model)
        stored = [] if redo else [e for e in store.explanations() if (e.source, e.explainer, e.model) == key]
        self.known: dict[Target, Explanation] = {(e.feature, e.pole): e for e in stored}
        ids = {e.id for e in stored}
        self._scored = {s.explanation_id for s in store.scores() if s.scorer == DETECTION and s.explanation_id in ids}
        self._reasons: Counter[str] = Counter()
        self._failed: set[Target] = set()
        self._touched: set[Target] = set()
        self._n_explained = self._n_scored = 0
        self._explanations: list[Explanation] = []
        self._scores: list[Score] = []
        self._flushed = time.monotonic()

    def lacks_score(self, target: Target) -> bool:
        """Whether there is an explanation that nobody has scored."""
        return target in self.known and self.known[target].id not in self._scored

    def explain(self, target: Target, text: str, version: str) -> None:
        """Record an explanation. version: the prompt's version, or the rule that the text states."""
        row = Explanation.new(
            feature=target[0],
            pole=target[1],
            text=text,
            source=self.source,
            explainer=self.explainer,
            model=self.model,
            prompt_version=version,
        )
        self.known[target] = row
        self._touched.add(target)
        self._explanations.append(row)
        self._n_explained += 1
        self._flush_if_due()

    def score(
        self,
        target: Target,
        scorer: str,
        estimate: Estimate,
        *,
        control: float | None,
        judge: str,
        failures: int = 0,
        cost_tokens: int = 0,
    ) -> None:
        """Record a score of the explanation known for `target`."""
        row = Score(
            explanation_id=self.known[target].id,
            feature=target[0],
            scorer=scorer,
            value=estimate.value,
            lo=estimate.lo,
            hi=estimate.hi,
            n=estimate.n,
            chance=CHANCE,
            control=control,
            failures=failures,
            cost_tokens=cost_tokens,
            created=now(),
            model=judge,
        )
        self._touched.add(target)
        self._scores.append(row)
        self._n_scored += scorer == DETECTION
        self._flush_if_due()

    def fail(self, target: Target, reason: str) -> None:
        """Count a target that stays without explanation or score."""
        self._failed.add(target)
        self._reasons[reason] += 1

    def flush(self) -> None:
        """Write what was collected, explanations first: no score stands without its text."""
        self.store.add_explanations(self._explanations)
        self.store.add_scores(self._scores)
        self._explanations, self._scores = [], []
        self._flushed = time.monotonic()

    def report(self, n_targets: int, tokens_in: int = 0, tokens_out: int = 0, stopped: str = "") -> LabelReport:
        """The counts, when `n_targets` were gone through."""
        return LabelReport(
            n_explained=self._n_explained,
            n_scored=self._n_scored,
            n_failed=len(self._failed),
            n_skipped=n_targets - len(self._touched | self._failed),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            reasons=tuple(self._reasons.most_common()),
            stopped=stopped,
        )

    def _flush_if_due(self) -> None:
        rows = len(self._explanations) + len(self._scores)
        if rows >= _FLUSH_ROWS or time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()


def blocks(features: Sequence[int], n: int) -> Iterator[Sequence[int]]:
    """`features` in pieces of `n`."""
    return (features[start : start + n] for start in range(0, len(features), n))


def pick_control(target: Target, pool: Mapping[Target, T]) -> T | None:
    """What belongs to a random other feature, and differs from the target's own; None if there is none.

    The choice follows from the target and the pool, so that a resumed job makes the same one.
    """
    others = list(pool)
    first = random.Random(repr(target)).randrange(len(others)) if others else 0
    for other in others[first:] + others[:first]:
        if other[0] != target[0] and pool[other] != pool.get(target):
            return pool[other]
    return None
