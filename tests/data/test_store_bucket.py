"""A store on object storage, at a server that speaks S3's protocol: it answers as on the disk, and is only read."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from pyarrow import fs

from app.cli import main
from data.store import Explanation, Store, StoreError, bucket, open_store
from tests.planted import planted_store

moto = pytest.importorskip("moto.server", reason="pip install 'moto[s3,server]'")
pytestmark = pytest.mark.slow
IN = "stores/run/dictionaries/it's"
ADDRESS = f"s3://{IN}"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of the server; keys and address are in the environment, where AWS' own tools look."""
    running = moto.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_PROFILE", "http_proxy", "HTTP_PROXY"):
            patch.delenv(name, raising=False)
        for name, value in settings.items():
            patch.setenv(name, value)
        yield settings["AWS_ENDPOINT_URL"]
    running.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three parts of explanations on the disk."""
    made = planted_store(tmp_path_factory.mktemp("run") / "planted", n_features=300)
    with open_store(made) as store:
        for i in range(3):
            store.add_explanations([Explanation.new(feature=i, text=f"on {i}, ", source="person")])
    return made


@pytest.fixture(scope="module")
def files(server: str) -> fs.S3FileSystem:
    return fs.S3FileSystem(endpoint_override=server, region="us-east-1", allow_bucket_creation=True)


@pytest.fixture
def there(files: fs.S3FileSystem, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store, copied to the bucket and opened there; its parts are looked for at each question."""
    monkeypatch.setattr(bucket, "FRESH", 0.0)
    copy(files, folder)
    with open_store(ADDRESS) as store:
        yield store
    files.delete_dir_contents("stores")


def copy(files: fs.S3FileSystem, folder: Path) -> None:
    files.create_dir("stores")
    for path in folder.rglob("*"):
        if path.is_file():
            put(files, f"{IN}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def put(files: fs.S3FileSystem, key: str, content: bytes) -> None:
    with files.open_output_stream(key) as file:
        file.write(content)


def test_it_answers_as_the_one_on_the_disk(there: Store, folder: Path):
    with open_store(folder) as here:
        assert there.meta == here.meta
        assert there.summary() == here.summary()
        assert there.page(search="on 2") == here.page(search="on 2")
        for feature in (0, 1, 299):
            assert there.feature(feature) == here.feature(feature)
            assert there.examples(feature) == here.examples(feature)
            assert there.profile(feature) == here.profile(feature)
        assert there.vocab == here.vocab
    assert there.feature(1).explanation is not None
    assert (there.name, there.title) == ("it's", "run/it's")
    assert there.warnings == []


def test_what_another_adds_is_there_at_the_next_question(there: Store, files: fs.S3FileSystem, folder: Path, tmp_path):
    before = there.feature(7).explanations
    grown = shutil.copytree(folder, tmp_path / "grown")
    with open_store(grown) as store:
        store.add_explanations([Explanation.new(feature=7, text="new", source="person")])
    (new,) = {p.name for p in (grown / "explanations").iterdir()} - {
        p.name for p in (folder / "explanations").iterdir()
    }
    put(files, f"{IN}/explanations/{new}", (grown / "explanations" / new).read_bytes())
    assert before == []
    assert [e.text for e in there.feature(7).explanations] == ["new"]


class Counted:
    """A file that notes how many bytes are read from it."""

    def __init__(self, file: object, read: list[int]) -> None:
        self.file, self.took = file, read

    def read(self, n: int) -> bytes:
        self.took.append(n)
        return self.file.read(n)

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


def test_only_blocks_that_a_question_needs_are_fetched(there: Store, monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []
    opened = bucket._Objects._open
    monkeypatch.setattr(bucket._Objects, "_open", lambda *args, **kwargs: Counted(opened(*args, **kwargs), read))
    with open_store(ADDRESS) as store:
        store.feature(3)
    size = there.place.identity()[2]
    assert size > 2**21
    assert 0 < sum(read) < size / 2


@pytest.mark.usefixtures("there")
def test_a_server_that_stops_answering_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def gone(*_args: object) -> None:
        raise OSError("the line is cut")

    monkeypatch.setattr(Counted, "read", gone)
    opened = bucket._Objects._open
    monkeypatch.setattr(bucket._Objects, "_open", lambda *args, **kwargs: Counted(opened(*args, **kwargs), []))
    with pytest.raises(StoreError, match=r"features.duckdb cannot be read \(.*the line is cut\): see that") as told:
        open_store(ADDRESS)
    assert "\n" not in str(told.value)


def test_it_is_only_read(there: Store):
    said = [Explanation.new(feature=1, text="mine", source="person")]
    with pytest.raises(StoreError, match="read only here: copy it to a disk"):
        there.add_explanations(said)
    with pytest.raises(StoreError, match="read only here"):
        _ = there.folder


def test_a_damaged_part_costs_its_own_rows_and_is_named(there: Store, files: fs.S3FileSystem):
    put(files, f"{IN}/explanations/part-x.parquet", b"PAR1 nothing")
    assert there.feature(1).explanation is not None
    (warning,) = there.warnings
    assert warning.startswith(f"{ADDRESS}/explanations/part-x.parquet is damaged")


def test_a_store_that_is_replaced_while_it_is_open_says_so(there: Store, files: fs.S3FileSystem, folder: Path):
    assert not there.replaced
    put(files, f"{IN}/features.duckdb", (folder / "features.duckdb").read_bytes() + b"\0")
    assert there.replaced
    with pytest.raises(StoreError, match="has been replaced while it was open: open it again"):
        there.feature(1)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("s3://stores", "is no folder in a bucket"),
        ("s3://stores/none", "holds no features.duckdb"),
        ("s3://nowhere/none", "holds no features.duckdb"),
    ],
)
@pytest.mark.usefixtures("there")
def test_what_is_not_there_is_one_line(address: str, says: str):
    with pytest.raises(StoreError, match=says) as told:
        open_store(address)
    assert "\n" not in str(told.value)


@pytest.mark.usefixtures("there")
def test_a_file_that_is_no_store_is_one_line(files: fs.S3FileSystem):
    put(files, "stores/x/features.duckdb", b"nothing" * 10_000)
    with pytest.raises(StoreError, match=r"s3://stores/x/features.duckdb cannot be read") as told:
        open_store("s3://stores/x")
    assert "\n" not in str(told.value)


def test_a_server_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch, server: str):
    assert os.environ["AWS_ENDPOINT_URL"] == server
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="cannot be reached") as told:
        open_store(ADDRESS)
    assert "\n" not in str(told.value)


@pytest.mark.usefixtures("there")
def test_commands_that_only_read_take_the_address(tmp_path: Path):
    said = CliRunner().invoke(main, ["search", ADDRESS, "on 2", "--by", "words", "--json"])
    assert said.exit_code == 0, said.output
    found = json.loads(said.output)
    assert (found["address"], len(found["hits"])) == (ADDRESS, 1)
    out = tmp_path / "f.html"
    done = CliRunner().invoke(main, ["export", ADDRESS, str(out), "--format", "html", "--features", "2"])
    assert done.exit_code == 0, done.output
    assert '<h1 class="page-title">Feature 2 of run/it&#x27;s</h1>' in out.read_text(encoding="utf-8")
    refused = CliRunner().invoke(main, ["label", ADDRESS, "--explainer", "lexical"])
    assert isinstance(refused.exception, StoreError)
    assert "read only here" in str(refused.exception)
