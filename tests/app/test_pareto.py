"""A run's dictionaries as a plot of any metric against L0: what is in it, what is missing, and hostile files."""

import json
import math
from pathlib import Path

import pytest

from app.measured import Measured, Reading, measured_of
from app.metrics import HIGHER, LOWER, NEITHER, kind_of
from app.pareto import Control, choices, controls_of, front_of, lines_of, points_of
from app.pareto_figure import off_axis, pareto_alt, pareto_figure
from app.runs import list_runs
from app.sweep import sweep
from tests.app.conftest import html_of
from tests.tiny import HOOK, planted_rows, planted_run


def entry(value: object, row: str = "reconstruction", **more: object) -> dict[str, object]:
    return {"row": row, "value": value, "n": 100, "of": "tokens", "definition": "as written", **more}


def dictionary(root: Path, name: str, metrics: dict[str, object] | None, **settings: object) -> Path:
    """The small files of a finished dictionary of `root`/run, as the commands leave them."""
    run = root / "run"
    folder = run / "dictionaries" / name
    folder.mkdir(parents=True)
    (run / "run.json").write_text('{"format": 1}')
    (folder / "cfg.json").write_text('{"architecture": "topk", "d_sae": 64}')
    sizes = {"d_sae": 64, "k": settings.pop("k", 4)}
    written = {"architecture": "topk", "hook": HOOK, "sizes": sizes, "n_tokens": 1000, "seed": 0, **settings}
    (folder / "train.json").write_text(json.dumps(written))
    if metrics is not None:
        (folder / "eval.json").write_text(json.dumps({"metrics": metrics}))
    return folder


def numbers(l0: float, fvu: float, **more: object) -> dict[str, object]:
    return {"l0": entry(l0), "fvu": entry(fvu), **more}


@pytest.fixture
def root(tmp_path):
    """Two architectures; of topk two seeds at k 4; one without a splice, one that was never measured."""

    def score(value: float) -> dict[str, object]:
        return {"ce_score": entry(value, "splice")}

    controls = {"control.mean.fvu": entry(1.0, "controls"), "control.mean.l0": entry(1.0, "controls")}
    dictionary(tmp_path, "a0", numbers(4, 0.2, **score(0.9), **controls))
    dictionary(tmp_path, "a1", numbers(5, 0.3, **score(0.7), **controls), seed=1)
    dictionary(tmp_path, "a8", numbers(8, 0.1, **score(0.95)), k=8)
    dictionary(tmp_path, "b", numbers(8, 0.4, **score(0.5)), architecture="batchtopk", k=8)
    dictionary(tmp_path, "c", numbers(3, 0.5), k=2)
    dictionary(tmp_path, "d", None, k=16)
    return tmp_path


def found_in(root: Path) -> list[Measured]:
    return measured_of(list_runs(root)[0])[0]


def test_dictionaries_of_train_alone_are_points_with_means_and_spreads_over_seeds(root):
    points = points_of(found_in(root), "fvu")
    assert [(p.first.architecture, p.first.sparsity, p.n) for p in points] == [
        ("batchtopk", 8, 1),
        ("topk", 2, 1),
        ("topk", 4, 2),
        ("topk", 8, 1),
    ]
    seeds = points[2]
    assert (seeds.x, seeds.y) == pytest.approx((4.5, 0.25))
    assert (seeds.sd_x, seeds.sd_y) == pytest.approx((1 / 2**0.5, 0.1 / 2**0.5))
    assert points[1].sd_y is None
    assert {name: len(line) for name, line in lines_of(points).items()} == {"batchtopk 64": 1, "topk 64": 3}


def test_the_picker_has_what_two_dictionaries_have_and_names_their_better_end(root):
    kinds = choices(found_in(root))
    assert list(kinds) == ["fvu", "ce_score"]
    assert [kind.better for kind in kinds.values()] == [LOWER, HIGHER]
    assert kind_of("fvu blocks.1.hook_resid_post").title == "FVU, blocks.1.hook_resid_post"
    assert kind_of("something.else", "dark_matter") == ("something.else", NEITHER, "dark_matter")
    assert kind_of("something.else", "--all; rm").row is None


def point(x: float, y: float, hook: str = HOOK) -> object:
    facts = {"hook": hook, "architecture": "topk", "d_sae": 64, "seeds": (0, None), "others": ""}
    values = {"l0": Reading(x), "fvu": Reading(y)}
    return points_of([Measured(name="a", sparsity=x, readings=values, **facts)], "fvu")[0]


def test_the_front_holds_the_points_that_no_other_beats():
    points = [point(1, 0.5), point(2, 0.3), point(3, 0.4), point(3, 0.3), point(4, 0.1), point(9, 0.9, "other")]
    assert front_of(points, LOWER) == [points[0], points[1], points[4], points[5]]
    assert front_of(points, HIGHER) == [points[0], points[5]]
    assert front_of(points, NEITHER) == []
    assert len(front_of([point(1, 0.5), point(1, 0.5)], LOWER)) == 2  # neither is better than the other


def test_a_control_is_a_level_where_it_is_the_same_for_all_and_a_line_by_l0_where_it_is_not(tmp_path):
    def probed(l0: float, auc: float, random: float) -> dict[str, object]:
        found = {"probing.auc_5": auc, "control.random.probing.auc_5": random, "control.dense.probing.auc": 0.95}
        return numbers(l0, 0.5, **{name: entry(value, "probing") for name, value in found.items()})

    dictionary(tmp_path, "a", probed(4, 0.8, 0.6), k=4)
    dictionary(tmp_path, "b", probed(4, 0.9, 0.7), k=4, seed=1)
    dictionary(tmp_path, "c", probed(8, 0.9, 0.8), k=8)
    found = found_in(tmp_path)
    dense, random = controls_of(found, "probing.auc_5")
    assert (dense.name, dense.level) == ("dense", pytest.approx(0.95))
    assert (random.name, random.level, random.x, random.y) == ("random", None, [4, 8], pytest.approx([0.65, 0.8]))
    assert controls_of(found, "fvu") == []
    points = points_of(found, "probing.auc_5")
    assert off_axis(points, [dense, random]) == [dense, random]  # from 0.85 - 0.07 to 0.85 + 0.07, and a tenth of that
    assert off_axis(points, [Control(name="near", x=[4, 8], y=[0.77, 0.93])]) == []


def test_the_figure_has_symbols_bars_rings_and_the_controls_that_fit(root):
    found = found_in(root)
    points, controls = points_of(found, "fvu"), controls_of(found, "fvu")
    fitted, whole = (pareto_figure(points, kind_of("fvu"), controls, whole=each) for each in (False, True))
    batchtopk, topk, front = fitted.data
    assert (batchtopk.name, topk.name, front.name) == ("batchtopk 64", "topk 64", "Pareto front")
    assert batchtopk.line.color != topk.line.color
    assert batchtopk.marker.symbol != topk.marker.symbol
    assert list(topk.error_x.array) == pytest.approx([0, 1 / 2**0.5, 0])
    assert list(zip(front.x, front.y, strict=True)) == [(3, 0.5), (4.5, 0.25), (8, 0.1)]
    assert [trace.name for trace in whole.data[3:]] == ["control: mean"]
    assert list(whole.data[3].y) == [1.0, 1.0]
    assert fitted.layout.yaxis.title.text == "FVU (lower is better)"
    assert "2 seeds" in topk.customdata[1][0]
    assert "\u00b1 0.071 (sd)" in topk.customdata[1][1]
    said = pareto_alt(points, kind_of("fvu"))
    assert said.startswith(
        "FVU against L0, lower is better: batchtopk 64 from 0.4 at 8.0 to 0.4 at 8.0; topk 64 from 0.5"
    )


def test_a_sweep_record_counts_only_for_the_dictionary_that_was_measured(tmp_path):
    folder = dictionary(tmp_path, "a", None)
    settings = json.loads((folder / "train.json").read_text())
    cell = {"settings": settings, "metrics": numbers(4, 0.3), "tokens_per_second": 7.0}
    (tmp_path / "run" / "sweep.json").write_text(json.dumps({"cells": {"a": cell, "gone": cell}}))
    (found,) = found_in(tmp_path)
    assert (found.readings["fvu"].value, found.tokens_per_second) == (0.3, 7.0)
    (folder / "train.json").write_text(json.dumps({**settings, "n_tokens": 2000}))
    assert found_in(tmp_path)[0].readings == {}


def test_the_same_seed_under_two_names_is_no_second_seed(tmp_path):
    for name in "ab":
        dictionary(tmp_path, name, numbers(4, 0.3))
    assert [point.n for point in points_of(found_in(tmp_path), "fvu")] == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "0.3", None, [1], 10**400])
def test_what_is_no_finite_number_is_not_there(tmp_path, value):
    dictionary(tmp_path, "a", numbers(4, value))
    assert list(found_in(tmp_path)[0].readings) == ["l0"]


# The page


def test_without_a_sweep_the_page_names_the_command(open_page, runs):
    shown = html_of(open_page("sweep"))
    assert f"sae sweep {runs}/demo grid.toml" in shown
    assert "4 left out" in shown


def test_without_runs_the_page_says_how_to_make_one(open_page, tmp_path):
    assert "<code>sae demo</code>" in html_of(open_page("sweep", root=tmp_path / "none"))


def test_a_run_that_is_not_there_is_said(open_page):
    assert "No such run" in html_of(open_page("sweep", run="../demo"))


def test_without_numbers_the_page_names_the_command(open_page, tmp_path):
    for name, k in (("a", 2), ("b", 4)):
        dictionary(tmp_path, name, None, k=k)
    assert f"sae eval {tmp_path}/run --all</code>" in html_of(open_page("sweep", root=tmp_path, run="run"))


def test_the_page_shows_the_metric_of_the_url_and_counts_what_lacks_it(open_page, root):
    app = open_page("sweep", root=root, run="run", metric="ce_score")
    assert app.selectbox(key="sweep_metric").value == "ce_score"
    assert len(app.get("plotly_chart")) == 1
    shown = html_of(app)
    assert "2 of 6 without CE score (c, d)" in shown
    assert f"sae eval {root}/run --all --metric splice" in shown
    assert "1 of 6 without L0 (d)" in shown
    table = app.dataframe[0].value
    assert list(table["seeds"]) == [1, 2, 1]
    assert list(table["CE score"]) == pytest.approx([0.5, 0.8, 0.95])
    assert table["sd"][1] == pytest.approx(0.1414, abs=1e-4)
    assert list(table["Pareto front"]) == ["", "yes", "yes"]
    app.selectbox(key="sweep_metric").select("fvu").run()
    assert app.query_params["metric"] in ("fvu", ["fvu"])
    assert "Controls off the axis: mean 1." in html_of(app)


def test_a_metric_that_nothing_has_is_said_with_its_command(open_page, root):
    shown = html_of(open_page("sweep", root=root, run="run", metric="truth.mcc"))
    assert "Fewer than two dictionaries have truth.mcc" in shown
    assert f"sae eval {root}/run --all --metric truth" in shown


def test_a_real_sweep_is_shown_without_another_command(open_page, tmp_path):
    run = planted_run(tmp_path / "run", planted_rows(2000, 16, 20, 3, signed=False)[0])
    grid = tmp_path / "grid.toml"
    grid.write_text(
        'base = {tokens = 640, batch = 64, d-sae = 32}\ngrid = {arch = ["topk", "jumprelu"], seed = [0, 1], k = [2]}'
    )
    sweep(run.path, grid)
    app = open_page("sweep", root=tmp_path, run="run")
    recorded = json.loads((run.path / "sweep.json").read_text())["cells"]
    means = {
        arch: [e["metrics"]["fvu"]["value"] for name, e in recorded.items() if arch in name]
        for arch in ("jumprelu", "topk")
    }
    assert list(app.dataframe[0].value["FVU"]) == pytest.approx([sum(each) / 2 for each in means.values()], rel=1e-3)
    (run.path / "sweep.json").write_text("{")
    assert "sweep.json cannot be read" in html_of(open_page("sweep", root=tmp_path, run="run"))


def test_hostile_files_are_text_on_the_page_and_in_the_figure(open_page, tmp_path):
    attack = "<img src=x onerror=alert(1)>\ud800"
    metrics = numbers(4, 0.3, **{attack: entry(1.0, attack, definition=attack, of=attack)})
    for seed in (0, 1):
        dictionary(tmp_path, f"a{seed}", metrics, seed=seed, architecture=attack, hook=attack, hooks=[attack, attack])
    (tmp_path / "run" / "dictionaries" / "bad").mkdir()
    (tmp_path / "run" / "dictionaries" / "bad" / "cfg.json").write_text("[]")
    (tmp_path / "run" / "dictionaries" / "bad" / "train.json").write_text("[" * 100_000)
    found = found_in(tmp_path)
    name = next(name for name in choices(found) if name.startswith("<img"))
    figure = pareto_figure(points_of(found, name), choices(found)[name])
    assert "<img" not in str(figure.to_dict())  # its JSON would hide the sign
    app = open_page("sweep", root=tmp_path, run="run", metric=name)
    assert app.selectbox(key="sweep_metric").value == name
    assert "<img" not in html_of(app)
    assert "1 left out" in html_of(app)
