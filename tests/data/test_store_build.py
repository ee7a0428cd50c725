"""What a build computes, against numbers worked out by hand: windows of 4 tokens, contexts of 8."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.store import BuildOptions, Store, StoreError, build_store, open_store
from data.store.schema import TABLES
from tests.planted import VOCAB, planted_codes, planted_text

Code = tuple[int, int, float]
Build = Callable[..., Store]


def side(doc: int) -> str:
    """The split of a document: half of MD5, for ever the same."""
    half = int.from_bytes(hashlib.md5(f"split {doc}".encode()).digest()[8:], "little")
    return "explain" if half % 2 == 0 else "score"


EXPLAIN = [doc for doc in range(100) if side(doc) == "explain"]
SCORE = [doc for doc in range(100) if side(doc) == "score"]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """build(docs, codes, n_features): a store over one token a row; token id = row % 5, position 0 is not ordinary."""

    def make(docs: Sequence[int], codes: Sequence[Code], n_features: int, **options: int) -> Store:
        rows = np.arange(len(docs))
        tokens = {
            "row": rows,
            "id": (rows % 5).astype(np.int32),
            "doc": np.array(docs, dtype=np.int32),
            "position": (rows % 8).astype(np.int32),
            "ordinary": rows % 8 != 0,
        }
        pq.write_table(pa.table(tokens), tmp_path / "tokens.parquet")
        fired = {
            "row": pa.array([row for row, _, _ in codes], pa.int64()),
            "feature": pa.array([feature for _, feature, _ in codes], pa.int32()),
            "value": pa.array([value for _, _, value in codes], pa.float32()),
        }
        pq.write_table(pa.table(fired), tmp_path / "codes.parquet")
        target = build_store(
            tmp_path / "features.duckdb",
            codes=[tmp_path / "codes.parquet"],
            tokens=[tmp_path / "tokens.parquet"],
            n_features=n_features,
            vocab=[b"a", b"b", b"c", b"d", b"e"],
            meta={"model": "none", "created": "then"},
            options=BuildOptions(memory="256MiB", threads=2, **{"window": 4, **options}),
        )
        return open_store(target.parent)

    return make


def one_window_a_document(docs: Sequence[int]) -> list[int]:
    """Document of each row when every document is one window of 4 tokens."""
    return [doc for doc in docs for _ in range(4)]


def test_density_quantiles_and_mean_are_over_ordinary_tokens_and_nonzero_values(build: Build) -> None:
    codes = [(1, 0, 1.0), (2, 0, 2.0), (3, 0, 3.0), (4, 0, 4.0), (5, 0, 0.0)]
    feature = build([EXPLAIN[0]] * 16, codes, 1).feature(0)
    assert feature.n_active == 4
    assert feature.density == 4 / 14  # 16 tokens, two of them at position 0
    assert (feature.max, feature.min, feature.mean) == (4.0, 0.0, 2.5)
    assert (feature.q10, feature.q50, feature.q90) == pytest.approx((1.3, 2.5, 3.7))


def test_the_histogram_spans_zero_to_the_maximum_and_the_last_bar_holds_it(build: Build) -> None:
    codes = [(1, 0, 1.0), (2, 0, 2.0), (3, 0, 3.0), (4, 0, 4.0)]
    feature = build([EXPLAIN[0]] * 8, codes, 1, bins=4).feature(0)
    assert feature.hist_edges == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert feature.hist_counts == [0, 1, 1, 2]


def test_a_signed_feature_keeps_its_signs_and_has_two_poles(build: Build) -> None:
    codes = [(1, 0, -2.0), (2, 0, 2.0), (3, 0, 1.0), (5, 0, -1.0)]
    store = build([EXPLAIN[0]] * 8, codes, 1, bins=4)
    feature = store.feature(0)
    assert (feature.max, feature.min, feature.mean) == (2.0, -2.0, 0.0)
    assert feature.hist_edges == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert feature.hist_counts == [1, 1, 0, 2]
    assert [(t.id, t.n, t.mean) for t in feature.top_tokens] == [(2, 1, 2.0), (3, 1, 1.0)]
    assert [(t.id, t.n, t.mean) for t in feature.bottom_tokens] == [(1, 1, -2.0), (0, 1, -1.0)]
    tops = {(e.pole, e.start): e for e in store.examples(0) if e.kind == "top"}
    assert set(tops) == {("+", 0), ("-", 0), ("-", 4)}
    assert tops["+", 0].acts == tops["-", 0].acts == [0.0, -2.0, 2.0, 1.0]
    assert (tops["+", 0].peak, tops["+", 0].peak_index) == (2.0, 2)
    assert (tops["-", 0].peak, tops["-", 0].peak_index) == (-2.0, 1)
    assert (tops["-", 0].band, tops["-", 4].band) == (3, 2)  # |-2| and |-1| of at most |-2|, in fourths


def test_a_feature_that_never_fires_has_a_row(build: Build) -> None:
    store = build([EXPLAIN[0]] * 8, [(1, 1, 1.0)], 3)
    dead = store.feature(2)
    assert (dead.alive, dead.n_active, dead.density, dead.max, dead.min) == (False, 0, 0.0, 0.0, 0.0)
    assert (dead.mean, dead.q50, dead.hist_edges, dead.hist_counts, dead.top_tokens) == (None, None, [], [], [])
    assert store.examples(2) == []
    assert store.summary().n_features == 3
    assert store.summary().n_alive == 1


def test_a_store_without_any_firing_is_a_store(build: Build) -> None:
    store = build([EXPLAIN[0]] * 8, [], 2)
    assert store.summary().n_alive == 0
    assert store.page().total == 0
    assert store.page(alive_only=False).total == 2
    assert len(store.background(0, 5, "explain", 0, active=False)) == 2


def test_top_tokens_count_firings_as_a_share_of_the_tokens_own_occurrences(build: Build) -> None:
    # Ids are 0 1 2 3 4 0 1 2 3 4 0 ...; rows 0 and 8 are not ordinary, so token 3 occurs in rows 3 and 13 only.
    codes = [(3, 0, 1.0), (13, 0, 3.0), (1, 0, 9.0)]
    tokens = build([EXPLAIN[0]] * 16, codes, 1).feature(0).top_tokens
    assert [(t.id, t.n) for t in tokens] == [(3, 2), (1, 1)]
    assert tokens[0].share == 1.0
    assert tokens[0].mean == 2.0
    assert tokens[1].share == pytest.approx(1 / 3)  # rows 1, 6, 11


def test_top_examples_come_largest_first_and_each_split_has_its_own_best(build: Build) -> None:
    docs = EXPLAIN[:10] + SCORE[:2]  # peaks 12, 11, ... 3 in the explain documents, 2 and 1 in the others
    codes = [(4 * place + 1, 0, 12.0 - place) for place in range(12)]
    store = build(one_window_a_document(docs), codes, 1, top=4)
    tops = [e for e in store.examples(0) if e.kind == "top"]
    assert [(e.rank, e.peak) for e in tops] == [(0, 12.0), (1, 11.0), (2, 10.0), (3, 9.0), (4, 2.0), (5, 1.0)]
    assert [e.split for e in tops] == ["explain"] * 4 + ["score"] * 2
    assert tops[0].token_ids == [0, 1, 2, 3]
    assert tops[0].acts == [0.0, 12.0, 0.0, 0.0]


def test_a_document_gives_one_top_example_while_there_are_others(build: Build) -> None:
    docs = [doc for doc in EXPLAIN[:3] for _ in range(8)]
    codes = [(1, 0, 10.0), (5, 0, 9.0), (9, 0, 8.0), (13, 0, 7.0), (17, 0, 6.0), (21, 0, 5.0)]
    few = [e.peak for e in build(docs, codes, 1, top=3).examples(0) if e.kind == "top"]
    assert few == [10.0, 8.0, 6.0]
    many = [e.peak for e in build(docs, codes, 1, top=5).examples(0) if e.kind == "top"]
    assert many == [10.0, 9.0, 8.0, 7.0, 6.0]


def test_intervals_are_fourths_of_the_largest_value_and_take_turns_between_splits(build: Build) -> None:
    docs = [doc for pair in zip(EXPLAIN[:20], SCORE[:20], strict=True) for doc in pair]
    codes = [(4 * place + 1, 0, float(place // 2 + 1)) for place in range(40)]  # each of 1 to 20 once in each split
    store = build(one_window_a_document(docs), codes, 1, per_band=4)
    bands: dict[int, list[float]] = {}
    for example in store.examples(0):
        if example.kind == "interval":
            bands.setdefault(example.band, []).append(example.peak)
    assert set(bands) == {0, 1, 2, 3}
    for band, (low, high) in enumerate([(1, 4), (5, 9), (10, 14), (15, 20)]):
        assert len(bands[band]) == 4
        assert all(low <= peak <= high for peak in bands[band])
    sides = Counter((e.band, e.split) for e in store.examples(0) if e.kind == "interval")
    assert set(sides.values()) == {2}


def test_rank_bands_hold_equally_many_windows_and_equal_peaks_share_one(build: Build) -> None:
    peaks = [1.0, 1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 100.0]  # by value, all but one lie in the weakest band
    docs = one_window_a_document(EXPLAIN[:8])
    store = build(docs, [(4 * place + 1, 0, peak) for place, peak in enumerate(peaks)], 1, per_band=9)
    bands: dict[int, list[float]] = {}
    for example in store.examples(0):
        if example.kind == "quantile":
            bands.setdefault(example.band, []).append(example.peak)
    assert {band: sorted(found) for band, found in bands.items()} == {
        0: [1.0, 1.0, 1.0],
        1: [1.5],
        2: [2.0, 2.5],
        3: [3.0, 100.0],
    }


def test_random_examples_are_half_from_each_split_and_fill_up_from_the_other(build: Build) -> None:
    docs = EXPLAIN[:20] + SCORE[:20]
    both = [(4 * place + 1, 0, 1.0) for place in range(40)]
    lopsided = [(4 * place + 1, 1, 1.0) for place in range(22)]
    store = build(one_window_a_document(docs), both + lopsided, 2, random=8)
    counts = [Counter(e.split for e in store.examples(f) if e.kind == "random") for f in (0, 1)]
    assert counts == [{"explain": 4, "score": 4}, {"explain": 6, "score": 2}]


def test_no_document_is_in_both_splits_and_no_window_is_twice_in_a_kind(build: Build) -> None:
    random = np.random.default_rng(0)
    docs = np.repeat(np.arange(60), random.integers(5, 40, 60)).tolist()
    rows = [row for row in range(len(docs)) if row % 8]
    codes = [(int(row), 0, float(random.normal())) for row in random.permutation(rows)[: len(rows) // 3]]
    store = build(docs, codes, 1)
    examples = store.examples(0)
    windows = [
        (w.doc, split) for split in ("explain", "score") for on in (True, False)
        for w in store.background(0, 1000, split, 0, active=on)
    ]  # fmt: skip
    assert all(split == side(doc) for doc, split in [*((e.doc, e.split) for e in examples), *windows])
    assert {split for _, split in windows} == {"explain", "score"}
    for example in examples:
        inside = {side(doc) for doc in docs[example.start : example.start + 4]}
        assert inside == {example.split}
        assert example.doc == docs[example.start]
    keys = [(e.pole, e.kind, e.start) for e in examples]
    assert len(keys) == len(set(keys))


def test_a_window_across_documents_of_both_splits_is_left_out(build: Build) -> None:
    docs = [EXPLAIN[0]] * 6 + [SCORE[0]] * 2 + [EXPLAIN[1]] * 2 + [EXPLAIN[2]] * 6
    store = build(docs, [(1, 0, 1.0), (5, 0, 1.0), (9, 0, 1.0)], 1)
    assert sorted((e.start, e.doc) for e in store.examples(0) if e.kind == "top") == [(0, EXPLAIN[0]), (8, EXPLAIN[1])]


def test_windows_end_where_their_context_ends(build: Build) -> None:
    store = build([EXPLAIN[0]] * 16, [(7, 0, 1.0), (14, 0, 2.0)], 1, window=5)
    tops = {e.start: e for e in store.examples(0) if e.kind == "top"}
    assert set(tops) == {5, 13}
    assert tops[5].token_ids == [0, 1, 2]
    assert tops[5].acts == [0.0, 0.0, 1.0]
    assert tops[13].acts == [0.0, 2.0, 0.0]


def test_background_windows_on_and_off_are_told_apart_by_every_firing(build: Build) -> None:
    docs = one_window_a_document(EXPLAIN[:10] + SCORE[:10])
    low = [(4 * place + 1, 0, -1.5) for place in range(0, 20, 2)]
    high = [(4 * place + 2, 0, 0.5) for place in range(0, 20, 4)]
    store = build(docs, low + high, 2)
    for split, documents in (("explain", EXPLAIN[:10]), ("score", SCORE[:10])):
        on = store.background(0, 100, split, 0, active=True)
        off = store.background(0, 100, split, 0, active=False)
        assert sorted(w.doc for w in on) == documents[::2]
        assert sorted(w.doc for w in off) == documents[1::2]
        assert {w.peak for w in on} == {-1.5}
        assert {w.peak for w in off} == {0.0}
    ends = store.query("SELECT low, high, count(*) FROM store.window_peaks GROUP BY ALL ORDER BY high")
    assert ends == [(-1.5, 0.0, 5), (-1.5, 0.5, 5)]
    assert len(store.background(1, 100, "score", 0, active=False)) == 10
    assert [w.window for w in store.background(0, 3, "score", 7, active=True)] == [
        w.window for w in store.background(0, 5, "score", 7, active=True)
    ][:3]


def test_codes_that_do_not_fit_are_refused(build: Build, tmp_path: Path) -> None:
    docs = [EXPLAIN[0]] * 8
    with pytest.raises(StoreError, match="no ordinary token"):
        build(docs, [(0, 0, 1.0)], 1)
    with pytest.raises(StoreError, match="no ordinary token"):
        build(docs, [(99, 0, 1.0)], 1)
    with pytest.raises(StoreError, match="features 0 to 3, expected 0 to 2"):
        build(docs, [(1, 0, 1.0), (1, 3, 1.0)], 3)
    for value in (float("nan"), float("inf")):
        with pytest.raises(StoreError, match="not finite"):
            build(docs, [(1, 0, value)], 1)
    assert not list(tmp_path.glob("*.duckdb*"))
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(StoreError, match="top=0"):
        BuildOptions(top=0)


def test_two_builds_give_the_same_tables_whatever_the_threads_and_pieces(tmp_path: Path) -> None:
    text = planted_text(120)
    codes = planted_codes(text, 30, signed=True)
    pq.write_table(pa.table(text), tmp_path / "tokens.parquet")
    shuffled = np.random.default_rng(5).permutation(len(codes["row"]))
    paths = [tmp_path / "codes-0.parquet", tmp_path / "codes-1.parquet"]
    for path, part in zip(paths, np.array_split(shuffled, 2), strict=True):
        pq.write_table(pa.table({name: column[part] for name, column in codes.items()}), path)
    tables = []
    for options, order in (
        (BuildOptions(threads=1), paths),
        (BuildOptions(threads=3, chunk_codes=100, chunk_features=7, memory="256MiB"), paths[::-1]),
    ):
        target = build_store(
            tmp_path / "features.duckdb",
            codes=order,
            tokens=[tmp_path / "tokens.parquet"],
            n_features=30,
            vocab=VOCAB,
            meta={"created": "then"},
            options=options,
        )
        with duckdb.connect(str(target), read_only=True) as connection:
            names = [name for (name,) in connection.execute("SHOW TABLES").fetchall()]
            tables.append({name: connection.execute(f"FROM {name}").fetchall() for name in names})
    assert set(tables[0]) == set(TABLES)
    assert all(len(rows) > 5 for rows in tables[0].values())
    assert tables[0] == tables[1]


def test_what_comes_from_the_decoder_is_kept_and_may_be_missing(tmp_path: Path) -> None:
    pq.write_table(pa.table(planted_text(3)), tmp_path / "tokens.parquet")
    pq.write_table(pa.table(planted_codes(planted_text(3), 10, signed=False)), tmp_path / "codes.parquet")
    kinds = pa.schema(
        [
            ("feature", pa.int32()),
            ("top_logits", pa.list_(pa.struct([("id", pa.int32()), ("value", pa.float32())]))),
            ("neighbours", pa.list_(pa.struct([("feature", pa.int32()), ("cosine", pa.float32())]))),
        ]
    )
    given = {"feature": 1, "top_logits": [{"id": 5, "value": 0.5}], "neighbours": [{"feature": 0, "cosine": -0.25}]}
    build_store(
        tmp_path / "features.duckdb",
        codes=[tmp_path / "codes.parquet"],
        tokens=[tmp_path / "tokens.parquet"],
        n_features=10,
        vocab=VOCAB,
        meta={},
        per_feature=pa.Table.from_pylist([given], schema=kinds),
    )
    with open_store(tmp_path) as store:
        first, second = store.feature(0), store.feature(1)
    assert (first.top_logits, first.neighbours, first.logit_counts) == ([], [], [])
    assert [(t.id, t.value) for t in second.top_logits] == [(5, 0.5)]
    assert [(n.feature, n.cosine) for n in second.neighbours] == [(0, -0.25)]
