"""Explanations and scores: which one is valid, which one is best, and what happens to their Parquet parts."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.store import DETECTION, Explanation, Score, Store, StoreError, open_store
from data.store.parts import MAX_PARTS
from tests.planted import planted_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(planted_store(tmp_path / "planted", n_features=20, n_documents=40)) as store:
        yield store


def explanation(feature: int, text: str, source: str, **more: str) -> Explanation:
    return Explanation.new(feature=feature, text=text, source=source, **more)


def score(of: Explanation, value: float, scorer: str = DETECTION) -> Score:
    return Score(
        explanation_id=of.id,
        feature=of.feature,
        scorer=scorer,
        value=value,
        lo=value - 0.1,
        hi=value + 0.1,
        n=40,
        chance=0.5,
        control=None,
        failures=0,
        cost_tokens=10,
        created="2026-01-01T00:00:00+00:00",
        model="judge",
    )


def shown(store: Store, feature: int) -> str | None:
    (row,) = store.page(sort="feature", descending=False, limit=1, offset=feature, alive_only=False).rows
    best = store.feature(feature).explanation
    assert row.explanation == (best.text if best else None)
    return row.explanation


def parts(store: Store) -> list[Path]:
    return sorted((store.folder / "explanations").glob("*.parquet"))


def test_there_are_none_at_first(store: Store) -> None:
    assert (store.explanations(), store.scores(), store.warnings) == ([], [], [])
    assert shown(store, 3) is None
    store.add_explanations([])
    assert parts(store) == []


def test_what_is_added_comes_back_whole_and_is_counted(store: Store) -> None:
    text = 'a "b" <i>\n\u00e9 \U0001f642'
    row = explanation(4, text, "llm", pole="both", explainer="max", model="m", prompt_version="1")
    store.add_explanations([row])
    store.add_scores([score(row, 0.75), score(row, 0.1, "fuzzing")])
    feature = store.feature(4)
    assert feature.explanations == [row]
    assert {s.scorer: s.value for s in feature.scores} == {DETECTION: 0.75, "fuzzing": 0.1}
    assert feature.scores[0].control is None
    assert store.scores([4]) == feature.scores
    assert store.explanations([5]) == []
    assert (store.summary().n_explained, store.summary().n_scored) == (1, 1)
    (listed,) = store.page(source="llm").rows
    assert (listed.feature, listed.explanation, listed.score) == (4, text, 0.75)
    assert store.page(min_score=0.75).total == 1
    assert store.page(min_score=0.76).total == 0
    assert store.page(source="person").total == 0


def test_the_newest_row_of_a_key_is_valid_and_an_empty_text_withdraws_it(store: Store) -> None:
    first = explanation(1, "first", "person")
    store.add_explanations([first])
    store.add_explanations([explanation(1, "second", "person")])
    assert [e.text for e in store.explanations()] == ["second"]
    store.add_explanations([first])  # older by its date, though written later
    assert shown(store, 1) == "second"
    store.add_explanations([explanation(1, "", "person")])
    assert shown(store, 1) is None
    assert store.summary().n_explained == 0
    store.add_explanations([replace(first, created="2999-01-01T00:00:00+00:00")])
    assert shown(store, 1) == "first"


def test_rows_of_one_moment_are_valid_in_the_order_of_writing(store: Store) -> None:
    one = explanation(1, "one", "person")
    two = replace(explanation(1, "two", "person"), created=one.created)
    store.add_explanations([one, two])
    assert shown(store, 1) == "two"
    store.add_explanations([one])
    assert shown(store, 1) == "one"


def test_a_person_goes_before_a_model_and_a_model_before_the_lexical(store: Store) -> None:
    store.add_explanations([explanation(1, "lexical", "lexical")])
    assert shown(store, 1) == "lexical"
    store.add_explanations([explanation(1, "model", "llm")])
    assert shown(store, 1) == "model"
    store.add_explanations([explanation(1, "person", "person")])
    assert shown(store, 1) == "person"


@pytest.mark.parametrize(
    ("model", "lexical", "winner"),
    [
        (0.8, 0.7, "model"),
        (0.7, 0.7, "lexical"),
        (0.6, 0.7, "lexical"),
        (None, 0.7, "lexical"),
        (0.6, None, "model"),
        (None, None, "model"),
    ],
)
def test_a_model_has_to_beat_the_lexical_score(
    store: Store, model: float | None, lexical: float | None, winner: str
) -> None:
    rows = {"model": explanation(2, "model", "llm"), "lexical": explanation(2, "lexical", "lexical")}
    store.add_explanations(list(rows.values()))
    given = [score(rows[name], value) for name, value in (("model", model), ("lexical", lexical)) if value is not None]
    store.add_scores([*given, score(rows["lexical"], 0.99, "another scorer")])
    assert shown(store, 2) == winner


def test_of_two_models_the_better_scored_one_is_shown_and_a_score_belongs_to_its_text(store: Store) -> None:
    a, b = explanation(2, "a", "llm", model="a"), explanation(2, "b", "llm", model="b")
    store.add_explanations([a, b])
    store.add_scores([score(a, 0.9), score(b, 0.8)])
    assert shown(store, 2) == "a"
    store.add_explanations([explanation(2, "a, said anew", "llm", model="a")])
    assert shown(store, 2) == "b"
    store.add_scores([replace(score(b, 0.2), created="2027-01-01T00:00:00+00:00")])
    assert [s.value for s in store.scores([2]) if s.explanation_id == b.id] == [0.2]


def test_rows_that_cannot_be_are_refused_and_nothing_is_written(store: Store) -> None:
    good = explanation(1, "good", "person")
    for bad, reason in (
        (replace(good, feature=20), "feature 20 is out of range: expected 0 to 19"),
        (replace(good, feature=-1), "feature -1"),
        (replace(good, pole="up"), "pole 'up'"),
        (replace(good, source="rumour"), "source 'rumour'"),
        (replace(good, id=""), "without id"),
    ):
        with pytest.raises(StoreError, match=reason):
            store.add_explanations([good, bad])
    with pytest.raises(StoreError, match="value=nan"):
        store.add_scores([score(good, float("nan"))])
    assert parts(store) == []


def test_a_full_disk_is_one_line_and_leaves_no_part(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(StoreError, match=r"explanations cannot be written .*No space left"):
        store.add_explanations([explanation(1, "text", "person")])
    assert list((store.folder / "explanations").iterdir()) == []
    assert store.explanations() == []


def test_another_store_object_sees_what_was_added_after_it_was_opened(store: Store) -> None:
    with open_store(store.folder) as other:
        assert shown(other, 3) is None
        store.add_explanations([explanation(3, "news", "person")])
        assert shown(other, 3) == "news"


def test_many_parts_become_one_and_no_valid_row_is_lost(store: Store) -> None:
    with open_store(store.folder) as other:
        for turn in range(MAX_PARTS + 3):
            store.add_explanations([explanation(turn % 20, f"turn {turn}", "person")])
            assert shown(other, turn % 20) == f"turn {turn}"
        assert len(parts(store)) == 3
        expected = [f"turn {turn if turn > 14 else turn + 20}" for turn in range(20)]
        assert [e.text for e in other.explanations()] == expected
    with open_store(store.folder) as fresh:
        assert [e.text for e in fresh.explanations()] == expected


def test_a_damaged_part_is_named_and_costs_its_own_rows_only(store: Store) -> None:
    for feature in range(3):
        store.add_explanations([explanation(feature, f"text {feature} " + "long enough to be stored " * 20, "person")])
    part = parts(store)[1]
    whole = part.read_bytes()
    middle = pq.ParquetFile(part).metadata.row_group(0).column(3).data_page_offset + 20
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for bad in (b"", b"PAR1", whole[:-9], whole[: len(whole) // 2], flipped, b"no parquet at all" * 100):
        part.write_bytes(bad)
        assert [e.feature for e in store.explanations()] == [0, 2]
        (warning,) = store.warnings
        assert str(part) in warning
        assert "\n" not in warning
    part.write_bytes(whole)
    assert [e.feature for e in store.explanations()] == [0, 1, 2]
    assert store.warnings == []


def test_no_flipped_bit_changes_a_text_silently(store: Store) -> None:
    text = np.random.default_rng(0).bytes(300).hex()
    store.add_explanations([explanation(1, text, "person")])
    (part,) = parts(store)
    whole = part.read_bytes()
    missing = 0
    for place in range(4, len(whole), 29):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        os.utime(part, ns=(place, place))
        found = [e.text for e in store.explanations()]
        assert found in ([text], []), place
        assert (found == []) == (store.warnings != [])
        missing += found == []
    assert missing > 20


def test_a_part_with_text_that_is_no_utf8_is_damaged(store: Store) -> None:
    store.add_explanations([explanation(1, "fine", "person")])
    table = pq.read_table(parts(store)[0])
    bad = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    place = table.schema.get_field_index("text")
    pq.write_table(table.set_column(place, "text", bad), store.folder / "explanations" / "part-x.parquet")
    assert [e.text for e in store.explanations()] == ["fine"]
    assert "part-x.parquet" in store.warnings[0]


def test_a_part_with_other_columns_is_damaged_too(store: Store) -> None:
    store.add_explanations([explanation(1, "fine", "person")])
    table = pq.read_table(parts(store)[0])
    pq.write_table(table.drop_columns(["text"]), store.folder / "explanations" / "part-x.parquet")
    assert [e.text for e in store.explanations()] == ["fine"]
    assert "part-x.parquet" in store.warnings[0]
    pq.write_table(table.append_column("extra", table["text"]), store.folder / "explanations" / "part-x.parquet")
    assert store.warnings == []


def test_joining_leaves_a_damaged_part_where_it_is(store: Store) -> None:
    store.add_explanations([explanation(0, "kept", "person")])
    bad = parts(store)[0].with_name("part-0.parquet")
    bad.write_bytes(b"damaged")
    for turn in range(MAX_PARTS):
        store.add_explanations([explanation(1, f"turn {turn}", "person")])
    assert len(parts(store)) < MAX_PARTS
    assert bad.read_bytes() == b"damaged"
    assert [e.text for e in store.explanations()] == ["kept", f"turn {MAX_PARTS - 1}"]


def test_files_that_are_no_parts_are_left_alone(store: Store) -> None:
    store.add_explanations([explanation(0, "kept", "person")])
    for name in (".part-1.parquet.7.writing", "notes.txt", "other.parquet"):
        (store.folder / "explanations" / name).write_bytes(b"x")
    assert [e.text for e in store.explanations()] == ["kept"]
    assert store.warnings == []
