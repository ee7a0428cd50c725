"""What may be added to a store: checks of explanations and scores, before anything is written."""

import math
from collections.abc import Sequence

from data.store.errors import StoreError
from data.store.schema import POLES, SOURCES, Explanation, Score


def check_explanations(rows: Sequence[Explanation], n_features: int) -> None:
    """Raise StoreError for the first row that the store cannot take."""
    for row in rows:
        _check_feature(row.feature, n_features)
        if row.pole not in POLES:
            raise StoreError(f"pole {row.pole!r} is unknown: expected one of {', '.join(POLES)}")
        if row.source not in SOURCES:
            raise StoreError(f"source {row.source!r} is unknown: expected one of {', '.join(SOURCES)}")
        if not row.id or not row.created:
            raise StoreError(f"explanation of feature {row.feature} without id or date: make it with Explanation.new")


def check_scores(rows: Sequence[Score], n_features: int) -> None:
    """Raise StoreError for the first row that the store cannot take."""
    for row in rows:
        _check_feature(row.feature, n_features)
        for name in ("value", "lo", "hi", "chance"):
            if not math.isfinite(getattr(row, name)):
                raise StoreError(f"the {row.scorer} score of feature {row.feature} has {name}={getattr(row, name)}")
        if not row.explanation_id or not row.scorer or not row.created:
            raise StoreError(f"a score of feature {row.feature} has no explanation_id, scorer or date")


def _check_feature(feature: int, n_features: int) -> None:
    if not 0 <= feature < n_features:
        raise StoreError(f"feature {feature} is out of range: expected 0 to {n_features - 1}")
