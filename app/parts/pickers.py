"""Which dictionary a page is about: from the URL, else the one looked at last, else the first that can be browsed.

The URL says run=, dictionary= and (on the feature page) feature=; a name that is not in the listing is refused in words
and never becomes a path.
"""

from collections.abc import Sequence

import streamlit as st

from app.parts import notices
from app.runs import Dictionary, RunFolder, find, list_runs, runs_root, sae, shown_path

LAST = "last_dictionary"
PICK = "dictionary_pick"


def pick_dictionary(forget: Sequence[str] = ()) -> Dictionary | None:
    """Show the picker and return the chosen dictionary; None when there is none, which the page then says.

    forget: parts of the URL that mean nothing for another dictionary.
    """
    root = runs_root()
    runs = list_runs(root)
    choices = [d for run in runs for d in run.dictionaries]
    if not choices:
        no_dictionaries(runs)
        return None
    chosen = current(runs, choices)
    if chosen is None:
        asked = f"{st.query_params.get('run', '')}/{st.query_params.get('dictionary', '')}"
        notices.wrong("No such dictionary", f"{asked} is not in {shown_path(root)}. Choose one that is.")
    by_key = {(d.run, d.name): d for d in choices}
    st.session_state[PICK] = (chosen.run, chosen.name) if chosen else None
    st.selectbox(
        "Dictionary",
        list(by_key),
        format_func=lambda key: f"{key[0]} / {key[1]}",
        key=PICK,
        on_change=_picked,
        args=(forget,),
        placeholder="Choose a dictionary",
        label_visibility="collapsed",
    )
    if chosen is not None:
        st.session_state[LAST] = (chosen.run, chosen.name)
    return chosen


def current(runs: Sequence[RunFolder], choices: Sequence[Dictionary]) -> Dictionary | None:
    """The dictionary that the URL names; without names in the URL, the last one, else the first with a store."""
    run, name = st.query_params.get("run"), st.query_params.get("dictionary")
    if run is not None and name is not None:
        return find(runs, run, name)
    if run is not None or name is not None:
        fitting = [d for d in choices if run in (None, d.run) and name in (None, d.name)]
        return fitting[0] if len(fitting) == 1 else None
    last = find(runs, *st.session_state[LAST]) if LAST in st.session_state else None
    return last or next((d for d in choices if d.has_store), choices[0])


def query_of(dictionary: Dictionary) -> dict[str, object]:
    """The part of the URL that names a dictionary."""
    return {"run": dictionary.run, "dictionary": dictionary.name}


def no_dictionaries(runs: Sequence[RunFolder]) -> None:
    """Say that there is nothing to show yet, and what makes it."""
    root = shown_path(runs_root())
    if runs:
        address = runs[0].address
        notices.empty(
            "No dictionary yet", f"{address} has none that is finished.", sae("train", address, "--arch", "topk")
        )
    else:
        notices.empty("No runs yet", f"There is none in {root}. This makes a small one:", "sae demo")


def _picked(forget: Sequence[str]) -> None:
    st.query_params["run"], st.query_params["dictionary"] = st.session_state[PICK]
    for name in forget:
        st.query_params.pop(name, None)
