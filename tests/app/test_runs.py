"""The listing shows what is there, says what is damaged, and is the only way from a name to a path."""

import json
from pathlib import Path

import pytest

from app.parts.overview import Counts, missing
from app.runs import find, list_runs


def test_runs_and_dictionaries_are_listed_by_name(runs: Path):
    listed = list_runs(runs)
    assert [run.name for run in listed] == ["demo", "young"]
    assert [d.name for d in listed[0].dictionaries] == ["bare", "empty", "full", "signed"]
    assert [d.has_store for d in listed[0].dictionaries] == [False, True, True, True]


def test_a_run_itself_may_be_given(runs: Path):
    assert [run.name for run in list_runs(runs / "demo")] == ["demo"]


def test_no_folder_is_no_runs(tmp_path: Path):
    assert list_runs(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["../full", "..", "/etc", "full/../full", "", ".", "full\0"])
def test_a_name_that_is_not_listed_finds_nothing(runs: Path, name: str):
    listed = list_runs(runs)
    assert find(listed, "demo", "full") is not None
    assert find(listed, "demo", name) is None
    assert find(listed, name, "full") is None


def test_a_dictionary_that_links_out_of_its_run_is_left_out(tmp_path: Path):
    outside, run = tmp_path / "secret", tmp_path / "runs" / "r"
    outside.mkdir()
    (outside / "cfg.json").write_text("{}")
    (run / "dictionaries").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "dictionaries" / "way_out").symlink_to(outside)
    assert list_runs(tmp_path / "runs")[0].dictionaries == []


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff", '{"a": ' * 100_000])
def test_a_damaged_run_is_listed_with_its_fault(tmp_path: Path, content: str):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    (run,) = list_runs(tmp_path)
    assert run.fault.startswith("run.json")


def test_the_next_command_names_the_dictionary(runs: Path):
    bare, _, full, _ = list_runs(runs)[0].dictionaries
    assert missing(bare, None) == [
        ("not evaluated", f"sae eval {bare.address}"),
        ("no feature store", f"sae index {bare.address}"),
    ]
    counts = Counts(features=70, alive=63, explained=3, scored=1, tokens=6000)
    assert ("60 features unexplained", f"sae label {full.address}") in missing(full, counts)


def test_figures_that_are_no_numbers_are_not_shown_as_such(tmp_path: Path):
    from app.parts.overview import figures

    folder = tmp_path / "r" / "dictionaries" / "d"
    folder.mkdir(parents=True)
    (tmp_path / "r" / "run.json").write_text("{}")
    (folder / "cfg.json").write_text(json.dumps({"architecture": ["x"], "d_sae": "many"}))
    (folder / "eval.json").write_text(
        json.dumps({"metrics": {"fvu": {"value": "<b>0</b>"}, "l0": True, "dead": {"value": True}}})
    )
    (dictionary,) = list_runs(tmp_path)[0].dictionaries
    shown = {name: value for name, value, _ in figures(dictionary, None)}
    assert shown["d_sae"] is shown["FVU"] is shown["L0"] is shown["dead"] is None


def test_further_metrics_are_grouped_by_what_measured_them(tmp_path: Path):
    from app.parts.overview import further, run_html

    folder = tmp_path / "r" / "dictionaries" / "d"
    folder.mkdir(parents=True)
    (tmp_path / "r" / "run.json").write_text("{}")
    (folder / "cfg.json").write_text("{}")
    metrics = {
        "geometry.nearest": {"row": "geometry", "value": 0.25, "lo": 0.2, "hi": 0.3, "n": 9, "definition": "<i>"},
        "fvu": {"value": "many"},
        "broken": 3,
        "<b>": {"row": ["x"], "value": 1},
    }
    (folder / "eval.json").write_text(json.dumps({"metrics": metrics}))
    (run,) = list_runs(tmp_path)
    groups = further(run.dictionaries[0])
    assert groups["geometry"] == [("nearest", "0.25", "<i>. 95 % interval 0.2 to 0.3. n = 9 .")]
    assert groups["metrics"][0][:2] == ("fvu", None)
    html = run_html(run, {})
    assert "All that was measured" in html
    assert "<b>" not in html
    assert "<i>" not in html


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architecture": "topk"}, "topk"),
        ({"architecture": "jumprelu", "trained_architecture": "batchtopk"}, "batchtopk"),
        ({}, "?"),
    ],
)
def test_a_dictionary_has_the_name_that_it_was_trained_under(tmp_path: Path, config: dict[str, str], name: str):
    folder = tmp_path / "r" / "dictionaries" / "d"
    folder.mkdir(parents=True)
    (tmp_path / "r" / "run.json").write_text("{}")
    (folder / "cfg.json").write_text(json.dumps(config))
    found = find(list_runs(tmp_path), "r", "d")
    assert found is not None
    assert found.architecture == name
