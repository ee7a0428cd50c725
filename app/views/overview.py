"""Overview: the runs and their dictionaries, how good they are, and the command that makes what is missing."""

import streamlit as st

from app import queries
from app.parts import notices
from app.parts.overview import Counts, run_html
from app.runs import Dictionary, list_runs, runs_root, shown_path
from data.store import StoreError


def page() -> None:
    """Show every run as a card."""
    root = runs_root()
    st.html(
        '<h1 class="page-title">Runs</h1><p class="page-lead">Each run is one model and one text, with the '
        "dictionaries trained on its activations. Point at a figure to see how it is defined.</p>"
    )
    runs = list_runs(root)
    if not runs:
        notices.empty("No runs yet", f"There is none in {shown_path(root)}. This makes a small one:", "sae demo")
        return
    counts = {d.address: counts_of(d) for run in runs for d in run.dictionaries if d.has_store}
    st.html("".join(run_html(run, counts) for run in runs))


def counts_of(dictionary: Dictionary) -> Counts | str:
    """What the store of a dictionary holds, or what is wrong with it."""
    try:
        return Counts.of(queries.summary(dictionary))
    except StoreError as error:
        return str(error)


page()
