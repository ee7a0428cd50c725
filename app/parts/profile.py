"""What the index knows of a feature beyond its figures: the spread of its values, where in a context it fires, what
fires with it, and what the model loses without it. All as HTML; what is drawn is also said in words.
"""

from collections.abc import Mapping, Sequence

from app.parts.cards import name_html, share
from app.parts.markup import Refer, code, esc
from app.parts.strip import number
from data.store import Coactive, LossEffect, PositionBin
from data.store.schema import QUANTILES


def quantiles_html(quantiles: Sequence[float]) -> str:
    """The values at `QUANTILES` of those that are not 0."""
    if not quantiles:
        return '<p class="muted small">It never fired, so there are no values.</p>'
    cells = "".join(
        f'<span><span class="muted">{100 * level:.0f} %</span> {number(value)}</span>'
        for level, value in zip(QUANTILES, quantiles, strict=True)
    )
    return f'<div class="levels">{cells}</div>'


def positions_html(positions: Sequence[PositionBin]) -> str:
    """A bar for each piece of the context: the share of its ordinary tokens on which the feature fires."""
    shares = [each.n_active / each.n_tokens if each.n_tokens else 0.0 for each in positions]
    highest = max(shares, default=0.0)
    if highest == 0:
        return '<p class="muted small">It fires at no position.</p>'
    bars = "".join(
        f'<i title="{esc(_position(each, part))}"><b style="height:{100 * part / highest:.0f}%"></b></i>'
        for each, part in zip(positions, shares, strict=True)
    )
    ends = f"<span>{positions[0].first}</span><span>most: {share(highest)}</span><span>{positions[-1].last}</span>"
    return (
        f'<div class="places" role="img" aria-label="{esc(positions_alt(positions, shares))}">{bars}</div>'
        f'<div class="ends muted" aria-hidden="true">{ends}</div>'
    )


def positions_alt(positions: Sequence[PositionBin], shares: Sequence[float]) -> str:
    """The bars in words."""
    each = "; ".join(f"{p.first} to {p.last}, {share(part)}" for p, part in zip(positions, shares, strict=True))
    return f"Share of tokens on which it fires, by position in the context: {each}."


def _position(each: PositionBin, part: float) -> str:
    fired = f"fires on {each.n_active:,} of {each.n_tokens:,} tokens ({share(part)})"
    return f"positions {each.first} to {each.last}: {fired}, mean value {number(each.mean)}"


def coactive_html(
    by_jaccard: Sequence[Coactive],
    by_phi: Sequence[Coactive],
    names: Mapping[int, str],
    refer: Refer,
) -> str:
    """Features that fire on the same tokens, each a link: those of either list once, by Jaccard index."""
    found = {each.feature: each for each in [*by_jaccard, *by_phi]}
    head = (
        '<div class="near with head muted"><span>feature</span><span></span>'
        '<span class="v" title="Tokens on which both fire, as a share of those on which either does">Jaccard</span>'
        '<span class="v" title="Correlation of the two firing or not; 0 by chance">\u03c6</span></div>'
    )
    lines = "".join(_coactive(each, names, refer) for each in sorted(found.values(), key=lambda e: -e.jaccard))
    return head + lines


def _coactive(each: Coactive, names: Mapping[int, str], refer: Refer) -> str:
    tip = f"both fire on {each.n:,} tokens; Jaccard {number(each.jaccard)}, by chance {number(each.chance)}"
    inner = (
        f'<span class="muted">{each.feature}</span><span class="label">{name_html(names.get(each.feature))}</span>'
        f'<span class="v" title="{esc(tip)}">{number(each.jaccard)}</span><span class="v">{number(each.phi)}</span>'
    )
    return refer(each.feature, inner, "near with")


def loss_html(loss: LossEffect | None, command: str) -> str:
    """The effect on the model's loss, with what it is a mean of; command: what measures it where nobody has."""
    if loss is None:
        return f'<p class="small muted">Not measured: {code(command)}</p>'
    spread = "" if loss.error != loss.error else f" \u00b1 {number(loss.error)}"  # NaN for one context
    sign = "+" if loss.nats > 0 else ""
    return (
        f'<p class="effect"><b>{sign}{number(loss.nats)}</b>{spread} nats a token</p>'
        f'<p class="small muted">Loss without the feature less the loss with it: mean over {loss.n_tokens:,} predicted '
        f"tokens of {loss.n_contexts} context{'s' if loss.n_contexts != 1 else ''} in which it fires, \u00b1 standard "
        f"error over contexts. A random direction of its size: {number(loss.control)}.</p>"
    )
