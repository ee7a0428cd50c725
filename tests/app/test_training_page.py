"""The page of trainings: states, curves of thousands of lines, and nothing to show."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from activations.files import lock
from app import figures
from app.figures import Series
from app.parts.training import duration
from app.runs import list_runs
from app.trainings import POINTS, trainings
from tests.app.conftest import html_of
from tests.app.test_safety import ATTACKS, check

OpenPage = Callable[..., AppTest]


def line(step: int) -> dict[str, float]:
    figures = {"loss": 0.5, "fvu": 1 / step, "l0": 32.0, "n_dead": step // 100, "lr": 1e-3, "grad_norm": 0.3}
    return {"step": step, "tokens": step * 10, **figures}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run with a finished, a stopped and a running training; whoever asks for it holds the lock of the last."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text("{}")
    for name, steps in (("done", 100), ("broken-off", 40), ("going-on", 25)):
        folder = tmp_path / "r" / "dictionaries" / name
        folder.mkdir(parents=True)
        (folder / "train.json").write_text(json.dumps({"n_tokens": 1000, "sizes": {"d_sae": 50}}))
        (folder / "train.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in range(1, steps + 1)))
    (tmp_path / "r/dictionaries/done/cfg.json").write_text("{}")
    progress = {"n_tokens": 1000, "tokens_per_second": 1234.5, "seconds_left": 150.0}
    (tmp_path / "r/dictionaries/going-on/progress.json").write_text(json.dumps(progress))
    (tmp_path / "r/dictionaries/broken-off/progress.json").write_text(json.dumps(progress))
    return tmp_path


def test_each_training_has_its_state_and_the_stopped_one_the_command_that_goes_on(open_page: OpenPage, root: Path):
    with lock(root / "r/dictionaries/going-on/.train.lock"):
        app = open_page("training", root=root)
    html = html_of(app)
    assert "<b>finished</b> \u00b7 FVU 0.010 \u00b7 L0 32.0 \u00b7 dead 2.0%" in html
    assert f"<b>stopped</b> at 40%: <code>sae train {root}/r --name broken-off --resume</code>" in html
    assert "<b>training</b> 25% \u00b7 1,234 tokens/s \u00b7 2 min left \u00b7 FVU 0.040" in html
    assert len(app.get("plotly_chart")) == 5
    check(app)


def test_a_training_whose_process_died_is_stopped_whatever_its_files_say(open_page: OpenPage, root: Path):
    (root / "r/dictionaries/going-on/.train.lock").touch()
    assert "<b>training</b>" not in html_of(open_page("training", root=root))


def test_curves_are_of_the_chosen_dictionaries(open_page: OpenPage, root: Path):
    app = open_page("training", root=root)
    app.multiselect[0].set_value(["done"]).run()
    assert not app.exception
    drawn = [json.loads(chart.proto.spec)["data"] for chart in app.get("plotly_chart")]
    assert [[trace["name"] for trace in traces] for traces in drawn] == [["done"]] * 5
    assert html_of(app).count("swatch") == 1


def test_an_unknown_run_is_said(open_page: OpenPage, root: Path):
    assert "No such run" in html_of(open_page("training", root=root, run="../r"))


def test_a_run_with_activations_and_no_training_says_train(open_page: OpenPage, tmp_path: Path):
    run = tmp_path / "young" / "r"
    (run / "activations" / "h").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "activations" / "h" / "manifest.json").write_text("{}")
    html = html_of(open_page("training", root=run.parent))
    assert "Nothing has been trained here yet" in html
    assert f"<code>sae train {run} --arch topk</code>" in html


def test_thousands_of_lines_are_thinned_and_the_last_is_kept(root: Path):
    folder = root / "r/dictionaries/done"
    (folder / "train.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in range(1, 20_001)))
    (made,) = [each for each in trainings(list_runs(root)[0]) if each.name == "done"]
    assert POINTS / 2 < len(made.lines) <= POINTS + 1
    assert made.lines[-1]["step"] == 20_000
    assert made.lines[-1]["dead"] == 200 / 50


def test_what_is_damaged_or_hostile_is_left_out(open_page: OpenPage, root: Path, tmp_path: Path):
    folder = root / "r/dictionaries/<b>x"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps({"n_tokens": ATTACKS, "sizes": ATTACKS}))
    (folder / "progress.json").write_text(json.dumps({"n_tokens": 1e999, "tokens_per_second": ATTACKS[0]}))
    (folder / "train.jsonl").write_text('{"tokens": 10, "fvu": NaN, "l0": "<b>", "lr": 1}\n[1]\n{"tokens": 2')
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "train.json").write_text("{}")
    (root / "r/dictionaries/link").symlink_to(outside)
    text = check(open_page("training", root=root))
    assert "<b>x" in text
    assert "link" not in text


def test_a_chart_says_in_words_where_its_lines_begin_and_end():
    lines = [Series(name="a", colour=0, x=[1, 2], y=[0.5, 0.25]), Series(name="b", colour=9, x=[], y=[])]
    assert figures.curves_alt("FVU", lines, ".3g") == "FVU over tokens: a from 0.5 to 0.25."
    traces = figures.curves(lines, form=".3~g", log=True).data
    assert [trace.line.dash for trace in traces] == ["solid", "dash"]
    assert figures.curves(lines, form=".3~g", log=True).layout.yaxis.type == "log"


def test_durations_are_said_shortly():
    said = [duration(seconds) for seconds in (12, 89, 150, 7500, 273_600)]
    assert said == ["12 s", "89 s", "2 min", "2 h 05 min", "3 d 4 h"]
