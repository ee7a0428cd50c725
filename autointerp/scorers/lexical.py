"""Detection with the rule itself as the judge: does the phrase's rule hit the windows in which the feature fires?

The measure is that of the language model's detection score (balanced accuracy on windows of the score split, chance
0.5), so the two can be compared; it costs nothing and is run for every living feature. The control applies the rule of
another, random feature to the same windows.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from autointerp.explainers.lexical import WindowSample
from autointerp.rules import Rule, as_array
from autointerp.stats import Estimate, balanced_accuracy
from autointerp.windows import ActiveWindow

JUDGE = "rule"
"""What a score of this kind names as its model."""


def score(
    rule: Rule, active: Sequence[ActiveWindow], sample: WindowSample, off: Bool[np.ndarray, " n"], seed: int = 0
) -> Estimate:
    """Balanced accuracy of "the rule hits any token".

    active: windows in which the pole fires. sample: random windows; off: where in it the feature does not fire. Both of
    the score split, and neither empty.
    """
    hits = rule.hits(sample.vocabulary, as_array([window.token_ids for window in active]))
    hit = np.asarray(hits.any(axis=1))
    said = np.concatenate([hit, sample.hit(rule)[off]])
    return balanced_accuracy(said, np.arange(len(said)) < len(hit), seed)
