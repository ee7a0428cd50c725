"""Corpora: the shipped sample is what SOURCES.md says, and every kind of corpus reads, or fails in one plain line."""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import corpora
from data.corpora import SAMPLE, CorpusError, Document, corpus_fingerprint, label_names, read_corpus

LICENCES = {
    "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-2.5", "CC0-1.0", "MIT", "PSF-2.0", "PostgreSQL",
    "Public-Domain", "WordNet-3.0",
}  # fmt: skip
EMAIL = re.compile(r"[\w.+%-]+@[\w-]+(\.[\w-]+)*\.[A-Za-z]{2,}|mailto:")
PIECE = re.compile(r"[^\W\d_]+|\d|[^\w\s]+")  # no byte-level BPE token reaches over two of these


@pytest.fixture(scope="module")
def sample() -> list[dict[str, str]]:
    return pq.read_table(SAMPLE).to_pylist()


@pytest.fixture(scope="module")
def claimed() -> dict[str, tuple[int, int]]:
    """Documents and tokens of each source, as SOURCES.md has them."""
    rows = [
        line.split(" | ") for line in SAMPLE.with_name("SOURCES.md").read_text().splitlines() if line.count("|") == 8
    ]
    return {row[0][2:]: (number(row[4]), number(row[5])) for row in rows[1:] if "/" in row[0]}


def number(text: str) -> int:
    return int(text.replace(",", ""))


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fault(name: Path | str, **options: Any) -> str:
    """The message of the CorpusError that reading `name` to its end must raise; always one line."""
    with pytest.raises(CorpusError) as caught:
        list(read_corpus(str(name), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the shipped sample ---


def test_the_sample_is_small_and_has_the_documents_that_its_sources_file_claims(sample, claimed):
    assert SAMPLE.stat().st_size < 5.5e6
    assert Counter(row["source"] for row in sample) == {source: n for source, (n, _) in claimed.items()}
    head = SAMPLE.with_name("SOURCES.md").read_text().splitlines()[2]
    assert f"{len(sample):,} documents, {sum(n for _, n in claimed.values()):,} SmolLM2 tokens" in head


def test_the_sample_has_two_million_tokens(sample, claimed):
    at_least = 3 * sum(len(PIECE.findall(row["text"])) for row in sample[::3])
    tokens = sum(n for _, n in claimed.values())
    assert at_least > 2_000_000
    assert at_least < tokens < 1.5 * at_least


def test_no_source_dominates_and_most_tokens_are_prose(claimed):
    tokens = {source: n for source, (_, n) in claimed.items()}
    kinds: Counter[str] = Counter()
    for source, n in tokens.items():
        kinds[source.split("/")[0]] += n
    total = sum(tokens.values())
    assert max(tokens.values()) < 0.2 * total
    assert sum(kinds[kind] for kind in ("fiction", "speech", "reference")) > 0.5 * total
    assert 0.03 < kinds["languages"] / total < 0.1
    assert kinds["code"] > 0.03 * total


def test_every_row_of_the_sample_has_a_permissive_licence(sample):
    assert {row["licence"] for row in sample} <= LICENCES


def test_the_sample_has_no_addresses_no_leftovers_and_no_text_twice(sample):
    found = Counter[str]()
    for row in sample:
        for what in (EMAIL, re.compile("Project Gutenberg|\ufffd|¶")):
            found.update(match.group() for match in what.finditer(row["text"]))
    assert not found
    assert len({row["text"] for row in sample}) == len(sample)


def test_any_prefix_of_the_sample_is_a_mix(sample):
    assert len({row["source"] for row in sample[:200]}) >= 20


def test_the_sample_reads_by_its_name(sample):
    documents = list(islice(read_corpus("sample"), 5))
    assert documents == [Document(i, row["text"], row["source"]) for i, row in enumerate(sample[:5])]


# --- local files ---


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_plain_file_is_one_document(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes("\ufeffOne.\n\nTwo é.\n".encode())
    assert list(read_corpus(str(path))) == [Document(0, "One.\n\nTwo é.\n", "")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines_keep_their_source_and_skip_blank_lines(tmp_path, name):
    path = write_jsonl(tmp_path / name, {"text": "one", "source": "s"}, {"text": "two"})
    path.write_text(path.read_text() + "\n\n")
    assert list(read_corpus(str(path))) == [Document(0, "one", "s"), Document(1, "two", "")]


def test_ids_are_positions_also_past_empty_rows(tmp_path):
    texts = ["a", "", None, " \n", "e"]
    for path in (
        write_parquet(tmp_path / "a.parquet", text=texts),
        write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts)),
    ):
        assert [(d.id, d.text) for d in read_corpus(str(path))] == [(0, "a"), (4, "e")]


def test_another_text_column_can_be_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", body=["one", "two"], source=["x", "y"], text=["no", "no"])
    assert list(read_corpus(str(path), text_column="body")) == [Document(0, "one", "x"), Document(1, "two", "y")]
    assert list(read_corpus(str(path), text_column="source")) == [Document(0, "x", ""), Document(1, "y", "")]


def test_a_folder_is_read_in_path_order_with_one_run_of_ids(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_text("last")
    (tmp_path / "a.md").write_text("first")
    write_parquet(tmp_path / "b" / "2.parquet", text=["three", "four", "five"])
    write_jsonl(tmp_path / "b" / "1.jsonl", {"text": ""}, {"text": "two"})
    read = [(d.id, d.text) for d in read_corpus(str(tmp_path))]
    assert read == [(0, "first"), (2, "two"), (3, "three"), (4, "four"), (5, "five"), (6, "last")]


def test_reading_streams(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": broken}\n')
    documents = read_corpus(str(path))
    assert next(documents).text == "good"
    with pytest.raises(CorpusError, match="line 2"):
        next(documents)


def test_a_csv_is_text_as_it_stands(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffsource,text,n\ns,"two\nlines, ""quoted""",1\n,007,x\n,,3\n,true,4\n', encoding="utf-8")
    assert list(read_corpus(str(path))) == [
        Document(0, 'two\nlines, "quoted"', "s"),
        Document(1, "007", ""),
        Document(3, "true", ""),
    ]
    assert [d.text for d in read_corpus(str(path), text_column="n")] == ["1", "x", "3", "4"]


def test_a_csv_row_may_be_long(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "word " * 500_000 + "\n")
    assert [len(d.text) for d in read_corpus(str(path))] == [2_500_000]


def test_a_line_end_within_a_csv_field_may_lie_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "CSV_BLOCK", 64)
    texts = [f"{i}\n" * 8 for i in range(10, 40)]
    (tmp_path / "a.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    assert [d.text for d in read_corpus(str(tmp_path / "a.csv"))] == texts


# --- labels ---


def write_all_kinds(folder: Path, **columns: list[Any]) -> list[Path]:
    """The same rows as Parquet, JSON lines and CSV."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
    (folder / "a.csv").write_text("\n".join([",".join(columns), *lines]) + "\n")
    return [write_parquet(folder / "a.parquet", **columns), write_jsonl(folder / "a.jsonl", *rows), folder / "a.csv"]


def test_a_label_is_read_with_its_document(tmp_path):
    for path in write_all_kinds(tmp_path, text=["a", "", "c"], kind=["x", "y", "z"]):
        read = list(read_corpus(str(path), label_column="kind"))
        assert read == [Document(0, "a", "", "x"), Document(2, "c", "", "z")]
        assert [d.label for d in read_corpus(str(path))] == [None, None]


@pytest.mark.parametrize(
    ("labels", "names"),
    [([10, 9, 10], ["9", "10"]), ([0.5, -2.0, 0.5], ["-2.0", "0.5"]), ([True, False], ["False", "True"])],
)
def test_numbers_and_booleans_become_their_text_and_are_sorted_as_numbers(tmp_path, labels, names):
    for path in write_all_kinds(tmp_path, text=["a"] * len(labels), label=labels):
        assert [d.label for d in read_corpus(str(path), label_column="label")] == [str(label) for label in labels]
        assert label_names(str(path), "label") == names


def test_label_names_are_sorted_as_text_when_one_is_no_number(tmp_path):
    for other in ("x", "nan"):
        path = write_jsonl(tmp_path / "a.jsonl", *({"text": "a", "label": name} for name in ("9", other, "10")))
        assert label_names(str(path), "label") == ["10", "9", other]


def test_label_names_know_the_documents_only(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"body": " ", "label": "blank"}, {"body": "a", "label": "full"})
    assert label_names(str(path), "label", text_column="body") == ["full"]


def test_a_source_or_a_text_may_be_the_label_too(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=["a"], source=["s"])
    assert list(read_corpus(str(path), label_column="source")) == [Document(0, "a", "s", "s")]
    assert list(read_corpus(str(path), label_column="text")) == [Document(0, "a", "s", "a")]


def test_hub_labels_are_read(monkeypatch):
    hub(monkeypatch, [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    assert [d.label for d in read_corpus("owner/name", label_column="label")] == ["1", "0"]


def test_a_missing_label_is_refused(tmp_path):
    for path in write_all_kinds(tmp_path, text=["a", "b"], label=["x", None]):
        assert re.search("(row|line) 2 has no label in 'label', expected one a doc", fault(path, label_column="label"))
    path = write_parquet(tmp_path / "b.parquet", text=["a"], label=[float("nan")])
    assert "row 1 has no label in 'label'" in fault(path, label_column="label")


def test_a_missing_label_column_lists_the_columns(tmp_path):
    for path in write_all_kinds(tmp_path, text=["a"], kind=["x"]):
        message = fault(path, label_column="label")
        assert "has no column 'label', expected one of text, kind: name the one with the label by label_c" in message
    (tmp_path / "a.txt").write_text("plain")
    assert "a.txt has no column 'label'" in fault(tmp_path / "a.txt", label_column="label")


def test_a_label_that_is_no_value_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a", "label": ["x"]})
    assert "line 1 has a list in 'label', expected a text or a number" in fault(path, label_column="label")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "\\ud83d"}\n')
    assert "line 1 has half a surrogate pair in 'label'" in fault(path, label_column="label")


def test_too_many_labels_are_refused(tmp_path, monkeypatch):
    assert corpora.MOST_LABELS == 10_000
    monkeypatch.setattr(corpora, "MOST_LABELS", 3)
    path = write_parquet(tmp_path / "a.parquet", text=["a"] * 5, label=[0.1, 0.2, 0.3, 0.3, 0.1])
    assert label_names(str(path), "label") == ["0.1", "0.2", "0.3"]
    path = write_parquet(tmp_path / "a.parquet", text=["a"] * 4, label=[0.1, 0.2, 0.3, 0.4])
    with pytest.raises(
        CorpusError, match="over 3 different labels in 'label', expected a few classes and no free text"
    ):
        label_names(str(path), "label")


# --- faults ---


def test_a_name_that_leads_nowhere_fails_at_once(tmp_path):
    for name in (str(tmp_path / "no.jsonl"), "./no", "a/b/c", "no.parquet", "", "two words"):
        with pytest.raises(CorpusError, match="does not exist, expected .*: check the path"):
            read_corpus(name)


def test_a_file_of_an_unknown_kind_fails_at_once(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(CorpusError, match=r"a\.pdf is of no known kind, expected one of \.txt"):
        read_corpus(str(tmp_path / "a.pdf"))


def test_a_missing_text_column_lists_the_columns(tmp_path):
    message = fault(write_parquet(tmp_path / "a.parquet", body=["x"], title=["y"]))
    assert "no column 'text', expected one of body, title: name the one with the text by text_column" in message
    assert "line 2 has no column 'text'" in fault(write_jsonl(tmp_path / "a.jsonl", {"text": "x"}, {"body": "y"}))


def test_a_column_that_is_no_text_is_refused(tmp_path):
    assert "has a int in 'text', expected text" in fault(write_parquet(tmp_path / "a.parquet", text=[1, 2]))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "x"', "is no JSON"),
        (b'["x", "y"]', "is a JSON list"),
        (b"[", "write the items of the array a line each"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud83d"}', "half a surrogate pair"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    assert re.search(rf"a\.jsonl, line 2 .*{said}", fault(path).replace("has half", "half"))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("Größe".encode("latin-1"))
    assert "a.txt is not UTF-8 (byte 2), expected UTF-8 text: convert it" in fault(tmp_path / "a.txt")


def test_a_corrupt_parquet_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=["one", "two"])
    whole = path.read_bytes()
    for broken in (b"", b"PAR1 no", whole[: len(whole) // 2]):
        path.write_bytes(broken)
        assert "cannot be read as Parquet" in fault(path)


def test_a_broken_csv_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    for broken in (b"", b"text,label\na,b,c\n", "text\nGröße\n".encode("latin-1")):
        path.write_bytes(broken)
        assert re.search(r"a\.csv cannot be read as CSV \(.*\), expected UTF-8, a header line", fault(path))


def test_a_corpus_without_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    assert "has no text in its 1 rows, expected at least one document" in fault(tmp_path / "a.txt")
    (tmp_path / "empty").mkdir()
    assert "has no text in its 0 rows" in fault(tmp_path / "empty")


def test_a_revision_or_split_of_a_local_corpus_is_refused():
    with pytest.raises(CorpusError, match="revision='v1' was given with the local corpus 'sample'"):
        read_corpus("sample", revision="v1")
    with pytest.raises(CorpusError, match="split='test' was given"):
        read_corpus("sample", split="test")


# --- the Hub, without it ---


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[Any]:
    """Let `datasets.load_dataset` give or raise `answer`; returns the list of the calls made to it."""
    datasets = pytest.importorskip("datasets")
    calls: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        if isinstance(answer, Exception):
            raise answer
        return iter(answer)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_dataset_is_streamed_at_its_revision(monkeypatch):
    calls = hub(monkeypatch, [{"text": "one", "source": "web"}, {"text": ""}, {"text": "three"}])
    read = list(read_corpus("owner/name:config", revision="abc", split="validation"))
    assert read == [Document(0, "one", "web"), Document(2, "three", "")]
    assert calls == [(("owner/name", "config"), {"revision": "abc", "split": "validation", "streaming": True})]


def test_a_hub_that_cannot_be_reached_says_what_to_name_instead(monkeypatch):
    hub(monkeypatch, ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore"))
    message = fault("owner/name")
    assert (
        "is no file or folder here, and the Hub cannot be reached (Couldn't reach 'owner/name' on the Hub)" in message
    )
    assert "name a local file, a folder or 'sample'" in message


def test_hub_faults_are_one_plain_line(monkeypatch):
    from datasets.exceptions import DatasetNotFoundError

    hub(monkeypatch, DatasetNotFoundError("gone"))
    assert "no public Hub dataset at revision 'v9'" in fault("owner/name", revision="v9")
    hub(monkeypatch, ValueError("Unknown split"))
    assert "ValueError: Unknown split" in fault("owner/name", split="dev")
    hub(monkeypatch, [{"body": "x"}])
    assert "has no column 'text', expected one of body" in fault("owner/name")
    hub(monkeypatch, [])
    assert "has no text in its 0 rows" in fault("owner/name")


# --- fingerprints and imports ---


def test_a_fingerprint_follows_the_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = corpus_fingerprint(str(path))
    assert re.fullmatch("[0-9a-f]{16}", before)
    (tmp_path / "b.txt").write_text("one")
    assert corpus_fingerprint(str(tmp_path / "b.txt")) == before
    path.write_text("two")
    assert corpus_fingerprint(str(path)) != before
    assert corpus_fingerprint("sample") == corpus_fingerprint(str(SAMPLE))


def test_a_folder_fingerprint_follows_names_and_bytes_but_not_the_place(tmp_path):
    for folder, name, text in (
        ("x", "a.txt", "one"),
        ("y", "a.txt", "one"),
        ("z", "b.txt", "one"),
        ("w", "a.txt", "two"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    x, y, z, w = (corpus_fingerprint(str(tmp_path / folder)) for folder in "xyzw")
    assert x == y
    assert len({x, z, w}) == 3


def test_a_hub_fingerprint_is_name_and_revision():
    assert corpus_fingerprint("owner/name:config", revision="abc") == "owner/name:config@abc"
    assert corpus_fingerprint("owner/name") == "owner/name@main"


def test_importing_is_cheap():
    heavy = "{'torch', 'datasets', 'transformers', 'pandas'}"
    code = f"import sys, data, data.corpora, data.tokens; sys.exit(str({heavy} & set(sys.modules) or ''))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
