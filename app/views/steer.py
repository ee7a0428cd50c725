"""Steer: a feature or a saved edit added to the model while it writes; its text beside that without it, same seed."""

import streamlit as st

from activations.errors import InputError
from app import queries
from app.parts import notices
from app.parts.cards import source_chip
from app.parts.markup import esc, link
from app.parts.pickers import pick_dictionary, query_of
from app.parts.steering import Request, compare, result_html, saved_edits
from app.runs import Dictionary
from data.store import StoreError
from sae.registry import REGISTRY

RESULT = "steer_result"
FEATURE, SAVED = "A feature", "A saved edit"
UNITS = ["max", "norm", "raw"]
UNITS_HELP = (
    "max: one unit is the feature's largest value on real text. norm: the median norm of the activations there. "
    "raw: the decoder row as it is."
)
PROMPT = "I think that"


def page() -> None:
    """Ask on the left, show the two texts on the right."""
    left, right = st.columns([2, 3.6], gap="large")
    with left:
        st.html('<h1 class="page-title">Steer</h1>')
        dictionary = pick_dictionary()
        if dictionary is None:
            return
        request = ask(dictionary)
    with right:
        if request is not None:
            try:
                with st.spinner("Writing both texts"):
                    st.session_state[RESULT] = compare(dictionary, request)
            except InputError as error:
                st.session_state.pop(RESULT, None)
                notices.wrong("Nothing was written", str(error))
                return
        result = st.session_state.get(RESULT)
        if result is None:
            notices.empty(
                "Base and steered text, side by side",
                "Choose what to add and how strongly, type a prompt, and press Write. Both texts start from the same "
                "prompt and the same seed; only the steered one has the edit.",
            )
        else:
            st.html(result_html(result))


def ask(dictionary: Dictionary) -> Request | None:
    """The widgets; a request when the button was pressed."""
    saved = saved_edits(dictionary)
    what = FEATURE
    if saved:
        what = st.segmented_control("What to add", [FEATURE, SAVED], default=FEATURE, required=True)
    feature, sign, name, unit = 0, 1, "", "max"
    if what == SAVED:
        name = st.selectbox("Saved edit", list(saved))
    else:
        feature = st.number_input("Feature", 0, last_feature(dictionary), step=1, key="feature", bind="query-params")
        st.html(explanation_html(dictionary, feature))
        if is_signed(dictionary):
            sign = -1 if st.segmented_control("Pole", ["+", "\u2212"], default="+", required=True) == "\u2212" else 1
    with st.form("steer_form", border=False):
        strength = st.slider("Strength", -10.0, 10.0, 1.0, 0.25, key="strength", bind="query-params")
        if what == FEATURE:
            unit = st.segmented_control(
                "Unit", UNITS, default="max", required=True, key="unit", bind="query-params", help=UNITS_HELP
            )
        prompt = st.text_area("Prompt", PROMPT, key="prompt", bind="query-params", height=90)
        first, second, third = st.columns(3)
        tokens = first.number_input("Tokens", 1, 400, 40, key="tokens", bind="query-params")
        temperature = second.number_input("Temperature", 0.0, 2.0, 0.0, 0.1, key="temperature", bind="query-params")
        seed = third.number_input("Seed", 0, 2**31 - 1, 0, key="seed", bind="query-params")
        pressed = st.form_submit_button("Write", type="primary", icon=":material/edit:", width="stretch")
    if not pressed:
        return None
    return Request(
        edit=saved.get(name) if what == SAVED else None,
        feature=int(feature),
        sign=sign,
        unit=unit,
        strength=float(strength),
        prompt=prompt,
        max_new_tokens=int(tokens),
        temperature=float(temperature),
        seed=int(seed),
    )


def last_feature(dictionary: Dictionary) -> int:
    """The largest feature number, by the dictionary's own configuration."""
    width = dictionary.config.get("d_sae")
    return max(0, width - 1) if isinstance(width, int) else 0


def is_signed(dictionary: Dictionary) -> bool:
    """Whether its features have a negative pole: by the store, else by the architecture."""
    try:
        return queries.store_of(dictionary).signed
    except StoreError:
        entry = REGISTRY.get(dictionary.architecture)
        return entry is not None and entry.sae.signed


def explanation_html(dictionary: Dictionary, feature: int) -> str:
    """What the feature is said to be, with a link to its page; nothing where there is no store."""
    try:
        found = queries.store_of(dictionary).explanations([feature])
    except StoreError:
        return ""
    text = f"{esc(found[0].text)} {source_chip(found[0])}" if found else '<span class="muted">no explanation yet</span>'
    more = link("feature", {**query_of(dictionary), "feature": feature}, "look at it", "strong")
    return f'<div class="small said">{text} {more}</div>'


page()
