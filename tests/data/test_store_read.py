"""Reading a store: the feature list, token texts, refusals. The store is planted, so every answer is known."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from data.store import Explanation, Store, StoreError, open_store
from data.store.read import token_texts
from tests.planted import VOCAB, WORDS, planted_store, word_id


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_store(tmp_path_factory.mktemp("run") / "demo" / "dictionaries" / "planted")


@pytest.fixture
def store(planted: Path, tmp_path: Path) -> Iterator[Store]:
    """A store of its own for each test, in a run named demo."""
    folder = tmp_path / "demo" / "dictionaries" / "planted"
    shutil.copytree(planted, folder)
    with open_store(folder) as store:
        yield store


def explain(store: Store, texts: dict[int, str]) -> None:
    store.add_explanations(
        [Explanation.new(feature=feature, text=text, source="person") for feature, text in texts.items()]
    )


def numbers(store: Store, **options: object) -> list[int]:
    return [row.feature for row in store.page(**options).rows]  # type: ignore[arg-type]


def test_the_list_pages_through_every_living_feature_once(store: Store) -> None:
    seen = [number for offset in range(0, 40, 10) for number in numbers(store, limit=10, offset=offset)]
    assert sorted(seen) == list(range(33))
    densities = [store.feature(number).density for number in seen]
    assert densities == sorted(densities, reverse=True)
    assert store.page(limit=10).total == store.page(limit=10, offset=500).total == 33
    assert store.page(alive_only=False).total == 36
    assert store.page(limit=0).rows == []


def test_the_list_sorts_both_ways_with_ties_by_number_and_missing_scores_last(store: Store) -> None:
    assert numbers(store, sort="feature", descending=False, limit=3) == [0, 1, 2]
    assert numbers(store, sort="feature", limit=3, alive_only=False) == [35, 34, 33]
    largest = [row.max for row in store.page(sort="max").rows]
    assert largest == sorted(largest, reverse=True)
    assert numbers(store, sort="score", limit=3) == [0, 1, 2]
    dead = numbers(store, sort="density", descending=False, alive_only=False, limit=3)
    assert dead == [33, 34, 35]


def test_density_bounds_are_inclusive(store: Store) -> None:
    density = store.feature(5).density
    assert 5 in numbers(store, min_density=density, max_density=density)
    assert 5 not in numbers(store, min_density=density * 1.0001)


def test_search_finds_texts_numbers_and_whole_tokens(store: Store) -> None:
    explain(store, {7: "Names of SOLDIERS in letters", 20: "dates"})
    assert numbers(store, search="soldiers in") == [7]
    assert numbers(store, search=" 12 ") == [12]
    word = WORDS[9]  # feature 9 and the one before it fire on it
    assert sorted(numbers(store, search=word.upper())) == [8, 9]
    assert numbers(store, search=word[:-1]) == []
    assert store.page(search="nowhere").total == 0
    assert numbers(store, search="34") == []
    assert numbers(store, search="34", alive_only=False) == [34]


def test_search_takes_every_character_as_itself(store: Store) -> None:
    texts = {
        1: "100% of sums",
        2: "snake_case",
        3: "'; DROP TABLE features; --",
        4: "back\\slash",
        5: 'quote " here',
        6: "<b>bold</b>",
    }
    explain(store, texts)
    for feature, text in texts.items():
        assert numbers(store, search=text) == [feature]
    assert numbers(store, search="%") == [1]
    assert numbers(store, search="_") == [2]
    assert numbers(store, search="'") == [3]
    assert numbers(store, search="\\") == [4]
    assert numbers(store, search="1%s") == []
    assert numbers(store, search="0' OR '1'='1") == []
    assert store.page().total == 33


def test_a_row_shows_the_tokens_of_both_poles_and_the_best_text(tmp_path: Path) -> None:
    with open_store(planted_store(tmp_path / "signed", n_features=20, signed=True)) as store:
        explain(store, {3: "soldiers"})
        (row,) = store.page(search="3").rows
        assert row.top_tokens == [f" {WORDS[3]}", f" {WORDS[4]}"]
        assert (row.explanation, row.source, row.score) == ("soldiers", "person", None)
        assert row.max > 0 > row.min
        assert {example.pole for example in store.examples(3)} == {"+", "-"}


def test_a_feature_page_holds_what_was_planted(store: Store) -> None:
    feature = store.feature(4)
    assert {token.id for token in feature.top_tokens} == {word_id(4), word_id(5)}
    assert all(token.share == 1.0 for token in feature.top_tokens)
    assert len(feature.neighbours) == len(feature.top_logits) == len(feature.bottom_logits) == 10
    assert sum(feature.logit_counts) == len(VOCAB)
    assert sum(feature.hist_counts) == feature.n_active
    examples = store.examples(4)
    assert {example.kind for example in examples} == {"top", "interval", "quantile", "random"}
    for example in examples:
        assert example.token_ids[example.peak_index] in (word_id(4), word_id(5))
        assert example.acts[example.peak_index] == example.peak == max(example.acts)
    assert {e.split for e in store.examples(4, split="score")} == {"score"}
    assert store.examples(4, pole="-") == []


def test_many_features_at_once_are_what_they_are_one_by_one(store: Store) -> None:
    wanted = [3, 34, 8]
    assert store.examples_of(wanted) == {number: store.examples(number) for number in (3, 8)}
    active = store.sample_active(wanted)
    assert set(active) == {3, 8}
    for split in ("explain", "score"):
        windows = store.sample(split)
        for number in (3, 8):
            on = store.background(number, 1000, split, 0, active=True)
            off = store.background(number, 1000, split, 0, active=False)
            assert sorted(w.window for w in on) == [window for window in active[number] if window in windows]
            assert {w.window for w in on} | {w.window for w in off} == set(windows)
            assert all(windows[w.window] == w.token_ids for w in [*on, *off])


def test_a_feature_that_is_not_there_is_one_line(store: Store) -> None:
    for call in (store.feature, store.examples):
        for number in (-1, 36):
            with pytest.raises(StoreError, match=rf"no feature {number}: expected 0 to 35"):
                call(number)
    with pytest.raises(StoreError, match="no feature 36"):
        store.background(36, 1, "score", 0, active=True)
    with pytest.raises(StoreError, match="sort='size'"):
        store.page(sort="size")
    with pytest.raises(StoreError, match="offset=-1"):
        store.page(offset=-1)


def test_a_character_spread_over_tokens_shows_on_the_first() -> None:
    vocab = [b" caf", b"\xc3", b"\xa9", b" \xf0\x9f", b"\x99", b"\x82!", b"\xff", b"", b"ok", b"\xe2\x82\xac\xe2"]
    assert token_texts(vocab, [0, 1, 2, 8]) == [" caf", "é", "", "ok"]
    assert token_texts(vocab, [3, 4, 5]) == [" 🙂", "", "!"]
    assert token_texts(vocab, [6, 8]) == ["\ufffd", "ok"]
    assert token_texts(vocab, [1]) == ["\ufffd"]
    assert token_texts(vocab, [1, 8]) == ["\ufffd", "ok"]
    assert token_texts(vocab, [2, 0]) == ["\ufffd", " caf"]
    assert token_texts(vocab, [1, 1, 2]) == ["\ufffd", "é", ""]
    assert token_texts(vocab, [1, 7, 2]) == ["é", "", ""]
    assert token_texts(vocab, [9, 5]) == ["€\ufffd", "\ufffd!"]
    assert token_texts(vocab, [99, -1]) == ["<99>", "<-1>"]
    assert token_texts(vocab, []) == []


def test_texts_of_valid_utf8_join_to_the_text_itself(store: Store) -> None:
    for example in store.examples(2):
        joined = b"".join(VOCAB[id] for id in example.token_ids)
        try:
            text = joined.decode()
        except UnicodeDecodeError:
            continue  # a window may begin or end inside a character
        assert "".join(store.token_texts(example.token_ids)) == text


def test_an_address_is_a_run_a_name_in_a_run_or_a_folder(store: Store, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    for address in (run, str(run), run / "planted", run / "dictionaries" / "planted"):
        with open_store(address) as found:
            assert found.folder == run / "dictionaries" / "planted"
    with pytest.raises(StoreError, match=r"no dictionary 'other', expected one of: .*demo/planted"):
        open_store(run / "other")
    shutil.copytree(store.folder, run / "dictionaries" / "second")
    with pytest.raises(StoreError, match=r"2 dictionaries, expected the name of one: .*demo/planted, .*demo/second"):
        open_store(run)
    with pytest.raises(StoreError, match="no run and no dictionary folder"):
        open_store(tmp_path / "nothing")


def test_a_missing_store_names_the_command(store: Store, tmp_path: Path) -> None:
    store.path.unlink()
    with pytest.raises(StoreError, match=rf"no feature store yet: build it with `sae index {tmp_path}/demo/planted`"):
        open_store(tmp_path / "demo")


@pytest.mark.parametrize("keep", [0, 1, 100, 4096, 0.3, 0.7, 0.99])
def test_a_cut_store_is_one_line_that_says_how_to_mend_it(store: Store, keep: float) -> None:
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[: int(keep * len(whole)) if keep not in (0, 1, 100, 4096) else int(keep)])
    with pytest.raises(StoreError, match=r"features.duckdb cannot be read .* `sae index .* --overwrite`") as error:
        _read_everything(store.folder)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_store_is_one_line(store: Store) -> None:
    store.close()
    store.path.write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match="cannot be read"):
        open_store(store.folder)
    store.path.unlink()
    duckdb.connect(str(store.path)).close()
    with pytest.raises(StoreError, match="cannot be read"):
        open_store(store.folder)


def _read_everything(folder: Path) -> None:
    with open_store(folder) as store:
        for number in range(store.n_features):
            store.feature(number)
            store.examples(number)
            store.background(number, 1000, "score", 0, active=True)
        assert store.vocab


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("UPDATE meta SET value = '3' WHERE key = 'schema'", "newer version"),
        ("UPDATE meta SET value = '0' WHERE key = 'schema'", "schema 0 is too old"),
        ("DROP TABLE profiles", "no column profiles"),
        ("UPDATE meta SET value = 'x' WHERE key = 'schema'", "schema version is 'x'"),
        ("DELETE FROM meta WHERE key = 'schema'", "schema version is ''"),
        ("ALTER TABLE examples DROP COLUMN peak", "no column examples.peak"),
        ("CREATE VIEW trap AS SELECT 1", "view 'trap'"),
    ],
)
def test_a_store_of_another_kind_is_refused(store: Store, change: str, reason: str) -> None:
    store.close()
    with duckdb.connect(str(store.path)) as connection:
        connection.execute(change)
    with pytest.raises(StoreError, match=reason):
        open_store(store.folder)


def test_nothing_in_a_store_reaches_the_disk(store: Store, tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    for query in (
        f"SELECT * FROM read_text('{secret}')",
        f"FROM '{secret}'",
        f"COPY (SELECT 1) TO '{tmp_path}/out.csv'",
        f"ATTACH '{tmp_path}/new.duckdb'",
        f"SELECT * FROM read_text('{store.folder}/cfg.json')",
        "SET enable_external_access = true",
        "DELETE FROM store.features",
    ):
        with pytest.raises(StoreError):
            store.query(query)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "secret.csv"]
    assert store.summary().n_features == 36


def test_many_threads_read_one_store(store: Store) -> None:
    expected = {number: (store.feature(number), store.examples(number)) for number in range(36)}
    wrong: list[object] = []

    def work(start: int) -> None:
        for step in range(40):
            number = (start * 7 + step) % 36
            try:
                if (store.feature(number), store.examples(number)) != expected[number]:
                    wrong.append(number)
            except Exception as error:  # noqa: BLE001  # a thread's error must reach the test
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
