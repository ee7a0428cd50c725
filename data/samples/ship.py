"""Put finished dictionaries among the runs that ship: python data/samples/ship.py RUN/ID [RUN/ID ...]

Copies into runs/RUN beside this file what opening, browsing and steering need of each: run.json, the weights with
matrices in half precision, statistics, settings, figures, store and explanations, without activations. Whoever trained
elsewhere brings the dictionary's folder into a run with the same model and hook before it is indexed.
"""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from activations.files import read_json, write_aside, write_json
from activations.run import dictionary_folder
from sae.files import CFG, WEIGHTS

RUNS = Path(__file__).resolve().parent / "runs"
LEFT_OUT = ("train.jsonl", "progress.json")
CORPUS = "15 M tokens of prose, manuals and code; see README.md beside the run"
"""Instead of a path on the machine that trained it."""


def ship(address: str) -> Path:
    """Copy one dictionary; returns its new folder, in place of what was there."""
    folder = dictionary_folder(address)
    run = folder.parent.parent
    target = RUNS / run.name / "dictionaries" / folder.name
    shutil.rmtree(target, ignore_errors=True)
    with write_aside(target) as aside:
        shutil.copytree(folder, aside, ignore=lambda _, names: [n for n in names if n[0] == "." or n in LEFT_OUT])
        weights = load_file(folder / WEIGHTS)
        save_file({name: w.half() if w.dim() == 2 else w for name, w in weights.items()}, aside / WEIGHTS)
        cfg = read_json(folder / CFG)
        cfg["metadata"]["dataset_path"] = CORPUS
        write_json(aside / CFG, cfg)
    shutil.copyfile(run / "run.json", RUNS / run.name / "run.json")
    return target


for each in sys.argv[1:]:
    made = ship(each)
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    print(f"{made}: {size / 2**20:.1f} MiB")
