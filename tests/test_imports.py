"""Imports point one way, and starting is quick. See README, "The rooms"."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"data", "activations", "sae", "steering", "autointerp", "app"}
MAY = {
    "data": set(),
    "activations": set(),
    "sae": {"activations"},
    "steering": {"sae", "activations", "data"},
    "autointerp": {"steering", "sae", "activations", "data"},
    "app": ROOMS,
}
ONLY_APP = {"streamlit", "plotly", "click"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(top-level name, whether it is imported when the module is) of each absolute import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_top = {id(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_top -= {id(node) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], id(node) in at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], id(node) in at_top


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_point_one_way(room):
    for path in (ROOT / room).rglob("*.py"):
        for name, at_top in imports(path):
            where = f"{path.relative_to(ROOT)} imports {name}"
            assert name not in ROOMS - MAY[room] - {room}, where
            assert room == "app" or name not in ONLY_APP, where
            if room in ("sae", "activations", "steering"):
                assert not (name == "data" and at_top), f"{where} at module level, which a user's data.py would shadow"


def test_no_other_top_level_package():
    packages = {p.parent.name for p in ROOT.glob("[a-z]*/*.py")} - {"tests", "build"}
    assert packages == ROOMS


def sae(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("sae")
    return subprocess.run([str(script), *arguments], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_help_is_quick_and_takes_no_torch(tmp_path):
    code = (
        "import sys; sys.argv = ['sae', '--help']\nfrom app.cli import run\n"
        "try: run()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    sae("--help", cwd=tmp_path)  # byte code is written
    start = time.process_time()
    assert "collect" in sae("--help", cwd=tmp_path).stdout
    assert time.process_time() - start < 1.0


def test_beside_files_of_the_users_called_like_our_packages(tmp_path):
    """`sae` works there; a notebook that only loads, trains or steers does too; what cannot work says why."""
    for name in ("data", "app", "sae"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    assert "collect" in sae("--help", cwd=tmp_path).stdout
    done = sae("runs", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "sae.py").unlink()
    cell = (
        "from activations import load_model\nfrom sae import load_sae\n"
        "from steering import SteeringVector, steer\nprint('fine')"
    )
    done = subprocess.run([sys.executable, "-c", cell], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout == "fine\n", done.stderr
