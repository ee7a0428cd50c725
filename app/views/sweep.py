"""Sweep: a metric of all dictionaries of a run against L0, as a plot with its Pareto front and as a table."""

from collections.abc import Mapping, Sequence

import streamlit as st

from app import figures
from app.measured import L0, Measured, measured_of
from app.metrics import Kind, kind_of
from app.pareto import Control, Point, choices, controls_of, front_of, points_of, reading
from app.pareto_figure import off_axis, pareto_alt, pareto_figure
from app.parts import notices
from app.parts.markup import code, esc
from app.parts.pickers import no_dictionaries
from app.runs import RunFolder, list_runs, read_object, runs_root, sae, shown_path
from app.sweep_table import RECORD

NAMED = 5  # where dictionaries are left out; a string here would be shown on the page
COMPARED = ("stability", "universality", "probing_difference")  # rows that need another dictionary, one at a time


def page() -> None:
    """Show the pickers, then the plot, what is missing in it and the tables, or what makes them."""
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
    if (run.folder / RECORD).exists() and (fault := read_object(run.folder / RECORD)[1]):
        notices.wrong("What the sweep measured is left out", fault)
    found, unknown = measured_of(run)
    kinds = choices(found)
    if len(found) < 2:
        why = "Fewer than two dictionaries to compare. A file with options of sae train under [base] and lists of them "
        why += "under [grid] describes a sweep:"
        notices.empty(f"No sweep in {run.name} yet", why, sae("sweep", run.address, "grid.toml"))
    elif not kinds:
        why = f"No two of the {len(found)} dictionaries of {run.name} have a number in common."
        notices.empty("Not measured yet", why, sae("eval", run.address, "--all"))
    else:
        compare(run, found, kinds)
    if unknown:
        why = f"No train.json says what {named(unknown)} read: dictionaries that `sae train` has not made are not here."
        notices.note(f"{len(unknown)} left out", why)


def compare(run: RunFolder, found: Sequence[Measured], kinds: Mapping[str, Kind]) -> None:
    """The metric's picker, and all that is of that metric."""
    not_there(run, kinds)
    left, right = st.columns([2, 3], vertical_alignment="bottom")
    with left:
        metric = pick_metric(kinds)
    kind, points, controls = kinds[metric], points_of(found, metric), controls_of(found, metric)
    far = off_axis(points, controls)
    whole = bool(far) and right.toggle("Axis reaches to all controls", key="sweep_whole")
    st.html(
        f'<div class="section">{esc(kind.title)} against L0<span class="muted">{esc(kind.direction)}; bars: standard '
        "deviation over seeds; rings: Pareto front of the means</span></div>"
    )
    st.plotly_chart(
        pareto_figure(points, kind, controls, whole=whole),
        key=f"pareto {metric}",
        config=figures.CONFIG,
        alt=pareto_alt(points, kind),
    )
    st.html(f'<p class="muted small">{esc(about(found, metric, kind, [] if whole else far))}</p>')
    lacking(run, found, metric, kind)
    st.dataframe(told_apart(rows(points, kind)), hide_index=True, key="pareto_table")
    if controls:
        levels = [{"control": each.name, "L0": x, kind.title: y} for each in controls for x, y in _places(each)]
        with st.expander("Controls"):
            st.dataframe(levels, hide_index=True, key="control_table")
    with st.expander("Each dictionary"):
        st.dataframe(told_apart(each_row(found, metric, kind)), hide_index=True, key="dictionary_table")


def about(found: Sequence[Measured], metric: str, kind: Kind, far: Sequence[Control]) -> str:
    """The metric's definition and n, and the controls that are not in the plot."""
    first = reading(found, metric)
    defined = [f"{kind.title}: {first.definition}."] if first.definition else []
    taken = [f"{first.of}."] if first.of else []
    said = ", ".join(f"{each.name} {_span([y for _, y in _places(each)])}" for each in far)
    return " ".join([*defined, *taken, *([f"Controls off the axis: {said}."] if far else [])])


def pick_run(runs: Sequence[RunFolder]) -> RunFolder | None:
    """The run that the URL names, else the first with a sweep, else the first with dictionaries to compare."""
    by_name = {run.name: run for run in runs}
    asked = st.query_params.get("run")
    if asked is not None and asked not in by_name:
        return None
    best = max(runs, key=lambda run: ((run.folder / RECORD).is_file(), len(run.dictionaries) > 1))
    name = asked or best.name
    st.session_state["sweep_run"] = name
    st.selectbox("Run", list(by_name), key="sweep_run", on_change=_picked, args=("run",), label_visibility="collapsed")
    return by_name[name]


def not_there(run: RunFolder, kinds: Mapping[str, Kind]) -> None:
    """Say so where the URL names a metric that no two dictionaries have."""
    asked = st.query_params.get("metric")
    if asked is not None and asked not in kinds:
        command = measure(run, kind_of(asked))
        st.html(f'<p class="todo">Fewer than two dictionaries have {esc(asked[:80])}: {code(command)}</p>')


def pick_metric(kinds: Mapping[str, Kind]) -> str:
    """The metric that the URL names, else the first."""
    asked = st.query_params.get("metric")
    name = asked if asked is not None and asked in kinds else next(iter(kinds))
    st.session_state["sweep_metric"] = name
    st.selectbox(
        "Metric",
        list(kinds),
        format_func=lambda key: kinds[key].title,
        key="sweep_metric",
        on_change=_picked,
        args=("metric",),
    )
    return name


def lacking(run: RunFolder, found: Sequence[Measured], metric: str, kind: Kind) -> None:
    """Say how many dictionaries have no place in the plot, and what gives them one."""
    without = {
        kind.title: ([each.name for each in found if metric not in each.readings], kind),
        "L0": ([each.name for each in found if L0 not in each.readings], kind_of(L0)),
    }
    lines = [
        f'<p class="todo">{len(names)} of {len(found)} without {esc(title)} ({esc(named(names))}): '
        f"{code(measure(run, how))}</p>"
        for title, (names, how) in without.items()
        if names
    ]
    if lines:
        st.html("".join(lines))


def measure(run: RunFolder, kind: Kind) -> str:
    """The command that gives the run's dictionaries this metric."""
    if kind.row in COMPARED:
        return sae("eval", f"{run.address}/ID", "--metric", kind.row, "--against", f"{run.address}/OTHER")
    return sae("eval", run.address, "--all", *(("--metric", kind.row) if kind.row else ()))


def named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def rows(points: Sequence[Point], kind: Kind) -> list[dict[str, object]]:
    """The plot as a table: a row a point."""
    front = {id(point) for point in front_of(points, kind.better)}
    return [
        {
            "hook": point.first.hook,
            "architecture": point.first.architecture,
            "d_sae": point.first.d_sae,
            "k": point.first.sparsity,
            "others": point.first.others,
            "seeds": point.n,
            "L0": _short(point.x),
            "L0 sd": _short(point.sd_x),
            kind.title: _short(point.y),
            "sd": _short(point.sd_y),
            "Pareto front": "yes" if id(point) in front else "",
        }
        for point in points
    ]


def each_row(found: Sequence[Measured], metric: str, kind: Kind) -> list[dict[str, object]]:
    """A row a dictionary, also those that lack the metric."""
    shown = dict([(metric, kind), *((name, kind_of(name)) for name in ("fvu", L0, "dead"))])
    return [
        {
            "dictionary": each.name,
            "hook": each.hook,
            "architecture": each.architecture,
            "d_sae": each.d_sae,
            "k": each.sparsity,
            "others": each.others,
            "seed": each.seeds[0],
            **{
                how.title: _short(each.readings[name].value) if name in each.readings else None
                for name, how in shown.items()
            },
            "tokens/s": each.tokens_per_second,
        }
        for each in found
    ]


def told_apart(table: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Without the columns hook and others, where those are the same in all rows."""
    same = {key for key in ("hook", "others") if len({row[key] for row in table}) == 1}
    return [{key: value for key, value in row.items() if key not in same} for row in table]


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _places(control: Control) -> list[tuple[float | None, float]]:
    """L0 and value of a control, without an L0 where it is the same at all."""
    if control.level is not None:
        return [(None, round(control.level, 9))]  # the identity's error is rounding
    return [(_short(x), float(f"{y:.4g}")) for x, y in zip(control.x, control.y, strict=True)]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _picked(what: str) -> None:
    st.query_params[what] = st.session_state[f"sweep_{what}"]


page()
