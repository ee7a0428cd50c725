"""Explains a feature without a language model: the simple rule that best tells where it fires, and its coverage.

Every living feature gets one, so that a list of features is never blank, and a language model's explanation has
something to beat. Candidates are sets of the tokens that it fires on, or right after, word beginnings and ends, and
classes such as digits. The surprise is what they are judged on: whole windows, not tokens. " the" may catch every
firing of a feature and still say nothing, because most windows that hold " the" do not fire; so a rule gains for each
active window that it hits at a firing token, and loses for each silent window that it hits anywhere. Only windows of
the explain split are read: the store's own token statistics cover all documents and would leak.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from autointerp.rules import CLASSES, Rule, Vocabulary, affixes, as_array
from autointerp.windows import ActiveWindow

EXPLAINER = "lexical"
NOTHING_SEEN = "too rare to describe: no text outside of what is kept for scoring"
_SIZES = (1, 2, 3, 4, 6, 8, 12)  # tokens in a set
_PRICE = 0.01  # of balanced accuracy that each further token of a set must earn
_WORTH_SAYING = 0.6  # balanced accuracy below which the phrase says that there is no simple rule


@dataclass(frozen=True, kw_only=True)
class LexicalExplanation:
    """A rule, and the phrase that states it."""

    text: str
    rule: Rule


class WindowSample:
    """The random windows of one split as an array, and in which of them a rule hits (kept: rules share tokens)."""

    def __init__(self, vocabulary: Vocabulary, sample: dict[int, list[int]]) -> None:
        """sample: token ids by window number, as `Store.sample` gives them."""
        self.vocabulary = vocabulary
        self.tokens: Int[np.ndarray, "n time"] = as_array(list(sample.values()))
        self._rows = {number: row for row, number in enumerate(sample)}
        self._hit: dict[Rule, Bool[np.ndarray, " n"]] = {}

    def off(self, active: Sequence[int]) -> Bool[np.ndarray, " n"]:
        """Which windows are not among those with the numbers `active`, where the feature fires."""
        off = np.ones(len(self.tokens), dtype=bool)
        off[[self._rows[number] for number in active if number in self._rows]] = False
        return off

    def hit(self, rule: Rule) -> Bool[np.ndarray, " n"]:
        """In which windows the rule is true of any token."""
        if rule.kind == "tokens":
            singles = [Rule(place=rule.place, kind="tokens", tokens=(id,)) for id in rule.tokens]
            hits = [self._single(single) for single in singles]
            return np.logical_or.reduce(hits) if hits else np.zeros(len(self.tokens), dtype=bool)
        return self._single(rule)

    def _single(self, rule: Rule) -> Bool[np.ndarray, " n"]:
        if rule not in self._hit:
            self._hit[rule] = np.asarray(rule.hits(self.vocabulary, self.tokens).any(axis=1))
        return self._hit[rule]


def explain(windows: Sequence[ActiveWindow], sample: WindowSample, off: Bool[np.ndarray, " n"]) -> LexicalExplanation:
    """The best rule for one pole of a feature.

    windows: where it fires, explain split. sample: random windows of the same split; off: where in it the feature is
    off.
    """
    if not windows:
        return LexicalExplanation(text=NOTHING_SEEN, rule=Rule(place="at", kind="tokens"))
    vocabulary = sample.vocabulary
    ids = as_array([window.token_ids for window in windows])
    marked = as_array([window.marked() for window in windows]) == 1
    at = Counter(ids[marked].tolist())
    after = Counter(ids[:, :-1][marked[:, 1:]].tolist())
    best, best_value = _top_tokens(at), -1.0
    for rule in _candidates(vocabulary, at, after):
        hits = rule.hits(vocabulary, ids) & marked
        found, false = hits.any(axis=1).mean(), sample.hit(rule)[off].mean() if off.any() else 0.5
        value = (found + 1 - false) / 2 - _PRICE * max(0, len(rule.tokens) - 1)
        if value > best_value:
            best, best_value = rule, float(value)
    if best_value < _WORTH_SAYING:
        best = _top_tokens(at)
    share = (best.hits(vocabulary, ids) & marked).sum() / marked.sum()
    text = f"{best.phrase(vocabulary)} ({share:.0%} of firings)"
    return LexicalExplanation(text=text if best_value >= _WORTH_SAYING else f"no simple rule; {text}", rule=best)


def _top_tokens(at: Counter[int]) -> Rule:
    return Rule(place="at", kind="tokens", tokens=tuple(id for id, _ in at.most_common(4)))


def _candidates(vocabulary: Vocabulary, at: Counter[int], after: Counter[int]) -> Iterator[Rule]:
    """Rules that fit some of the firings, the plainest first: of two that are equally good the first one is taken.

    at, after: how often the feature fires at each token, and after it.
    """
    for size in _SIZES:
        if size <= len(at):
            yield Rule(place="at", kind="tokens", tokens=tuple(id for id, _ in at.most_common(size)))
    for name in CLASSES:
        yield Rule(place="at", kind="class", text=name)
    # An affix of one token alone would say less than the token.
    shared = Counter(affix for id in at for affix in affixes(vocabulary.texts[id]))
    for (kind, text), n in sorted(shared.items(), key=lambda each: (-each[1], -len(each[0][1]), each[0])):
        if n >= 3:
            yield Rule(place="at", kind=kind, text=text)
    for size in _SIZES:
        if size <= len(after):
            yield Rule(place="after", kind="tokens", tokens=tuple(id for id, _ in after.most_common(size)))
    for name in CLASSES:
        yield Rule(place="after", kind="class", text=name)
