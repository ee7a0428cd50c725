"""A number with its definition: what eval.json is made of."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    value: float
    n: int
    """How many units (see `of`) the value was taken over."""
    of: str
    """What n counts."""
    definition: str
    lo: float | None = None
    hi: float | None = None
    """95 % interval, where the value is an estimate."""
