"""Neuronpedia's batches, out and in. The keys and their types are those of its tables (prisma/schema.prisma)."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from activations.errors import InputError
from autointerp import neuronpedia
from autointerp.neuronpedia import export
from autointerp.neuronpedia_import import LONGEST_TEXT, import_explanations, is_export
from data.store import Explanation, Store, StoreError, open_store
from tests.planted import planted_store

TEXTS = {0: "about <b>rivers</b>", 5: "gardens"}

NEURON = {
    "modelId": str, "layer": str, "index": str, "sourceSetName": str, "creatorId": str, "maxActApprox": float,
    "hasVector": bool, "vector": [float], "hookName": str, "topkCosSimIndices": [int], "topkCosSimValues": [float],
    "neuron_alignment_indices": [int], "neuron_alignment_values": [float], "neuron_alignment_l1": [float],
    "correlated_neurons_indices": [int], "correlated_neurons_pearson": [float], "correlated_neurons_l1": [float],
    "neg_str": [str], "neg_values": [float], "pos_str": [str], "pos_values": [float], "frac_nonzero": float,
    "freq_hist_data_bar_heights": [float], "freq_hist_data_bar_values": [float],
    "logits_hist_data_bar_heights": [float], "logits_hist_data_bar_values": [float], "decoder_weights_dist": [float],
}  # fmt: skip
ACTIVATION = {
    "id": str, "modelId": str, "layer": str, "index": str, "creatorId": str, "tokens": [str], "values": [float],
    "maxValue": float, "maxValueTokenIndex": int, "minValue": float, "dataSource": str, "dataIndex": str,
    "dfaValues": [float], "dfaMaxValue": float, "dfaTargetIndex": int, "binMin": float, "binMax": float,
    "binContains": float, "qualifyingTokenIndex": int,
}  # fmt: skip
EXPLANATION = {
    "id": str, "modelId": str, "layer": str, "index": str, "authorId": str, "description": str, "embedding": [float],
    "typeName": str, "explanationModelName": str, "notes": str,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one signed dictionary and its store."""
    folder = planted_store(tmp_path_factory.mktemp("run") / "demo" / "dictionaries" / "Planted", signed=True)
    with open_store(folder) as store:
        texts = [Explanation.new(feature=i, text=text, source="llm", model="gpt") for i, text in TEXTS.items()]
        store.add_explanations([*texts, Explanation.new(feature=5, text="not gardens", source="person", pole="-")])
    return folder


@pytest.fixture(scope="module")
def exported(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(made, tmp_path_factory.mktemp("out"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(planted_store(tmp_path / "fresh", n_documents=20)) as store:
        yield store


def rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def check(row: dict[str, Any], columns: dict[str, Any]) -> None:
    assert set(row) == set(columns)
    for key, kind in columns.items():
        values, of = (row[key], kind[0]) if isinstance(kind, list) and row[key] is not None else ([row[key]], kind)
        for value in values:
            fits = value is None or isinstance(value, of if of is not float else int | float)
            assert fits, (key, value)


def test_the_folder_is_that_of_the_bulk_import(exported):
    assert (exported.parent.name, exported.name) == ("planted", "0-planted")
    heads = {name: json.loads((exported / f"{name}.jsonl").read_text()) for name in ("release", "model", "sourceset")}
    source = json.loads((exported / "source.jsonl").read_text())
    assert heads["model"]["id"] == source["modelId"] == heads["sourceset"]["modelId"] == "planted"
    assert source["id"] == "0-planted"
    assert source["setName"] == heads["sourceset"]["name"] == "planted"
    assert heads["sourceset"]["releaseName"] == heads["release"]["name"]


def test_features_say_what_the_store_does(made, exported):
    found = rows(exported / "features" / "batch-0.jsonl.gz")
    assert [row["index"] for row in found] == [str(i) for i in range(36)]
    for row in found:
        check(row, NEURON)
        assert (row["modelId"], row["layer"], row["hookName"]) == ("planted", "0-planted", "blocks.0.hook_resid_post")
    with open_store(made) as store:
        feature = store.feature(3)
        row = found[3]
        assert row["frac_nonzero"] == feature.density
        assert row["maxActApprox"] == feature.max
        assert row["pos_str"] == [store.token_texts([each.id])[0] for each in feature.top_logits]
        assert row["neg_values"] == [each.value for each in feature.bottom_logits]
        assert row["topkCosSimIndices"] == [each.feature for each in feature.neighbours]
        assert row["freq_hist_data_bar_heights"] == feature.hist_counts
        low, high = feature.hist_edges[:2]
        assert row["freq_hist_data_bar_values"][0] == pytest.approx((low + high) / 2)
        assert len(row["logits_hist_data_bar_values"]) == len(row["logits_hist_data_bar_heights"]) == 40
    assert found[35]["freq_hist_data_bar_heights"] == []  # a dead one is there too


def test_examples_have_their_tokens_values_and_bins(made, exported):
    found = rows(exported / "activations" / "batch-0.jsonl.gz")
    assert len({row["id"] for row in found}) == len(found)
    for row in found:
        check(row, ACTIVATION)
        assert len(row["tokens"]) == len(row["values"]) <= 32
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert row["minValue"] == min(row["values"])
    with open_store(made) as store:
        examples = [each for each in store.examples(3) if each.kind in ("top", "interval")]
        mine = [row for row in found if row["index"] == "3"]
        assert len(mine) == len(examples)
        for row, example in zip(mine, examples, strict=True):
            assert row["values"] == example.acts
            assert row["tokens"] == store.token_texts(example.token_ids)
            peak = row["values"][row["qualifyingTokenIndex"]]
            assert peak == pytest.approx(example.peak)
            if example.kind == "top":
                assert (row["binMin"], row["binContains"]) == (-1.0, -1.0)
            else:
                assert row["binMin"] - 1e-3 <= peak <= row["binMax"] + 1e-3
                assert 0 <= row["binContains"] <= 1
        assert any(row["minValue"] < 0 for row in mine)  # the negative pole, with its sign
        intervals = {(row["binMin"], row["binMax"]): row["binContains"] for row in mine if row["binMin"] != -1}
        assert sum(intervals.values()) == pytest.approx(1.0, abs=0.2)


def test_explanations_come_back_as_they_were(exported, store):
    found = rows(exported / "explanations" / "batch-0.jsonl.gz")
    for row in found:
        check(row, EXPLANATION)
    assert is_export(exported)
    done = import_explanations(exported, store.folder)
    assert done == (3, 0, "planted/0-planted")
    back = {(e.feature, e.pole): e for e in store.explanations()}
    assert {key: (e.text, e.source, e.model) for key, e in back.items()} == {
        (0, "+"): (TEXTS[0], "llm", "gpt"),
        (5, "+"): (TEXTS[5], "llm", "gpt"),
        (5, "-"): ("not gardens", "person", ""),
    }
    assert all(e.explainer == "neuronpedia" and e.prompt_version == "planted/0-planted" for e in back.values())


def test_batches_hold_so_many_features_each(made, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "BATCH", 10)
    folder = export(made, tmp_path)
    sizes = [len(rows(folder / "features" / f"batch-{i}.jsonl.gz")) for i in range(4)]
    assert sizes == [10, 10, 10, 6]
    assert not (folder / "explanations" / "batch-1.jsonl.gz").exists()  # no line, no file
    with pytest.raises(InputError, match="is there already"):
        export(made, tmp_path)


def test_without_a_store_there_is_nothing_to_export(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "cfg.json").write_text("{}")
    with pytest.raises(StoreError, match="has no feature store yet"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Theirs, coming in

ROW = {"modelId": "gemma-2-2b", "layer": "12-gemmascope-res-16k", "index": "4", "authorId": "x"}
BY_MODEL = {"typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini"}


def batch(path: Path, *found: object) -> Path:
    text = "\n".join(json.dumps(row) for row in found) + "\n"
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["batch-0.jsonl", "batch-0.jsonl.gz"])
def test_a_models_and_a_persons_explanations_are_told_apart(tmp_path, store, name):
    path = batch(
        tmp_path / name,
        {**ROW, **BY_MODEL, "description": "dates  in\nletters\u0007", "embedding": [0.1, 0.2]},
        {**ROW, "index": 7, "description": "mine"},
        {**ROW, "index": "9", "description": None},
        {**ROW, "index": "9", "description": "  "},
    )
    assert import_explanations(path, store.folder) == (2, 2, "gemma-2-2b/12-gemmascope-res-16k")
    model, person = store.explanations()
    assert (model.feature, model.text, model.source) == (4, "dates in letters", "llm")
    assert (model.explainer, model.model) == ("neuronpedia oai_token-act-pair", "gpt-4o-mini")
    assert model.prompt_version == "gemma-2-2b/12-gemmascope-res-16k"
    assert (person.feature, person.source, person.explainer) == (7, "person", "neuronpedia")


def test_long_texts_are_cut_and_what_they_hold_stays_text(tmp_path, store):
    hostile = "<script>alert(1)</script>'; DROP TABLE explanations; --" + "x" * 5000
    import_explanations(batch(tmp_path / "batch-0.jsonl", {**ROW, **BY_MODEL, "description": hostile}), store.folder)
    (found,) = store.explanations()
    assert len(found.text) == LONGEST_TEXT
    assert found.text.startswith(hostile[:50])


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([{**ROW, "index": "36", "description": "x"}], "names feature 36, and .* has 36: it is of another dictionary"),
        ([{**ROW, "index": "-1", "description": "x"}], "has index '-1': expected the number of a feature"),
        ([{**ROW, "index": True, "description": "x"}], "has index 'True'"),
        ([{"description": "x"}], "has index 'None'"),
        ([[1, 2]], "line 1 of .* is no JSON object"),
        ([{**ROW, "description": "x"}, {**ROW, "layer": "13-y", "description": "x"}], "import one source at a time"),
        ([{**ROW, "description": "x" * 2**20}], "line 1 of .* is longer than 1,048,576 characters"),
    ],
)
def test_nothing_is_added_of_a_file_with_a_wrong_row(tmp_path, store, found, says):
    good = {**ROW, "index": "1", "description": "good"}
    path = batch(tmp_path / "batch-0.jsonl", *found, good) if found else tmp_path
    with pytest.raises(InputError, match=says) as error:
        import_explanations(path, store.folder)
    assert "\n" not in str(error.value)
    assert store.explanations() == []


def test_damaged_files_are_one_line(tmp_path, store):
    path = batch(tmp_path / "batch-0.jsonl.gz", {**ROW, "description": "x"})
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InputError, match="is damaged"):
        import_explanations(path, store.folder)
    (tmp_path / "batch-1.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="is damaged"):
        import_explanations(tmp_path / "batch-1.jsonl", store.folder)
    with pytest.raises(InputError, match="has no explanations: expected batch-N.jsonl"):
        import_explanations(tmp_path / "nothing", store.folder)
