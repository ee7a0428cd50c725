"""Training: what is being trained, how far it is, and its curves, several dictionaries over each other.

Looks again every few seconds while something trains.
"""

from collections.abc import Sequence

import streamlit as st

from app import figures
from app.figures import Series
from app.parts import notices
from app.parts.markup import esc
from app.parts.overview import next_for_run
from app.parts.pickers import no_dictionaries
from app.parts.training import trainings_html
from app.runs import RunFolder, list_runs, runs_root, shown_path
from app.trainings import TRAINING, TrainingFolder, trainings

SECONDS = 3.0
SHOWN_AT_FIRST = 8
# (figure of the log, title, format, log scale, definition); a string here would be shown on the page
CHARTS = (
    ("fvu", "FVU", ".3~g", True, "Squared error over variance, in the batch; log scale."),
    ("l0", "L0", ".3~g", False, "Active latents a token, in the batch."),
    ("dead", "Dead", ".1~%", False, "Share of the latents that have not fired for a while."),
    ("lr", "Learning rate", ".2~g", False, "Of the step."),
    ("grad_norm", "Gradient norm", ".2~g", True, "Before clipping; log scale."),
)


def page() -> None:
    """Show the run's picker, the trainings and their curves, or the command that begins one."""
    runs = list_runs(runs_root())
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    left.html('<h1 class="page-title">Training</h1>')
    if not runs:
        no_dictionaries(runs)
        return
    with right:
        run = pick_run(runs)
    if run is None:
        asked = st.query_params.get("run", "")
        notices.wrong("No such run", f"{asked} is not in {shown_path(runs_root())}. Choose one that is.")
        return
    found = trainings(run)
    if not found:
        why = f"{run.address} has no dictionary begun."
        notices.empty("Nothing has been trained here yet", why, next_for_run(run))
        return
    names = [each.name for each in found]
    first = sorted(names, key=lambda name: found[names.index(name)].state != TRAINING)[:SHOWN_AT_FIRST]
    chosen = names
    if len(names) > 1:
        chosen = st.multiselect(
            "Curves of", names, default=first, key=f"curves {run.name}", max_selections=figures.MAX_SERIES
        )
    colours = {name: i for i, name in enumerate(chosen)}
    trains = any(each.state == TRAINING for each in found)

    def show() -> None:
        now = trainings(run)
        if [each.name for each in now] != names or any(each.state == TRAINING for each in now) != trains:
            st.rerun()
        st.html(trainings_html(now, colours))
        charts([each for each in now if each.name in colours], colours)

    st.fragment(show, run_every=SECONDS if trains else None)()


def pick_run(runs: Sequence[RunFolder]) -> RunFolder | None:
    """The run that the URL names, else the one in which something trains, else the first."""
    by_name = {run.name: run for run in runs}
    asked = st.query_params.get("run")
    if asked is not None and asked not in by_name:
        return None
    busy = (run.name for run in runs if any(each.state == TRAINING for each in trainings(run)))
    name = asked or next(busy, runs[0].name)
    st.session_state["training_run"] = name
    st.selectbox("Run", list(by_name), key="training_run", on_change=_picked, label_visibility="collapsed")
    return by_name[name]


def charts(shown: Sequence[TrainingFolder], colours: dict[str, int]) -> None:
    """A chart for each figure, two in the first row."""
    places = [*st.columns(2, gap="medium"), *st.columns(3, gap="medium")]
    for place, (key, title, form, log, definition) in zip(places, CHARTS, strict=True):
        lines = [series(each, key, colours[each.name], log) for each in shown]
        with place:
            st.html(f'<div class="section" title="{esc(definition)}">{title}</div>')
            st.plotly_chart(
                figures.curves(lines, form=form, log=log),
                key=f"curve {key}",
                config=figures.CONFIG,
                alt=figures.curves_alt(title, lines, ".3g"),
            )


def series(each: TrainingFolder, key: str, colour: int, log: bool) -> Series:
    """The curve of one figure; a log scale has no place for 0."""
    points = [(line["tokens"], line[key]) for line in each.lines if key in line and (line[key] > 0 or not log)]
    return Series(name=esc(each.name), colour=colour, x=[x for x, _ in points], y=[y for _, y in points])


def _picked() -> None:
    st.query_params["run"] = st.session_state["training_run"]


page()
