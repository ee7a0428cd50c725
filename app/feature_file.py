"""Features of a store as one HTML file that opens anywhere: no server, no network, no script.

It is made by the functions that make the feature page and wears the same style sheet. What is in it comes from the
store alone, so the same store gives the same bytes; folders are named without their paths, since the file is meant to
be passed on. A Content-Security-Policy forbids it to run or load anything, so that text which got past the escaping
could still do nothing.
"""

import os.path
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from activations.errors import InputError
from activations.files import write_aside, writing
from activations.run import versions
from app.figures import histogram_alt
from app.parts.cards import (
    explanations_html,
    fires_on_html,
    logits_html,
    neighbours_html,
    pole_chip,
    source_chip,
    stats_html,
)
from app.parts.examples import groups_html, legend_html
from app.parts.histogram import histogram_svg
from app.parts.markup import code, esc
from app.parts.profile import coactive_html, loss_html, positions_html, quantiles_html
from app.parts.score import score_html
from app.queries import FeatureView, view_of
from app.theme import ICON, css_variables
from data.store import Feature, Store, open_store

HERE = Path(__file__).resolve().parent
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def write_features(address: str | Path, features: Sequence[int], out: Path) -> Path:
    """Write features of a dictionary (RUN, RUN/ID or its folder) into the new file `out`, in the order given; `out`.

    Raises StoreError when there is no store or no such feature, InputError for no features and for a file that is
    there already.
    """
    if not features:
        raise InputError("No features were named: expected at least one, such as --features 3,7,12.")
    if out.exists():
        raise InputError(f"{out} is there already: write to another file, or remove it.")
    features = list(dict.fromkeys(features))
    with open_store(address) as store, writing(out), write_aside(out) as aside:
        pieces = _pieces(store, features)
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(next(pieces))
            for piece in tqdm(pieces, desc="features", total=len(features), disable=None):
                file.write(piece)
    return out


def features_html(store: Store, features: Sequence[int]) -> str:
    """The whole document, of features each named once. Raises StoreError when the store has no such feature."""
    return "".join(_pieces(store, features))


def _pieces(store: Store, features: Sequence[int]) -> Iterator[str]:
    """The document: its head with the contents, then one piece a feature; the last one ends it."""
    named = {e.feature: e.text for e in reversed(store.explanations(features))}
    for feature in (min(features), max(features)):
        store.feature(feature)  # what does not exist is said before anything is written
    yield _head(store, features, named)
    n_tokens, here = store.summary().n_tokens, frozenset(features)
    for place, feature in enumerate(features):
        yield _article(store, feature, n_tokens, here) + (_end(store, n_tokens) if place == len(features) - 1 else "")


def _head(store: Store, features: Sequence[int], named: Mapping[int, str]) -> str:
    what = f"Feature {features[0]}" if len(features) == 1 else f"{len(features):,} features"
    style = "\n".join([css_variables(), *(_css(name) for name in ("style.css", "feature_file.css"))])
    about = {"model": store.meta.get("model", ""), "hook": store.meta.get("hook", "")}
    about |= {"architecture": store.meta.get("architecture", ""), "corpus": store.meta.get("corpus", "")}
    facts = " \u00b7 ".join(f"{name} <b>{esc(_bare(value))}</b>" for name, value in about.items() if value)
    contents = "".join(
        f'<a href="#feature-{n}"><span class="muted">{n}</span><span class="label">{esc(name)}</span></a>'
        for n in features
        for name in [named.get(n, "no explanation")]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{esc(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="sae-workbench {esc(versions()["sae-workbench"])}">\n'
        f"<title>{what} of {esc(store.title)}</title>\n"
        f'<link rel="icon" href="data:image/svg+xml,{quote(ICON)}">\n'
        f'<style>\n{style}</style></head>\n<body class="stApp stHtml"><header>'
        f'<h1 class="page-title">{what} of {esc(store.title)}</h1><p class="about muted small">{facts}</p>'
        + (f'<nav class="contents" aria-label="Features">{contents}</nav>' if len(features) > 1 else "")
        + "</header>\n"
    )


def _css(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _article(store: Store, number: int, n_tokens: int, here: frozenset[int]) -> str:
    view = view_of(store, number)
    feature, beside = view.feature, _beside(store, view, here)
    return (
        f'<article id="feature-{number}">{_title(feature)}{stats_html(feature, n_tokens, store.signed)}'
        f'<div class="panels">{_panels(view)}{_profile(view)}</div>'
        f'<div class="sides"><div>{_examples(store, view, n_tokens)}</div><aside>{beside}</aside></div>'
        "</article>\n"
    )


def _title(feature: Feature) -> str:
    """The best explanation with its source and scores, as on the feature page."""
    under = [f'<a href="#feature-{feature.feature}"><b>feature {feature.feature}</b></a>']
    best = feature.explanation
    if best is None:
        what = "No explanation yet" if feature.alive else "Never fires in the indexed text"
        title = f'<h2 class="feature-title none">{what}</h2>'
    else:
        title = f'<h2 class="feature-title">{esc(best.text)}</h2>'
        judged = [score_html(score) for score in feature.scores if score.explanation_id == best.id]
        pole = pole_chip(best.pole) if best.pole != "+" else ""
        under += [source_chip(best) + pole, *(judged or ['<span class="muted">no score yet</span>'])]
    return f'{title}<div class="under">{"".join(under)}</div>'


def _panels(view: FeatureView) -> str:
    feature = view.feature
    values = logits = '<p class="muted small">Not computed.</p>'
    if not feature.alive:
        values = '<p class="muted small">It never fired, so there are no values.</p>'
    if any(feature.hist_counts):
        alt = histogram_alt("values of its firings", feature.hist_edges, feature.hist_counts)
        values = histogram_svg(
            feature.hist_edges,
            feature.hist_counts,
            of="tokens",
            axis="value (tokens on a log scale)",
            alt=alt,
            log=True,
        )
    if any(feature.logit_counts):
        alt = histogram_alt("logit effects", feature.logit_edges, feature.logit_counts)
        logits = histogram_svg(
            feature.logit_edges, feature.logit_counts, of="vocabulary entries", axis="effect on the logit", alt=alt
        )
    scale = max((abs(t.value) for t in [*feature.top_logits, *feature.bottom_logits]), default=0.0)
    return (
        _section("Values", values)
        + _section("Effect on logits", logits)
        + _section("Raises most", logits_html(feature.top_logits, view.tokens, scale))
        + _section("Lowers most", logits_html(feature.bottom_logits, view.tokens, scale))
    )


def _profile(view: FeatureView) -> str:
    profile = view.profile
    if profile is None or not view.feature.alive:
        return ""
    return (
        _section("Quantiles of its values", quantiles_html(profile.quantiles))
        + _section("Where in the context", positions_html(profile.positions))
        + (_section("Effect on the loss", loss_html(profile.loss, "")) if profile.loss else "")
    )


def _examples(store: Store, view: FeatureView, n_tokens: int) -> str:
    if not view.feature.alive:
        return f'<p class="muted">It fired on none of {n_tokens:,} ordinary tokens, so there are no examples.</p>'
    groups = groups_html(view, int(store.meta["top"]), int(store.meta["bands"]), None, tip="title")
    return legend_html(view.feature, store.signed) + groups


def _beside(store: Store, view: FeatureView, here: frozenset[int]) -> str:
    feature, profile = view.feature, view.profile

    def refer(number: int, inner: str, style: str) -> str:
        if number in here:
            return f'<a class="{style}" href="#feature-{number}">{inner}</a>'
        return f'<div class="{style}">{inner}</div>'

    how = "by |cosine| of the decoder directions" if store.signed else "by cosine of the decoder directions"
    positive = ", positive" if store.signed else ""
    tables = {"Fires on most" + positive: feature.top_tokens, "Fires on most, negative": feature.bottom_tokens}
    together = ""
    if profile is not None:
        tables |= {"Strongest on" + positive: profile.strong_tokens, "Strongest on, negative": profile.weak_tokens}
        if profile.by_jaccard or profile.by_phi:
            together = coactive_html(profile.by_jaccard, profile.by_phi, view.names, refer)
    return (
        _section("Other explanations", explanations_html(feature.explanations[1:], feature.scores))
        + "".join(_section(title, fires_on_html(tokens, view.tokens)) for title, tokens in tables.items())
        + _section("Neighbours", neighbours_html(feature.neighbours, view.names, refer), how)
        + _section("Fires together with", together, f"on {_sampled(store)} tokens")
    )


def _section(title: str, body: str, about: str = "") -> str:
    """A heading and what is below it; nothing without a body."""
    if not body:
        return ""
    beside = f' <span class="muted">{esc(about)}</span>' if about else ""
    return f'<div><div class="section">{title}{beside}</div>{body}</div>'


def _end(store: Store, n_tokens: int) -> str:
    """How the numbers are defined, and what made the file."""
    return (
        f"<footer><p>Numbers are over {n_tokens:,} ordinary tokens: position 0 and attention sinks are left out. "
        "Density: share of them on which the feature is not zero. Quantiles and mean: of its non-zero values. Effect "
        "on logits: its decoder direction through the final norm\u2019s gain and the unembedding (logit lens), centred "
        "over the vocabulary. Score: balanced accuracy of telling, from the explanation alone, windows in which it "
        "fires from others, on documents that the explainer has not seen, with a 95 % interval; 0.5 is chance, the "
        "control is another feature\u2019s explanation. Colour: value at a token over the largest |value|; "
        "orange is positive, blue and underlined negative, the peak of a window bold. Hover over a coloured token, a "
        "bar or a figure for what it is.</p>"
        f"<p>Written by sae-workbench {esc(versions()['sae-workbench'])} from the feature store of "
        f"{esc(store.meta.get('created', '')[:10])}. {code(store.title)}</p></footer></body></html>\n"
    )


def _sampled(store: Store) -> str:
    return f"{int(store.meta.get('coactivation_tokens', '0')):,}"


def _bare(value: str) -> str:
    """A model or a corpus by its name: of a path only the last part."""
    return os.path.basename(value.rstrip("/\\")) if os.path.isabs(value) else value
