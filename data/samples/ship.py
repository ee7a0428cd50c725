"""Put finished dictionaries among the runs that ship: python data/samples/ship.py RUN ID [ID ...]

Copies into runs/RUN beside this file what opening, browsing and steering need of each: run.json, the weights with
matrices in half precision, statistics, settings, figures, store and explanations, without activations. Whoever trained
elsewhere brings the dictionary's folder into a run with the same model and hook before it is indexed.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

RUNS = Path(__file__).resolve().parent / "runs"
LEFT_OUT = ("train.jsonl", "progress.json", "label_vectors.safetensors")
CORPUS = "15 M tokens of prose, manuals and code"
"""Instead of a path on the machine that trained it."""


def ship(run: Path, name: str) -> Path:
    """Copy one dictionary; returns its new folder, in place of what was there."""
    folder, target = run / "dictionaries" / name, RUNS / run.name / "dictionaries" / name
    aside = target.with_name(f".{name}")
    for old in (aside, target):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(folder, aside, ignore=lambda _, names: [n for n in names if n[0] == "." or n in LEFT_OUT])
    weights = load_file(folder / "sae_weights.safetensors")
    save_file({key: w.half() if w.dim() == 2 else w for key, w in weights.items()}, aside / "sae_weights.safetensors")
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["dataset_path"] = CORPUS
    (aside / "cfg.json").write_text(json.dumps(cfg, indent=1) + "\n")
    for path in [path for path in aside.rglob("*") if path.is_file()]:
        path.chmod(0o644)
    os.replace(aside, target)
    shutil.copyfile(run / "run.json", RUNS / run.name / "run.json")
    return target


for each in sys.argv[2:]:
    made = ship(Path(sys.argv[1]), each)
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    print(f"{made}: {size / 2**20:.1f} MiB")
