"""`sae sweep`: each cell is what `sae train` makes, finished ones stay, killed ones go on, wrong files are refused."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from activations.errors import InputError
from app import figures
from app.measured import of_cells
from app.pareto import lines_of
from app.pareto import points_of as points_in
from app.sweep import sweep
from app.sweep_table import Cell, cells_of, others_of, points_of
from tests.tiny import HOOK, planted_rows, planted_run

SAE = str(Path(sys.executable).with_name("sae"))
OTHER = "blocks.1.hook_resid_post"
GRID = """
[base]
tokens = "12.8k"
batch = 64
[grid]
arch = ["topk", "jumprelu"]
k = [2, 4]
d-sae = [64]
seed = [0, 1]
"""
FILES = ("sae_weights.safetensors", "statistics.safetensors", "train.jsonl")


def sae(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SAE, *map(str, arguments)], capture_output=True, text=True, timeout=280)


@pytest.fixture
def run(tmp_path):
    return planted_run(tmp_path / "run", planted_rows(4000, 16, 20, 3, signed=False)[0])


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


def state(run) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in run.path.glob("dictionaries/*/*.safetensors")}


def test_a_sweep_trains_what_train_trains_and_prints_a_table_a_plot_and_their_place(run, grid):
    done = sae("sweep", run.path, grid)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith(HOOK) for line in lines) == 8
    assert sum("2 seeds: mean, standard deviation" in line for line in lines) == 4
    assert lines[-1] == f"{run.path / 'sweep.json'}   {run.path / 'sweep.html'}"
    page = (run.path / "sweep.html").read_text()
    assert "topk 64" in page
    assert "<script src=" not in page  # all of it is inside
    entry = json.loads((run.path / "sweep.json").read_text())["cells"][f"{HOOK}-topk-d64-k2-s1"]
    assert entry["settings"]["order_seed"] == 0
    assert entry["tokens"] == 12_800
    assert entry["tokens_per_second"] > 0
    assert set(entry["metrics"]) >= {"fvu", "l0", "dead"}
    assert entry["metrics"]["fvu"]["of"].endswith(" held-out documents")
    for arch in ("topk", "jumprelu"):
        for seed in (0, 1):
            options = ["--arch", arch, "-k", 4, "--d-sae", 64, "--tokens", "12.8k", "--batch", 64, "--seed", seed]
            alone = sae("train", run.path, *options, *(["--order-seed", 0] if seed else []), "--name", f"{arch}{seed}")
            assert alone.returncode == 0, alone.stderr
            cell = run.dictionary(f"{HOOK}-{arch}-d64-k4-s{seed}")
            for name in FILES:
                assert (run.dictionary(f"{arch}{seed}") / name).read_bytes() == (cell / name).read_bytes(), name


def test_finished_cells_stay_and_added_ones_are_trained(run, grid):
    sweep(run.path, grid)
    before = state(run)
    timed = json.loads((run.path / "sweep.json").read_text())["cells"]
    grid.write_text(GRID.replace("k = [2, 4]", "k = [2, 4, 6]"))
    cells, n_before = sweep(run.path, grid)
    assert (len(cells), n_before) == (12, 8)
    after = state(run)
    assert len(after) == len(before) + 2 * 4
    assert {path: after[path] for path in before} == before
    assert {name: json.loads((run.path / "sweep.json").read_text())["cells"][name] for name in timed} == timed
    assert sweep(run.path, grid)[1] == 12
    assert state(run) == after


def test_overwrite_trains_the_cells_of_the_file_anew_and_others_stay(run, grid):
    sweep(run.path, grid)
    before = state(run)
    grid.write_text(GRID.replace("k = [2, 4]", "k = [2]"))
    cells, n_before = sweep(run.path, grid, overwrite=True)
    assert (len(cells), n_before) == (8, 0)
    changed = {path for path, stamp in state(run).items() if before[path] != stamp}
    assert changed == {path for path in before if "-k2-" in path}


def test_a_dictionary_that_is_gone_leaves_the_table(run, grid):
    sweep(run.path, grid)
    shutil.rmtree(run.dictionary(f"{HOOK}-topk-d64-k2-s0"))
    grid.write_text(GRID.replace('["topk", "jumprelu"]', '["jumprelu"]'))
    assert len(sweep(run.path, grid)[0]) == 7


def test_other_settings_and_two_hooks_in_the_grid(run, grid):
    folder = run.path / "activations"
    shutil.copytree(folder / HOOK, folder / OTHER)
    manifest = (folder / OTHER / "manifest.json").read_text()
    (folder / OTHER / "manifest.json").write_text(manifest.replace(HOOK, OTHER))
    grid.write_text(
        "base = {tokens = 6400, batch = 64, k = 2, expansion = 4}\n"
        f'grid = {{lr = [1e-3, 0.002], hook = ["{HOOK}", "{OTHER}"]}}'
    )
    cells, _ = sweep(run.path, grid)
    assert [cell.name for cell in cells] == [
        f"{hook}-topk-d64-k2-s0-lr{lr}" for hook in (HOOK, OTHER) for lr in (0.001, 0.002)
    ]
    lines = lines_of(points_in(of_cells(cells), "fvu"))
    assert list(lines) == [f"topk 64, lr {lr}, {hook}" for hook in (HOOK, OTHER) for lr in (0.001, 0.002)]


def test_options_of_the_architecture_are_axes_and_cells_that_differ_in_them_have_names_of_their_own(run, grid):
    text = """
    base = {arch = "matryoshka", tokens = 1280, batch = 64, k = 3, d-sae = 64, options = {sort_by_frequency = true}}
    [grid.options]
    prefixes = [[16, 32], [8, 48]]
    detach_inner = [true, false]
    """
    grid.write_text(text)
    cells, _ = sweep(run.path, grid)
    names = {
        f"{HOOK}-matryoshka-d64-k3-s0-prefixes{p}-detach_inner{d}": (prefixes, d == "true")
        for p, prefixes in (("16+32", [16, 32]), ("8+48", [8, 48]))
        for d in ("true", "false")
    }
    assert {cell.name for cell in cells} == set(names)
    for name, (prefixes, detach) in names.items():
        cfg = json.loads((run.dictionary(name) / "cfg.json").read_text())
        assert (cfg["prefixes"], cfg["detach_inner"], cfg["sort_by_frequency"]) == (prefixes, detach, True)
    weights = {(run.dictionary(name) / FILES[0]).read_bytes() for name in names}
    assert len(weights) == 4
    assert "matryoshka 64, detach_inner True, prefixes [16, 32]" in lines_of(points_in(of_cells(cells), "fvu"))
    assert sweep(run.path, grid)[1] == 4
    grid.write_text(text.replace("sort_by_frequency = true", "sort_by_frequency = false"))
    with pytest.raises(InputError, match="was begun with sizes="):
        sweep(run.path, grid)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[base]\noptions = 3", "options = 3: expected a table, such as options = {auxk_weight = 0}"),
        ("[grid]\noptions = [{tilt = 0.5}]", "expected a table, such as options ="),
        ("[grid.options]\nauxk_weight = 0", "options.auxk_weight = 0 in [grid]: expected a list of values"),
        ("[base.options]\nauxk_weight = 0\n[grid.options]\nauxk_weight = [0]", "options.auxk_weight is there twice"),
        ("[grid]\noptions.auxk_weight = [0, 0.0]", "topk-d128-k32-s0-auxk_weight0 is there twice"),
        (
            "[grid]\noptions.auxk_weight = [0, '1']",
            'auxk_weight=1 cannot be: topk: auxk_weight="1": expected a number.',
        ),
        ("[grid]\noptions.auxk_weight = [nan]", "auxk_weight=NaN: expected a number."),
        ("[base]\noptions.detach_inner = true", "topk: there is no field 'detach_inner': expected auxk_weight=0.03125"),
        ("[grid]\noptions.k = [2, 3]", "k is not for -o, which sets what an architecture alone has: use -k"),
        ("[base", "is no TOML"),
        ("[base]\nbanana = 3", "'banana' is no option of `sae train` for a sweep: expected one of arch, base, batch"),
        ("[base]\nlive = true", "'live' is no option"),
        ("[fruit]\nk = 3", "expected the tables [base] and [grid] alone, not fruit"),
        ("[grid]\nk = 3", "k = 3 in [grid]: expected a list of values"),
        ("[grid]\nk = []", "k = [] in [grid]: expected a list of values"),
        ("[grid]\nbatch = [64, 128]", "batch is one for all cells"),
        ("[base]\nk = 2\n[grid]\nk = [2]", "k is there twice"),
        ("[base]\nd_sae = 64\n[grid]\nexpansion = [2]", "d_sae and expansion both say"),
        ("[grid]\nk = [2, 2]", "is there twice: expected each value of a list once"),
        ("[grid]\nd-sae = [64, 'many']", "d-sae = 'many': 'many' is no count"),
        ("[grid]\nseed = [1.5]", "seed = 1.5: '1.5' is not a valid integer"),
        ("[grid]\nk = [true]", "k = True: expected a float"),
        ("[grid]\narch = ['topk', 'banana']", "the cell arch=banana cannot be: Architecture 'banana' is unknown"),
        ("[grid]\nk = [2, 999]", "the cell k=999 cannot be: topk: k=999 is out of range"),
        ("[grid]\nhook = ['blocks.9.hook_resid_post']", "has no activations at 'blocks.9.hook_resid_post'"),
        ("[grid]\nd-sae = [1000000000, 2000000000]", "train fewer at a time"),
    ],
)
def test_a_wrong_file_is_one_line_before_anything_starts(run, grid, text, says):
    grid.write_text(text)
    with pytest.raises(InputError) as error:
        sweep(run.path, grid)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (run.path / "dictionaries").exists()


def test_a_file_that_is_not_there_is_exit_1(run):
    done = sae("sweep", run.path, "nowhere.toml")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "nowhere.toml cannot be read" in done.stderr


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_ends_in_the_same_bytes(run, grid, tmp_path):
    import random

    text = GRID.replace("12.8k", "51.2k")
    grid.write_text(text)
    script = (
        "import sys, functools, app.sweep as s; from pathlib import Path;"
        "s.train_together = functools.partial(s.train_together, checkpoint_seconds=0.05);"
        "s.sweep(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    whole = shutil.copytree(run.path, tmp_path / "whole")
    subprocess.run([sys.executable, "-c", script, whole, grid], check=True, timeout=280, stderr=subprocess.DEVNULL)
    moments = random.Random(0)
    for _ in range(3):
        before = set(run.path.glob("dictionaries/*/checkpoints/step-*"))
        with subprocess.Popen([sys.executable, "-c", script, run.path, grid], stderr=subprocess.DEVNULL) as process:
            while set(run.path.glob("dictionaries/*/checkpoints/step-*")) == before:
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.3))
            process.kill()
    assert not list(run.path.glob("dictionaries/*/cfg.json")), "all kills hit a running sweep"
    sweep(run.path, grid)
    for name in FILES:
        made = {p.parent.name: p.read_bytes() for p in run.path.glob(f"dictionaries/*/{name}")}
        assert len(made) == 8
        assert made == {p.parent.name: p.read_bytes() for p in whole.glob(f"dictionaries/*/{name}")}, name


# Table and plot; the page is in test_pareto.py


def cell(k: float, seed: int, fvu: float, **changes) -> Cell:
    facts = {"hook": HOOK, "architecture": "topk", "d_sae": 64, "others": "", "l0": k, "dead": 0.25}
    facts |= {
        "name": f"k{k}-s{seed}",
        "sparsity": k,
        "seed": seed,
        "fvu": fvu,
        "tokens_per_second": 10.0,
        "seconds": 1.0,
    }
    return Cell(**{**facts, **changes})


CELLS = [cell(4, 0, 0.2), cell(4, 1, 0.3), cell(2, 0, 0.5), cell(2, 0, 0.4, d_sae=128, name="wide")]


def test_cells_that_differ_in_their_seed_are_one_point_with_its_spread():
    points = points_of(CELLS)
    assert [len(point.cells) for point in points] == [2, 1, 1]
    assert points[0].mean("fvu") == pytest.approx(0.25)
    assert points[0].spread("fvu") == pytest.approx(0.1 / 2**0.5)
    assert points[1].spread("fvu") == 0.0


def test_the_plot_of_a_sweep_has_a_line_an_architecture_and_width_with_bars_for_seeds():
    lines = figures.pareto(CELLS).data
    assert [line.name for line in lines] == ["topk 64", "topk 128", "Pareto front"]
    assert list(lines[0].x) == [2, 4]
    assert list(lines[0].y) == pytest.approx([0.5, 0.25])
    assert list(lines[0].error_y.array) == pytest.approx([0.0, 0.1 / 2**0.5])


def test_options_that_one_architecture_has_are_no_name_of_its_dictionaries():
    topk = {"architecture": "topk", "k": 2, "lr": None, "seed": 0}
    jumprelu = {"architecture": "jumprelu", "target_l0": 2, "bandwidth": 0.1, "lr": None, "seed": 1}
    assert others_of({"a": topk, "b": jumprelu}) == {"a": "", "b": ""}
    assert others_of({"a": topk, "b": {**topk, "lr": 0.1}}) == {"a": "lr None", "b": "lr 0.1"}


@pytest.mark.parametrize("record", [{}, {"cells": []}, {"cells": {"a": {"settings": {}}}}, {"cells": {"a": 3}}])
def test_a_damaged_record_is_said(record):
    with pytest.raises(InputError, match="sweep.json is damaged"):
        cells_of(record)
