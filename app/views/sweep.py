"""Sweep: the table and the Pareto plot of a run's sweeps."""

from collections.abc import Sequence

import streamlit as st

from activations.errors import InputError
from app import figures
from app.parts import notices
from app.parts.pickers import no_dictionaries
from app.runs import RunFolder, list_runs, read_object, runs_root, sae, shown_path
from app.sweep_table import RECORD, Cell, cells_of, points_of


def page() -> None:
    """Show the picker, then the plot and the table, or what makes them."""
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    left.html('<h1 class="page-title">Sweep</h1>')
    runs = list_runs(runs_root())
    if not runs:
        no_dictionaries(runs)
        return
    with right:
        run = pick_run(runs)
    if run is None:
        asked = st.query_params.get("run", "")
        notices.wrong("No such run", f"{asked} is not in {shown_path(runs_root())}. Choose one that is.")
        return
    if not (run.folder / RECORD).is_file():
        why = "A file with options of sae train under [base] and lists of them under [grid] describes one:"
        notices.empty(f"No sweep in {run.name} yet", why, sae("sweep", run.address, "grid.toml"))
        return
    record, fault = read_object(run.folder / RECORD)
    try:
        cells = cells_of(record or {})
    except InputError as error:
        notices.wrong("The sweep cannot be shown", fault or str(error))
        return
    if cells:
        st.plotly_chart(figures.pareto(cells), key="pareto", config=figures.CONFIG, alt=figures.pareto_alt(cells))
        st.dataframe(rows(cells), hide_index=True)


def pick_run(runs: Sequence[RunFolder]) -> RunFolder | None:
    """The run that the URL names, else the first with a sweep, else the first."""
    by_name = {run.name: run for run in runs}
    asked = st.query_params.get("run")
    if asked is not None and asked not in by_name:
        return None
    name = asked or next((run.name for run in runs if (run.folder / RECORD).is_file()), runs[0].name)
    st.session_state["sweep_run"] = name
    st.selectbox("Run", list(by_name), key="sweep_run", on_change=_picked, label_visibility="collapsed")
    return by_name[name]


def rows(cells: Sequence[Cell]) -> list[dict[str, object]]:
    """The table: a row a cell; those that differ in their seed alone have the spread of their FVU beside them."""
    spread = {
        cell.name: point.spread("fvu") for point in points_of(cells) if len(point.cells) > 1 for cell in point.cells
    }
    return [
        {
            "hook": cell.hook,
            "architecture": cell.architecture,
            "d_sae": cell.d_sae,
            "k": cell.sparsity,
            "others": cell.others,
            "seed": cell.seed,
            "FVU": round(cell.fvu, 4),
            "sd over seeds": round(spread[cell.name], 4) if cell.name in spread else None,
            "L0": round(cell.l0, 2),
            "dead, %": round(100 * cell.dead, 1),
            "tokens/s": cell.tokens_per_second,
            "dictionary": cell.name,
        }
        for cell in cells
    ]


def _picked() -> None:
    st.query_params["run"] = st.session_state["sweep_run"]


page()
