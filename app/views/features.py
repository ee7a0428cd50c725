"""Features: search, filter and sort the features of one dictionary; each line leads to its feature page.

Every choice is in the URL, so that a list can be shared. One page of lines is asked of the store at a time.
"""

import streamlit as st

from app import queries
from app.parts import notices
from app.parts.cards import rows_html
from app.parts.pickers import pick_dictionary, query_of
from app.queries import Filters
from app.runs import Dictionary, sae
from data.store import SOURCES, StoreError, Summary

LINES = 50
SORTS = {
    "best score": ("score", True),
    "worst score": ("score", False),
    "fires most": ("density", True),
    "fires least": ("density", False),
    "largest value": ("max", True),
    "number": ("feature", False),
}
DENSITIES = [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]
ANY = "any"


def page() -> None:
    """Show the picker, then the list or what is missing."""
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    left.html('<h1 class="page-title">Features</h1>')
    with right:
        dictionary = pick_dictionary()
    if dictionary is None:
        return
    try:
        found = queries.summary(dictionary)
        signed = queries.store_of(dictionary).signed
        if found.n_features == 0:
            notices.empty(
                "This dictionary's store holds no features",
                "An index over text fills it:",
                sae("index", dictionary.address, "--overwrite"),
            )
            return
        browse(dictionary, found, signed)
    except StoreError as error:
        notices.no_store(dictionary, error)


def browse(dictionary: Dictionary, found: Summary, signed: bool) -> None:
    """The search line, the lines, the page numbers."""
    filters = ask_filters()
    # The number of lines decides how many page numbers there are, and is needed before the reader's page is known.
    total = queries.page(dictionary, filters, 0, 0).total
    count = st.container()
    lines = st.container()
    number = 1
    if total > LINES:
        with st.container(horizontal=True, horizontal_alignment="center"):
            number = st.pagination(-(-total // LINES), key="page", bind="query-params")
    page = queries.page(dictionary, filters, LINES, (number - 1) * LINES)
    count.html(f'<div class="small muted">{count_text(total, found, filters)}</div>')
    if total == 0:
        with lines:
            notices.empty("Nothing fits", "No feature passes the search and the filters. Take one of them away.")
        return
    lines.html(rows_html(page.rows, query_of(dictionary), signed))


def ask_filters() -> Filters:
    """The widgets above the list."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        search = st.text_input(
            "Search",
            key="search",
            bind="query-params",
            placeholder="words of an explanation, a token, or a number",
            icon=":material/search:",
            label_visibility="collapsed",
            width="stretch",
        )
        sort = st.selectbox(
            "Order",
            list(SORTS),
            key="sort",
            bind="query-params",
            width=190,
            label_visibility="collapsed",
        )
        with st.popover("Filters", icon=":material/tune:"):
            alive_only = st.toggle("Only features that ever fire", value=True, key="alive", bind="query-params")
            low, high = st.select_slider(
                "Density: share of tokens on which it fires",
                DENSITIES,
                value=(0.0, 1.0),
                key="density",
                bind="query-params",
                format_func=lambda d: f"{d:g}",
            )
            score = st.slider(
                "Score at least (0 also shows unscored)", 0.0, 1.0, 0.0, 0.05, key="score", bind="query-params"
            )
            source = st.selectbox("Explanation from", [ANY, *SOURCES], key="source", bind="query-params")
    column, descending = SORTS[sort]
    return Filters(
        search=search or "",
        sort=column,
        descending=descending,
        alive_only=alive_only,
        min_density=low,
        max_density=high,
        min_score=score or None,
        source=None if source == ANY else source,
    )


def count_text(total: int, found: Summary, filters: Filters) -> str:
    """How many lines there are, of how many features."""
    of = f"{found.n_alive:,} features that ever fire" if filters.alive_only else f"{found.n_features:,} features"
    unexplained = f", {found.n_explained:,} explained, {found.n_scored:,} scored"
    return f"{total:,} of {of}{unexplained}. Figures over {found.n_tokens:,} ordinary tokens."


page()
