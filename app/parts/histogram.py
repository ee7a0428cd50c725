"""A histogram as inline SVG, for a page that runs no script. Colours come from the style sheet."""

import math
from collections.abc import Callable, Sequence

from app.parts.markup import esc
from app.parts.strip import number

WIDTH, HEIGHT = 300, 150
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 6, 34
"""Space around the bars, in units of the drawing: for the numbers at the axes."""
TICKS = 4


def histogram_svg(
    edges: Sequence[float], counts: Sequence[int], *, of: str, axis: str, alt: str, log: bool = False
) -> str:
    """Bars of the counts, blue left of zero and orange right of it; hovering one tells its bounds and count.

    edges: n + 1 bounds of the bins, signed; counts: n numbers, not all zero. of: what is counted ("tokens"). axis: what
    the values are. alt: the sentence that stands for the drawing. log: counts on a log axis, on which a single one is
    visible.
    """
    low, high, most, floor = edges[0], edges[-1], max(counts), HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / ((high - low) or 1.0)

    def y(count: float) -> float:
        part = (math.log10(count) + 0.3) / (math.log10(most) + 0.45) if log else count / (1.05 * most)
        return floor - (floor - TOP) * part

    bins = zip(edges, edges[1:], counts, strict=False)
    bars = "".join(_bar(left, right, count, of, x, y(count)) for left, right, count in bins if count)
    lines = "".join(
        f'<path class="grid" d="M{LEFT} {y(n):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 5}" y="{y(n) + 4:.1f}" text-anchor="end">{n:,.0f}</text>'
        for n in (decades(most) if log else ticks(0, most, TICKS))
    )
    values = "".join(
        f'<text x="{x(value):.1f}" y="{floor + 14}" text-anchor="middle">{_short(value)}</text>'
        for value in ticks(low, high, TICKS)
    )
    name = f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{esc(axis)}</text>'
    return (
        f'<svg class="hist" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(alt)}">'
        f'{lines}{bars}<path class="base" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>{values}{name}</svg>'
    )


def _bar(left: float, right: float, count: int, of: str, x: Callable[[float], float], top: float) -> str:
    sign = ' class="n"' if left + right < 0 else ""
    width = 0.92 * (x(right) - x(left))
    return (
        f'<rect{sign} x="{x(left):.1f}" y="{top:.1f}" width="{width:.1f}" height="{HEIGHT - BOTTOM - top:.1f}">'
        f"<title>{number(left)} to {number(right)}: {count:,} {esc(of)}</title></rect>"
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers in [low, high], 1, 2 or 5 times a power of ten apart; at most `most` + 1 of them."""
    if not high > low:
        return [low]
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    return [float(f"{i * step:.6g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def decades(most: int) -> list[int]:
    """Powers of ten up to `most`, at most five of them."""
    top = int(math.log10(most))
    return [10**power for power in range(0, top + 1, 1 + top // 5)]


def _short(value: float) -> str:
    return f"{value:g}".replace("-", "\u2212")
