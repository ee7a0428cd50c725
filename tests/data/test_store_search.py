"""Searching a store: words, tokens, filters and windows on planted features, and texts that are meant to do harm."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pytest

from data.store import Explanation, Filters, Score, Store, StoreError, open_store
from data.store.search import facts_of, label_texts, labelled, on_token, together, with_words
from tests.planted import WORDS, planted_store, word_id

N, N_ALIVE = 36, 33
ATTACKS = [
    "%",
    "_",
    "%%%",
    "*",
    ".*",
    "(",
    "[a",
    "\\",
    "\\pL",
    "$1",
    "$source",
    "?",
    "'",
    '"',
    "''",
    "';",
    "' OR '1'='1",
    "'; DROP TABLE explanations; --",
    "'); DELETE FROM store.features; --",
    "' UNION SELECT key, value FROM store.meta --",
    "/* */",
    "\x00",
    "a\x00b",
    "\x1b[31m",
    "\u202e",
    "\U0001f600",
    "x" * 100_000,
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_store(tmp_path_factory.mktemp("run") / "demo" / "dictionaries" / "planted", n_features=N)


@pytest.fixture
def store(planted: Path, tmp_path: Path) -> Iterator[Store]:
    folder = tmp_path / "demo" / "dictionaries" / "planted"
    shutil.copytree(planted, folder)
    with open_store(folder) as store:
        yield store


def explain(store: Store, texts: dict[int, str], source: str = "person", score: float | None = None) -> None:
    said = [Explanation.new(feature=feature, text=text, source=source) for feature, text in texts.items()]
    store.add_explanations(said)
    if score is not None:
        store.add_scores([scored(each, score) for each in said])


def scored(explanation: Explanation, value: float) -> Score:
    return Score(
        explanation_id=explanation.id,
        feature=explanation.feature,
        scorer="detection",
        value=value,
        lo=value,
        hi=value,
        n=10,
        chance=0.5,
        control=None,
        failures=0,
        cost_tokens=0,
        created=explanation.created,
        model="",
    )


def words(store: Store, *asked: str, **filters: object) -> list[int]:
    hits, total = with_words(store, asked, Filters(**filters))  # type: ignore[arg-type]
    assert total == len(hits)
    return [facts.feature for facts, _ in hits]


# Words


def test_every_word_has_to_begin_a_word_of_the_label_in_any_case_and_order(store: Store) -> None:
    explain(store, {1: "Names of Rivers", 2: "river banks", 3: "upriver names", 4: "RIVERSIDE, names"})
    assert words(store, "river") == [2, 1, 4]  # 2 has it as a whole word; the shorter of the others
    assert words(store, "NAMES", "riv") == [1, 4]
    assert words(store, "names", "zebra") == []
    assert words(store, "iver") == []


def test_words_of_other_alphabets_and_signs_are_found(store: Store) -> None:
    explain(store, {1: "Überschriften", 2: "Цвета", 3: "C++ code", 4: "100% of “ the”", 5: "数字"})
    assert words(store, "über") == [1]
    assert words(store, "ЦВЕТ") == [2]
    assert words(store, "c++") == [3]
    assert words(store, "%") == [4]
    assert words(store, "“") == [4]
    assert words(store, "数") == [5]


def test_whole_words_best_labels_and_scores_come_first(store: Store) -> None:
    explain(store, {1: "ships", 2: "ship"}, source="lexical")
    explain(store, {3: "a ship at sea"}, source="lexical", score=0.9)
    explain(store, {4: "a ship"}, source="lexical", score=0.95)
    explain(store, {4: "another thing"})  # the best of feature 4
    hits, total = with_words(store, ["ship"])
    assert [(facts.feature, whole) for facts, whole in hits] == [(3, 1), (2, 1), (4, 1), (1, 0)]
    assert total == 4
    assert hits[2][0].label == "a ship"
    assert [facts.feature for facts, _ in with_words(store, ["ship"], limit=1)[0]] == [3]
    assert with_words(store, ["ship"], limit=1)[1] == 4


def test_a_feature_is_found_once_by_its_best_fitting_label(store: Store) -> None:
    explain(store, {5: "red ships"})
    explain(store, {5: "red ship"}, source="lexical")
    ((facts, whole),), total = with_words(store, ["red", "ship"])
    assert (facts.label, facts.source, whole, total) == ("red ship", "lexical", 2, 1)


# Texts that are meant to do harm


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_does_harm_or_finds_what_does_not_hold_it(store: Store, attack: str) -> None:
    explain(store, {1: "plain label", 2: f"holds {attack} inside"})
    before = (store.summary(), store.meta, len(label_texts(store)))
    assert words(store, attack) == [2]
    assert words(store, "plain", attack) == []
    assert store.ids_of(attack) == []
    assert labelled(store, [attack]) == {}
    assert facts_of(store, [1, 2])[2].label == f"holds {attack} inside"
    assert before == (store.summary(), store.meta, len(label_texts(store)))


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_filter_takes_a_text_for_sql(store: Store, attack: str) -> None:
    for name in ("source", "state"):
        with pytest.raises(StoreError, match="expected one of"):
            Filters(**{name: attack})  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="expected one of"):
        on_token(store, [1], order=attack)


# Tokens


def test_a_token_finds_the_feature_that_is_about_it_first(store: Store) -> None:
    """Feature i fires on word i, four times as strongly as on word i + 1."""
    for i in (4, 11):
        hits, total = on_token(store, [word_id(i)])
        assert {hit.facts.feature for hit in hits} == {i - 1, i}
        assert total == 2
        by_value, _ = on_token(store, [word_id(i)], order="value")
        assert [hit.facts.feature for hit in by_value] == [i, i - 1]
        feature = store.feature(i)
        (hit,) = [hit for hit in hits if hit.facts.feature == i]
        (known,) = [token for token in feature.top_tokens if token.id == word_id(i)]
        assert (hit.id, hit.n, hit.of_token, hit.mean) == (known.id, known.n, known.share, pytest.approx(known.mean))
        assert hit.of_firings == known.n / feature.n_active
        assert hit.of_max == pytest.approx(known.mean / feature.max)
        shares = [hit.of_firings for hit in hits]
        assert shares == sorted(shares, reverse=True)


def test_spellings_of_a_token_count_together(store: Store) -> None:
    hits, _ = on_token(store, [word_id(4), word_id(5)])
    (hit,) = [hit for hit in hits if hit.facts.feature == 4]
    tokens = {token.id: token for token in store.feature(4).top_tokens}
    both = [tokens[word_id(4)], tokens[word_id(5)]]
    assert hit.n == sum(token.n for token in both)
    assert hit.of_firings == 1.0
    assert hit.mean == pytest.approx(sum(token.n * token.mean for token in both) / hit.n)
    assert hit.of_token == pytest.approx(hit.n / sum(token.n / token.share for token in both))
    assert hit.id == max(both, key=lambda token: token.n).id


def test_a_negative_pole_is_found_by_its_tokens_too(tmp_path: Path) -> None:
    with open_store(planted_store(tmp_path / "d", n_features=12, signed=True)) as store:
        hits, _ = on_token(store, [word_id(6)], order="value")
        means = {hit.facts.feature: hit.mean for hit in hits}
        assert means[6] > 0 > means[5]
        assert {hit.facts.feature: hit.of_max for hit in hits}[5] == pytest.approx(means[5] / store.feature(5).min)


def test_no_token_finds_nothing(store: Store) -> None:
    assert on_token(store, []) == ([], 0)
    assert on_token(store, [len(WORDS) + 10_000]) == ([], 0)


# Filters


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [3, 4, 35]),
        ({"state": "alive"}, [3, 4]),
        ({"state": "dead"}, [35]),
        ({"min_density": 1e-9}, [3, 4]),
        ({"max_density": 0.0}, [35]),
        ({"source": "person"}, [3]),
        ({"source": "lexical"}, [3, 4]),
        ({"min_score": 0.75}, [4]),
        ({"max_score": 0.75}, [3]),
        ({"min_score": 0.0}, [3, 4]),
        ({"cluster": 0}, []),  # the planted store has none
    ],
)
def test_filters_keep_what_they_say(store: Store, filters: dict[str, object], expected: list[int]) -> None:
    explain(store, {3: "by a person"})
    explain(store, {3: "by rules"}, source="lexical", score=0.7)
    explain(store, {4: "by rules"}, source="lexical", score=0.8)
    only = Filters(**filters)  # type: ignore[arg-type]
    assert sorted(facts_of(store, [3, 4, 35], only)) == expected
    found = {hit.facts.feature for word in (3, 4, 5) for hit in on_token(store, [word_id(word)], only)[0]}
    assert found & {3, 4, 35} == set(expected) - {35}
    assert set(words(store, "by", **filters)) == set(expected) - {35}


def test_the_label_is_the_best_that_passes(store: Store) -> None:
    explain(store, {3: "by a person"})
    explain(store, {3: "by rules"}, source="lexical", score=0.7)
    assert facts_of(store, [3])[3].label == "by a person"
    lexical = facts_of(store, [3], Filters(source="lexical"))[3]
    assert (lexical.label, lexical.source, lexical.score) == ("by rules", "lexical", 0.7)


# Windows


def test_features_of_common_windows_are_counted_as_by_hand(store: Store) -> None:
    on = np.zeros((store.n_features, 0), bool)
    ((n,),) = store.query("SELECT count(*) FROM store.windows")
    on = np.zeros((store.n_features, n), bool)
    for feature, window in store.query('SELECT feature, "window" FROM store.window_peaks'):
        on[feature, window] = True
    pairs, counted = together(store, 4)
    assert counted == n
    both = {j: int((on[4] & on[j]).sum()) for j in range(N) if j != 4}
    assert {pair.feature: pair.n for pair in pairs} == {j: count for j, count in both.items() if count >= 5}
    assert len(pairs) > 3
    for pair in pairs:
        either = (on[4] | on[pair.feature]).sum()
        assert pair.jaccard == pytest.approx(both[pair.feature] / either)
        assert pair.phi == pytest.approx(np.corrcoef(on[4], on[pair.feature])[0, 1])


def test_the_state_changes_with_the_labels_and_only_then(store: Store) -> None:
    before = store.state
    assert store.state == before
    explain(store, {1: "new"})
    assert store.state != before


def test_a_store_without_profiles_is_searched_by_what_it_has(planted: Path, tmp_path: Path) -> None:
    shutil.copytree(planted, tmp_path / "old")
    with duckdb.connect(str(tmp_path / "old" / "features.duckdb")) as connection:
        connection.execute("DROP TABLE profiles")
        connection.execute("DROP TABLE positions")
        connection.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")
    with open_store(planted) as new, open_store(tmp_path / "old") as old:
        assert on_token(old, [word_id(4)]) == on_token(new, [word_id(4)])
        assert facts_of(old, [4]) == facts_of(new, [4])
        assert together(old, 4) == together(new, 4)
