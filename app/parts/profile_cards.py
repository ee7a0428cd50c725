"""What a store's profile says of a feature: quantiles of its values, its loss effect, what fires together with it."""

from collections.abc import Callable, Mapping

from app.parts.cards import share
from app.parts.markup import esc
from app.parts.strip import number
from data.store import Profile
from data.store.schema import QUANTILES


def quantiles_html(profile: Profile) -> str:
    """A strip of figures: the quantiles of its non-zero values, and what the model loses without it if measured."""
    cells = [
        (
            f"{100 * level:g} %",
            number(value),
            "",
            f"So large a share of its non-zero values lies below {number(value)}.",
        )
        for level, value in zip(QUANTILES, profile.quantiles, strict=False)
    ]
    if (loss := profile.loss) is not None:
        error = "" if loss.error != loss.error else f" \u00b1 {number(loss.error)}"
        about = (
            f"Mean loss over {loss.n_tokens:,} tokens of {loss.n_contexts:,} contexts in which it fires, without it "
            "less with it, in nats, \u00b1 the standard error over contexts. Control: a random direction of its norm."
        )
        cells.append(("loss effect", f"{number(loss.nats)}{error}", f"control {number(loss.control)}", about))
    body = "".join(
        f'<div title="{esc(help)}"><div class="k">{esc(name)}</div><div class="v">{esc(value)}</div>'
        f'<div class="n">{esc(below)}</div></div>'
        for name, value, below, help in cells
    )
    head = '<div class="section">Quantiles <span class="muted">of its non-zero values</span></div>'
    return f'{head}<div class="stats narrow">{body}</div>' if body else ""


def coactive_html(profile: Profile, names: Mapping[int, str], refer: Callable[[int, str], str]) -> str:
    """The features that fire on the same tokens, by phi: tokens, Jaccard, phi.

    names: explanations by feature. refer(feature, inner): `inner` (HTML) as a link to a feature, or as it is.
    """
    found = {each.feature: each for each in [*profile.by_phi, *profile.by_jaccard]}
    lines = "".join(
        f'<tr title="Jaccard {share(c.jaccard)}; {share(c.chance)} if the two fired as often but independently">'
        f'<td class="t">{refer(c.feature, _named(c.feature, names.get(c.feature)))}</td>'
        f'<td class="v">{c.n:,}</td><td class="v">{c.jaccard:.2f}</td><td class="v">{number(c.phi)}</td></tr>'
        for c in sorted(found.values(), key=lambda c: (-c.phi, c.feature))
    )
    head = (
        '<tr class="muted"><td class="t">feature</td><td class="v" title="Tokens on which both fire">n</td>'
        '<td class="v" title="Those as a share of the tokens on which either fires">Jaccard</td>'
        '<td class="v" title="Correlation of the two firing or not; 0 by chance">\u03c6</td></tr>'
    )
    return f'<table class="bars">{head}{lines}</table>' if lines else ""


def _named(feature: int, name: str | None) -> str:
    return f'<span class="muted">{feature}</span> {esc(name) if name else ""}'.rstrip()
