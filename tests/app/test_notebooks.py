"""The notebooks run from top to bottom on a real run."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "app" / "notebooks" / "steer.ipynb"
pytestmark = pytest.mark.timeout(600)  # half a minute on two idle cores
FIGURE = "application/vnd.plotly.v1+json"


@pytest.fixture(scope="module")
def executed(small_run, tmp_path_factory):
    """steer.ipynb after every cell ran, in a kernel of its own and an empty folder."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = pytest.MonkeyPatch()
    environment.setenv("SAE_RUN", str(small_run))
    environment.setenv("PYTHONPATH", str(ROOT))  # as after `pip install -e .`
    environment.setenv("OMP_NUM_THREADS", "2")
    folder = tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    try:
        client.execute()
    finally:
        environment.undo()
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(
        out["text"] for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "stream"
    )


def test_it_steers_with_a_feature_and_a_difference_of_means(executed):
    text = printed(executed)
    assert "latents at blocks.15.hook_resid_post" in text
    assert text.count("steered: ") == 4
    assert "bare difference" in text


def test_the_plot_shows_that_the_difference_of_means_beats_a_random_direction(executed):
    (figure,) = [
        out["data"][FIGURE]
        for cell in executed.cells
        for out in cell.get("outputs", [])
        if FIGURE in out.get("data", {})
    ]
    kl, odds = ({t["name"]: t["y"] for t in figure["data"] if t.get("xaxis", "x") == axis} for axis in ("x", "x2"))
    assert set(kl) == set(odds)
    assert {"difference of means", "random direction"} < set(kl)
    assert all(values[0] == 0 < values[-1] for values in kl.values())
    gain = {name: values[2] - values[0] for name, values in odds.items()}
    assert gain["difference of means"] > 1 > abs(gain["random direction"])


def test_the_source_is_committed_without_outputs():
    """Text and figures depend on the run, and would make every change of the notebook unreadable."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
