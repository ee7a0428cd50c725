"""Vectors: a file's numbers come back as they are, in blocks, whatever the file; and what is no matrix is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import vectors
from data.corpora import CorpusError
from data.vectors import read_vectors, vectors_fingerprint

MATRIX = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)


def write_npy(path: Path, array: Any) -> Path:
    np.save(path, array, allow_pickle=True)
    return path


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def lists(rows: Any, kind: pa.DataType | None = None, *, fixed: int = -1) -> pa.Array:
    return pa.array(rows, pa.list_(kind or pa.float32(), fixed))


def whole(path: Path, column: Any = None) -> np.ndarray:
    return np.concatenate(list(read_vectors(path, column)))


def fault(path: Path, column: Any = None) -> str:
    """The message of the CorpusError that reading `path` to its end must raise; always one line."""
    with pytest.raises(CorpusError) as caught:
        list(read_vectors(path, column))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_a_npy_comes_back_as_float32(tmp_path, dtype, order):
    array = np.array(MATRIX, dtype, order=order)
    read = whole(write_npy(tmp_path / "a.npy", array))
    assert read.dtype == np.dtype("float32")
    np.testing.assert_array_equal(read, array.astype("float32"))


@pytest.mark.parametrize("fixed", [-1, 3])
@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_the_only_column_of_lists_is_taken(tmp_path, kind, fixed):
    array = MATRIX.astype(kind.to_pandas_dtype())
    path = write_parquet(tmp_path / "a.parquet", id=list(range(7)), v=lists(list(array), kind, fixed=fixed))
    np.testing.assert_array_equal(whole(path), array.astype("float32"))


def test_one_of_two_columns_of_lists_is_taken_by_its_name(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", u=lists([[1.0], [2.0]]), v=lists([[3.0, 4.0], [5.0, 6.0]]))
    assert whole(path, "v").tolist() == [[3, 4], [5, 6]]


def test_columns_of_numbers_are_joined_in_the_order_they_are_named_in(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", a=[1, 2, 3], b=["x", "y", "z"], c=[0.5, 1.5, 2.5])
    assert whole(path, ["c", "a"]).tolist() == [[0.5, 1], [1.5, 2], [2.5, 3]]
    assert whole(path, ["a"]).tolist() == [[1], [2], [3]]


def test_a_folder_is_read_in_path_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "notes.txt").write_text("no vectors")
    write_npy(tmp_path / ".hidden.npy", np.full((1, 3), 9.0))
    write_npy(tmp_path / "c.npy", MATRIX[5:])
    write_parquet(tmp_path / "b" / "1.parquet", v=lists(list(MATRIX[2:5])))
    write_npy(tmp_path / "a.npy", MATRIX[:2])
    np.testing.assert_array_equal(whole(tmp_path), MATRIX)


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_blocks_are_short_and_the_same_each_time(tmp_path, monkeypatch, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "npy":
        write_npy(path, MATRIX)
    else:
        pq.write_table(pa.table({"v": lists(list(MATRIX))}), path)
    assert [len(block) for block in read_vectors(path)] == [7]
    for name, at_most in (("BLOCK_ROWS", 3), ("BLOCK_VALUES", 3 * 3 + 2)):
        with monkeypatch.context() as patch:
            patch.setattr(vectors, name, at_most)
            assert [len(block) for block in read_vectors(path)] == [3, 3, 1]
            np.testing.assert_array_equal(whole(path), MATRIX)


def test_no_block_has_over_65536_rows(tmp_path):
    path = write_npy(tmp_path / "a.npy", np.zeros((65_537, 1), np.float32))
    assert [len(block) for block in read_vectors(path)] == [65_536, 1]


def test_a_block_owns_its_memory(tmp_path):
    first = next(read_vectors(write_npy(tmp_path / "a.npy", MATRIX)))
    first[:] = 0  # a read-only map would refuse
    np.testing.assert_array_equal(whole(tmp_path / "a.npy"), MATRIX)


def test_reading_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "BLOCK_ROWS", 2)
    blocks = read_vectors(write_npy(tmp_path / "a.npy", np.array([[1.0], [2.0], [np.nan]])))
    assert next(blocks).tolist() == [[1], [2]]
    with pytest.raises(CorpusError, match="row 2"):
        next(blocks)


# --- faults ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_the_first_row_that_is_not_finite_is_named(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(vectors, "BLOCK_ROWS", 2)
    array = MATRIX.astype("float64")
    array[5, 1] = array[6, 0] = bad
    for path in (
        write_npy(tmp_path / "a.npy", array),
        write_parquet(tmp_path / "a.parquet", v=lists(list(array), pa.float64())),
    ):
        assert f"{path}, row 5 (counted from 0) has a value that is NaN, infinite or missing" in fault(path)


def test_a_missing_number_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", v=lists([[1.0, 2.0], [3.0, None]]))
    assert "row 1 (counted from 0) has a value that is NaN, infinite or missing" in fault(path)
    path = write_parquet(tmp_path / "b.parquet", a=[1, None], b=[1, 2])
    assert "row 1 (counted from 0) has a value that is NaN, infinite or missing" in fault(path, ["a", "b"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[1.0, 2.0]] * 4 + [[1.0]], r"row 4 .* has 1 numbers, expected lists of one length \(2 in row 0\)"),
        ([[1.0, 2.0]] * 2 + [[1.0], None], "row 2 .* has 1 numbers"),
        ([[1.0, 2.0]] * 3 + [None], "row 3 .* has no list"),
        ([None, [1.0]], "row 0 .* has no list"),
    ],
)
def test_a_ragged_list_is_named(tmp_path, monkeypatch, rows, said):
    monkeypatch.setattr(vectors, "BLOCK_ROWS", 2)
    assert re.search(said, fault(write_parquet(tmp_path / "a.parquet", v=lists(rows))))


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2, 2)), np.zeros((2, 2), int), np.zeros((2, 2), complex)])
def test_a_npy_that_is_no_matrix_of_floats_is_refused(tmp_path, array):
    message = fault(write_npy(tmp_path / "a.npy", array))
    assert f"has shape {array.shape} and type {array.dtype}, expected a matrix of floats" in message


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    path = write_npy(tmp_path / "a.npy", np.array([[1.0, "x"]], object))
    assert "cannot be read as a .npy (Array can't be memory-mapped: Python objects in dtype.)" in fault(path)


def test_a_broken_npy_is_refused(tmp_path):
    path = write_npy(tmp_path / "a.npy", MATRIX)
    content = path.read_bytes()
    for broken in (b"", b"PK\x03\x04 a zip", content[:-1]):
        path.write_bytes(broken)
        assert "cannot be read as a .npy" in fault(path)


def test_a_broken_parquet_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", v=lists(list(MATRIX)))
    content = path.read_bytes()
    for broken in (b"", content[: len(content) // 2]):
        path.write_bytes(broken)
        assert "cannot be read as Parquet" in fault(path)


def test_an_empty_matrix_is_refused(tmp_path):
    for path in (
        write_npy(tmp_path / "rows.npy", np.zeros((0, 3))),
        write_npy(tmp_path / "columns.npy", np.zeros((3, 0))),
        write_parquet(tmp_path / "rows.parquet", v=lists([])),
        write_parquet(tmp_path / "columns.parquet", v=lists([[], []])),
    ):
        assert f"{path} has no vectors, expected at least one row and one column" in fault(path)


def test_another_width_within_a_folder_is_refused(tmp_path):
    write_npy(tmp_path / "a.npy", MATRIX)
    write_npy(tmp_path / "b.npy", MATRIX[:, :2])
    assert re.search(r"b\.npy has vectors of 2 numbers, expected 3 as in .*a\.npy", fault(tmp_path))


def test_columns_that_do_not_fit_are_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", a=[1, 2], t=["x", "y"], ts=[["x"], ["y"]])
    assert "has 0 columns of number lists, expected one: name by column" in fault(path)
    assert "has no column 'v', expected one of a, t, ts" in fault(path, "v")
    assert "has no column 'v'" in fault(path, ["a", "v"])
    assert "has int64 in 'a', expected a list of numbers a row" in fault(path, "a")
    assert re.search("has list<.*> in 'ts', expected a list of numbers a row", fault(path, "ts"))
    assert "has string in 't', expected a number a row" in fault(path, ["a", "t"])
    two = write_parquet(tmp_path / "b.parquet", u=lists([[1.0]]), v=lists([[1.0]]))
    assert "has 2 columns of number lists, expected one" in fault(two)


def test_a_column_that_nothing_could_be_read_from_is_refused_at_once(tmp_path):
    with pytest.raises(CorpusError, match=r"column='v' was given with .*a \.npy has no columns"):
        read_vectors(write_npy(tmp_path / "a.npy", MATRIX), "v")
    with pytest.raises(CorpusError, match="column is an empty list"):
        read_vectors(write_parquet(tmp_path / "a.parquet", v=[1]), [])


def test_a_path_without_vectors_fails_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "no.npy", tmp_path / "empty"):
        for ask in (read_vectors, vectors_fingerprint):
            with pytest.raises(CorpusError, match=r"holds no vectors, expected \.npy or \.parquet, or a folder"):
                ask(path)
    with pytest.raises(CorpusError, match=r"a\.txt is of no known kind"):
        read_vectors(tmp_path / "a.txt")


# --- fingerprints ---


def test_a_fingerprint_follows_the_bytes_of_vector_files_only(tmp_path):
    write_npy(tmp_path / "a.npy", MATRIX)
    one, folder = vectors_fingerprint(tmp_path / "a.npy"), vectors_fingerprint(tmp_path)
    assert re.fullmatch("[0-9a-f]{16}", one)
    (tmp_path / "a.txt").write_text("not read")
    assert vectors_fingerprint(tmp_path) == folder
    write_npy(tmp_path / "a.npy", MATRIX + 1)
    assert vectors_fingerprint(tmp_path) != folder
    assert vectors_fingerprint(tmp_path / "a.npy") != one
