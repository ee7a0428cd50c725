"""The own-text test: what the feature does on a text that the reader types, shown above the stored windows."""

from typing import TYPE_CHECKING

import streamlit as st

from activations.errors import InputError
from app import models, queries
from app.parts import notices
from app.parts.examples import scale_of
from app.parts.markup import esc
from app.parts.strip import Row, number, rows_html
from app.runs import Dictionary
from data.store import Feature

if TYPE_CHECKING:
    from autointerp.search.prompt import Reading

KEY = "own_text"
EXAMPLE = "The quick brown fox jumps over the lazy dog."


def own_text(dictionary: Dictionary, feature: Feature) -> None:
    """Ask for a text and show the feature's values on it. The text stays when the reader goes to another feature."""
    with (
        st.form("own_text_form", border=False),
        st.container(horizontal=True, vertical_alignment="bottom", gap="small"),
    ):
        text = st.text_area(
            "Try your own text", key=KEY, height=68, placeholder=EXAMPLE, persist_state="session", width="stretch"
        )
        st.form_submit_button("Test", type="primary")
    if not text or not text.strip():
        return
    try:
        with st.spinner("Running the model on it"):
            reading = _read(dictionary, text)
    except InputError as error:
        notices.wrong("The text could not be read", str(error))
        return
    pieces = queries.store_of(dictionary).token_texts(reading.ids)
    st.html(result_html(pieces, reading.of(feature.feature), feature, reading.cut))


def result_html(pieces: list[str], acts: list[float], feature: Feature, cut: bool) -> str:
    """The strip of the text with what was found, in words."""
    peak = max(range(len(acts)), key=lambda i: abs(acts[i]))
    on = sum(act != 0 for act in acts)
    if on == 0:
        found = f"fires on none of {len(acts)} tokens"
    else:
        found = f"fires on {on} of {len(acts)} tokens, peak {number(acts[peak])}"
        scale = scale_of(feature)
        if scale > 0:
            found += f" ({100 * abs(acts[peak]) / scale:.0f} % of its largest)"
    if cut:
        found += f"; only the first {len(acts):,} tokens were read"
    row = Row(pieces=pieces, acts=acts, peak_index=peak)
    return (
        f'<div class="group"><div class="section">Your text <span class="muted">{esc(found)}</span></div>'
        f"{rows_html([row], scale_of(feature))}</div>"
    )


def _read(dictionary: Dictionary, text: str) -> "Reading":
    """The reading of the last text of this session, so that going through features does not run the model again."""
    key = (dictionary.address, text)
    if st.session_state.get("own_reading_key") != key:
        st.session_state["own_reading"] = models.read_text(dictionary, text)
        st.session_state["own_reading_key"] = key
    reading: Reading = st.session_state["own_reading"]
    return reading
