"""The panels of the feature page and the lines of the feature list, as HTML."""

from collections.abc import Mapping, Sequence

from app.parts.markup import Refer, esc, link
from app.parts.score import score_html
from app.parts.spark import spark_html
from app.parts.strip import number, shown, tip_text
from data.store import Explanation, Feature, FeatureRow, Neighbour, Score, TokenCount, TokenValue

SOURCE = {
    "person": "written by a person",
    "llm": "written by a language model",
    "lexical": "from the store's own token counts, no language model",
}


def share(value: float) -> str:
    """A share as per cent with two significant figures."""
    if value == 0:
        return "0 %"
    return f"{100 * value:#.2g} %" if value < 0.0995 else f"{100 * value:.0f} %"


def one_in(density: float) -> str:
    """A density as "1 in N tokens"."""
    return "never" if density <= 0 else f"1 in {1 / density:,.0f} tokens"


def stats_html(feature: Feature, n_tokens: int, signed: bool) -> str:
    """The strip of figures under the title."""
    of = f"over {n_tokens:,} ordinary tokens: position 0 and attention sinks are left out"
    cells = [
        ("density", share(feature.density), one_in(feature.density), f"Share of tokens on which it fires, {of}."),
        ("firings", f"{feature.n_active:,}", f"on {n_tokens:,} tokens", f"Tokens on which it fires, {of}."),
        ("largest value", number(feature.max), "", f"Largest value {of}."),
    ]
    if signed:
        cells.append(("smallest value", number(feature.min), "", f"Most negative value {of}."))
    if feature.mean is not None and feature.q10 is not None and feature.q50 is not None and feature.q90 is not None:
        spread = f"{number(feature.q10)} to {number(feature.q90)}"
        cells.append(("mean firing", number(feature.mean), "", f"Mean of the non-zero values, {of}."))
        cells.append(("median firing", number(feature.q50), f"10\u201390 %: {spread}", f"Quantiles, {of}."))
    body = "".join(
        f'<div title="{esc(help)}"><div class="k">{esc(name)}</div><div class="v">{esc(value)}</div>'
        f'<div class="n">{esc(below)}</div></div>'
        for name, value, below, help in cells
    )
    return f'<div class="stats">{body}</div>'


def logits_html(tokens: Sequence[TokenValue], texts: Mapping[int, str], scale: float) -> str:
    """Vocabulary entries with their logit effect; bars relative to `scale`, the largest effect on either side."""
    lines = "".join(
        f'<tr><td class="t"><span class="tok" title="{tip_text(texts[t.id])}">{_token(texts[t.id])}</span></td>'
        f'<td class="b">{_bar(t.value, scale)}</td><td class="v">{number(t.value)}</td></tr>'
        for t in tokens
    )
    return f'<table class="bars">{lines}</table>' if lines else '<p class="muted small">Not computed.</p>'


def fires_on_html(tokens: Sequence[TokenCount], texts: Mapping[int, str]) -> str:
    """Tokens that the feature fires on most often, with the share of their occurrences and the mean value there."""
    lines = "".join(
        f'<tr title="fires on {t.n:,} of its occurrences ({share(t.share)})"><td class="t">'
        f'<span class="tok">{_token(texts[t.id])}</span></td>'
        f'<td class="v">{t.n:,}</td><td class="v">{share(t.share)}</td><td class="v">{number(t.mean)}</td></tr>'
        for t in tokens
    )
    head = (
        '<tr class="muted"><td class="t">token</td><td class="v" title="Times it fires on this token">n</td>'
        '<td class="v" title="Share of the token\'s occurrences on which it fires">share</td>'
        '<td class="v" title="Mean value at those">mean</td></tr>'
    )
    return f'<table class="bars">{head}{lines}</table>' if lines else ""


def neighbours_html(neighbours: Sequence[Neighbour], names: Mapping[int, str], refer: Refer) -> str:
    """Features whose decoder direction is close, each a link."""
    return "".join(
        refer(
            n.feature,
            f'<span class="muted">{n.feature}</span><span class="label">{name_html(names.get(n.feature))}</span>'
            f'<span class="v">{number(n.cosine)}</span>',
            "near",
        )
        for n in neighbours
    )


def explanations_html(explanations: Sequence[Explanation], scores: Sequence[Score]) -> str:
    """Explanations with where they are from and how they scored."""
    return "".join(_explanation(e, [s for s in scores if s.explanation_id == e.id]) for e in explanations)


def source_chip(explanation: Explanation) -> str:
    """Where a text is from, the maker on hovering."""
    maker = ", ".join(x for x in (explanation.explainer, explanation.model) if x)
    title = SOURCE[explanation.source] + (f": {maker}" if maker else "")
    return f'<span class="chip {explanation.source}" title="{esc(title)}">{esc(explanation.source)}</span>'


def pole_chip(pole: str) -> str:
    """Which side of a signed feature a text is about."""
    sign = {"-": "\u2212", "both": "\u00b1"}.get(pole, "+")
    return f'<span class="chip">pole {sign}</span>'


def _explanation(explanation: Explanation, scores: Sequence[Score]) -> str:
    judged = "".join(f'<div class="under">{score_html(score)}</div>' for score in scores)
    unjudged = "" if scores else '<span class="muted small">no score yet</span>'
    pole = pole_chip(explanation.pole) if explanation.pole != "+" else ""
    return (
        f'<div class="expl"><p>{esc(explanation.text)}</p>'
        f'<div class="under">{source_chip(explanation)}{pole}{unjudged}</div>{judged}</div>'
    )


def _token(piece: str) -> str:
    return shown(piece) or "&nbsp;"


def name_html(text: str | None) -> str:
    """An explanation in a line of a list."""
    return esc(text) if text else '<span class="muted">no explanation</span>'


def _bar(value: float, scale: float) -> str:
    width = 100 * min(1.0, abs(value) / scale) if scale > 0 else 0
    return f'<span class="bar{" neg" if value < 0 else ""}" style="width:{width:.0f}%"></span>'


def rows_html(rows: Sequence[FeatureRow], query: Mapping[str, object], signed: bool) -> str:
    """The feature list: one link a line. query: run and dictionary."""
    head = (
        '<div class="row head"><span>feature</span><span>explanation, and the tokens it fires on most</span>'
        '<span class="r" title="Balanced accuracy of the explanation on unseen windows; 0.50 is chance">score</span>'
        '<span class="r" title="Share of ordinary tokens on which it fires">density</span>'
        f'<span class="r">{"range" if signed else "largest"}</span>'
        '<span title="Histogram of its values where it fires, counts on a log scale">values</span></div>'
    )
    return f'<div class="rows">{head}{"".join(_row(row, query, signed) for row in rows)}</div>'


def _row(row: FeatureRow, query: Mapping[str, object], signed: bool) -> str:
    tokens = "".join(f'<span class="tok">{_token(token)}</span>' for token in row.top_tokens[:8])
    if row.explanation:
        label = f'<span class="label">{esc(row.explanation)}</span>'
    else:
        why = "no explanation yet" if row.alive else "never fires in the indexed text"
        label = f'<span class="label none">{why}</span>'
    chip = f'<span class="chip {esc(row.source)}">{esc(row.source)}</span>' if row.source else ""
    values = number(row.max)
    if signed:
        values = f'<span class="peak pos">{values}</span><span class="peak neg">{number(row.min)}</span>'
    score = "\u2013" if row.score is None else f"{row.score:.2f}"
    inner = (
        f'<span class="id">{row.feature}</span><span class="what">{label}<span class="sub">{chip}{tokens}</span></span>'
        f'<span class="r" data-k="score">{score}</span><span class="r" data-k="density">{share(row.density)}</span>'
        f'<span class="r" data-k="{"range" if signed else "largest"}">{values}</span>'
        f"{spark_html(row.hist_edges, row.hist_counts) or '<span></span>'}"
    )
    return link("feature", {**query, "feature": row.feature}, inner, "row" if row.alive else "row dead")
