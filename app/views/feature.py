"""Feature: everything that is known of one feature, and what it does on a text of one's own.

The URL names it (run=, dictionary=, feature=), so the address can be shared. What does not exist yet is said, with the
command that makes it.
"""

import random

import streamlit as st

from app import figures, queries
from app.feature_file import features_html
from app.parts import notices
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
from app.parts.markup import code, esc, in_app, link
from app.parts.own_text import own_text
from app.parts.pickers import pick_dictionary, query_of
from app.parts.profile import coactive_html, loss_html, positions_html, quantiles_html
from app.parts.score import score_html
from app.queries import FeatureView
from app.runs import Dictionary, sae
from data.store import Store, StoreError

JUMP = "jump_to"
WINDOWS, PEAKS = "whole windows", "around peaks"
AROUND = 6
CLUSTER = "Features whose decoder directions point the same way are a cluster; 0 is the largest."


def page() -> None:
    """Show the picker and the feature, or what is missing."""
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    with bar:
        dictionary = pick_dictionary(forget=["feature"])
    if dictionary is None:
        return
    try:
        store = queries.store_of(dictionary)
        if store.n_features == 0 or queries.summary(dictionary).n_features == 0:
            notices.empty(
                "This dictionary's store holds no features",
                "An index over text fills it:",
                sae("index", dictionary.address, "--overwrite"),
            )
            return
        feature = asked_feature(dictionary, store)
        with bar, st.container(horizontal=True, wrap=False, width="content", gap="small"):
            move(dictionary, store, feature)
        if feature is None:
            notices.wrong(
                "No such feature",
                f"{st.query_params.get('feature', '')!r} is not one of the numbers 0 to {store.n_features - 1} that "
                f"{dictionary.address} has. Type one above.",
            )
            return
        with bar:
            download(dictionary, store, feature)
        show(dictionary, store, queries.feature_view(dictionary, feature))
    except StoreError as error:
        notices.no_store(dictionary, error)


def asked_feature(dictionary: Dictionary, store: Store) -> int | None:
    """The feature that the URL names, None if it names none that exists; without one, the first of the list."""
    text = st.query_params.get("feature")
    if text is None:
        remembered = st.session_state.get("last_feature", {}).get(dictionary.address)
        if remembered is not None:
            return int(remembered)
        rows = queries.page(dictionary, queries.Filters(alive_only=False), 1, 0).rows
        return rows[0].feature if rows else None
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        return None
    return int(text) if int(text) < store.n_features else None


def move(dictionary: Dictionary, store: Store, feature: int | None) -> None:
    """Previous, next, random and jump; k, j and x on the keyboard."""
    last = store.n_features - 1
    here = feature if feature is not None else 0
    st.button(
        "",
        icon=":material/chevron_left:",
        key="previous",
        help="Previous feature",
        shortcut="k",
        on_click=go,
        args=(max(0, here - 1),),
        disabled=here == 0,
    )
    st.session_state[JUMP] = feature
    st.number_input("Feature", 0, last, key=JUMP, step=1, on_change=jump, label_visibility="collapsed", width=116)
    st.button(
        "",
        icon=":material/chevron_right:",
        key="next",
        help="Next feature",
        shortcut="j",
        on_click=go,
        args=(min(last, here + 1),),
        disabled=here == last,
    )
    st.button(
        "",
        icon=":material/shuffle:",
        key="random",
        help="Random feature that ever fires",
        shortcut="x",
        on_click=go_random,
        args=(dictionary,),
    )


def download(dictionary: Dictionary, store: Store, feature: int) -> None:
    """The feature as a file to pass on, made when it is asked for."""
    st.download_button(
        "HTML",
        lambda: features_html(store, [feature]),
        f"{dictionary.name}-feature-{feature}.html",
        "text/html",
        key="html",
        help="This feature as one file that opens without a server",
        on_click="ignore",
        icon=":material/download:",
    )


def go(feature: int) -> None:
    """Put the feature into the URL; the rerun that follows a click shows it."""
    st.query_params["feature"] = str(feature)


def go_random(dictionary: Dictionary) -> None:
    """Go to one of the features that ever fire, each as likely."""
    filters = queries.Filters(sort="feature", descending=False)
    total = queries.page(dictionary, filters, 0, 0).total
    if total:
        go(
            queries.store_of(dictionary)
            .page(sort="feature", descending=False, limit=1, offset=random.randrange(total))
            .rows[0]
            .feature
        )


def jump() -> None:
    """Go to the typed number."""
    if st.session_state[JUMP] is not None:
        go(int(st.session_state[JUMP]))


def show(dictionary: Dictionary, store: Store, view: FeatureView) -> None:
    """The page of one feature that exists."""
    feature = view.feature
    st.session_state.setdefault("last_feature", {})[dictionary.address] = feature.feature
    st.html(title_html(dictionary, view))
    st.html(stats_html(feature, queries.summary(dictionary).n_tokens, store.signed))
    panels(view)
    profile(dictionary, view)
    left, right = st.columns([2.3, 1], gap="large")
    with left:
        examples(dictionary, store, view)
    with right:
        beside(dictionary, store, view)


def title_html(dictionary: Dictionary, view: FeatureView) -> str:
    """The best explanation as the title, with its source and score."""
    feature = view.feature
    best = feature.explanation
    here = {**query_of(dictionary), "feature": feature.feature}
    under = [link("feature", here, f"<b>feature {feature.feature}</b>")]  # its address, to copy
    if best is not None:
        title = f'<h1 class="feature-title">{esc(best.text)}</h1>'
        under.append(source_chip(best) + (pole_chip(best.pole) if best.pole != "+" else ""))
        under += [score_html(score) for score in feature.scores if score.explanation_id == best.id]
        if len(under) == 2:
            under.append('<span class="muted">no score yet</span>')
    else:
        what = "No explanation yet" if feature.alive else "Never fires in the indexed text"
        title = f'<h1 class="feature-title none">{what}</h1>'
    under.append(link("steer", here, "Steer with it \u2192", "strong"))
    return f'{title}<div class="under">{"".join(under)}</div>'


def panels(view: FeatureView) -> None:
    """Histograms and logit tables."""
    feature = view.feature
    activation, logits, raised, lowered = st.columns([1.25, 1.25, 1, 1], gap="medium")
    with activation:
        st.html('<div class="section" title="Values of its firings; counts on a log scale.">Values</div>')
        if feature.hist_counts:
            st.plotly_chart(
                figures.activation_histogram(feature.hist_edges, feature.hist_counts),
                key="values",
                config=figures.CONFIG,
                alt=figures.histogram_alt("values of its firings", feature.hist_edges, feature.hist_counts),
            )
        else:
            st.html('<p class="muted small">It never fired, so there are no values.</p>')
    with logits:
        st.html(
            '<div class="section" title="Its decoder direction through the final norm\'s gain and the unembedding '
            '(logit lens), centred over the vocabulary.">Effect on logits</div>'
        )
        if feature.logit_counts:
            st.plotly_chart(
                figures.logit_histogram(feature.logit_edges, feature.logit_counts),
                key="logits",
                config=figures.CONFIG,
                alt=figures.histogram_alt("logit effects", feature.logit_edges, feature.logit_counts),
            )
        else:
            st.html('<p class="muted small">Not computed.</p>')
    scale = max((abs(t.value) for t in [*feature.top_logits, *feature.bottom_logits]), default=0.0)
    raised.html(f'<div class="section">Raises most</div>{logits_html(feature.top_logits, view.tokens, scale)}')
    lowered.html(f'<div class="section">Lowers most</div>{logits_html(feature.bottom_logits, view.tokens, scale)}')


def profile(dictionary: Dictionary, view: FeatureView) -> None:
    """Quantiles, positions in the context, and the effect on the model's loss."""
    if view.profile is None:
        command = code(sae("index", dictionary.address, "--overwrite"))
        added = "adds quantiles, positions, what fires together, clusters and loss effects"
        st.html(f'<p class="small muted">This store is of an older version: {command} {added}.</p>')
        return
    measure = sae("index", dictionary.address, "--features", str(view.feature.feature), "--overwrite")
    values, positions, loss = st.columns([1.25, 1.25, 2], gap="medium")
    values.html(f'<div class="section">Quantiles of its values</div>{quantiles_html(view.profile.quantiles)}')
    positions.html(f'<div class="section">Where in the context</div>{positions_html(view.profile.positions)}')
    loss.html(f'<div class="section">Effect on the loss</div>{loss_html(view.profile.loss, measure)}')


def examples(dictionary: Dictionary, store: Store, view: FeatureView) -> None:
    """The own-text test, then the stored windows."""
    own_text(dictionary, view.feature)
    if not view.feature.alive:
        tokens = queries.summary(dictionary).n_tokens
        notices.empty(
            "This feature is dead",
            f"It fired on none of {tokens:,} ordinary tokens, so there are no examples. Its direction exists: logits "
            "and neighbours are shown.",
        )
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        st.html(legend_html(view.feature, store.signed))
        around = st.segmented_control(
            "Text shown",
            [WINDOWS, PEAKS],
            default=WINDOWS,
            required=True,
            key="view",
            bind="query-params",
            label_visibility="collapsed",
        )
    tops, bands = int(store.meta["top"]), int(store.meta["bands"])
    st.html(groups_html(view, tops, bands, AROUND if around == PEAKS else None))


def beside(dictionary: Dictionary, store: Store, view: FeatureView) -> None:
    """Explanations, tokens, neighbours and what fires together with it."""
    feature = view.feature
    if not feature.explanations and feature.alive:
        command = code(sae("label", dictionary.address, "--features", str(feature.feature)))
        st.html(f'<div class="section">Explanation</div><p class="small muted">None yet: {command}</p>')
    elif others := feature.explanations[1:]:
        st.html(f'<div class="section">Other explanations</div>{explanations_html(others, feature.scores)}')
    for title, tokens in (
        ("Fires on most" + (", positive" if store.signed else ""), feature.top_tokens),
        ("Fires on most, negative", feature.bottom_tokens),
        ("Strongest on" + (", positive" if store.signed else ""), view.profile.strong_tokens if view.profile else []),
        ("Strongest on, negative", view.profile.weak_tokens if view.profile else []),
    ):
        if tokens:
            st.html(f'<div class="section">{title}</div>{fires_on_html(tokens, view.tokens)}')
    if feature.neighbours:
        how = "by |cosine| of the decoder directions" if store.signed else "by cosine of the decoder directions"
        if view.profile is not None and view.profile.cluster is not None:
            how += f"; cluster {view.profile.cluster}"
        st.html(
            f'<div class="section">Neighbours <span class="muted" title="{CLUSTER}">{how}</span></div>'
            f"{neighbours_html(feature.neighbours, view.names, in_app(query_of(dictionary)))}"
        )
    if view.profile is not None and feature.alive:
        found = view.profile.by_jaccard or view.profile.by_phi
        body = coactive_html(view.profile.by_jaccard, view.profile.by_phi, view.names, in_app(query_of(dictionary)))
        none = '<p class="small muted">None meets it on 5 tokens or more.</p>'
        st.html(f'<div class="section">Fires together with</div>{body if found else none}')


page()
