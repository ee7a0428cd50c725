"""Dictionaries of one shape trained together against each alone: `python -m tests.benchmarks.sweep`.

Planted activations in a run of its own; all of `train_together` is timed, statistics and saving included, in turns.
Beside the time, the largest difference of a decoder row says whether both end in the same dictionaries (on a GPU sums
have no fixed order). Goal on a GPU: together at most 60 % of the time.
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from activations.run import Run
from sae import load_sae
from sae.settings import Training
from sae.train import train_together
from tests.tiny import HOOK, planted_rows, planted_run


def seconds(run: Run, groups: list[dict[str, Training]], device: str) -> float:
    """Time to train the groups one after the other, from nothing."""
    shutil.rmtree(run.path / "dictionaries", ignore_errors=True)
    start = time.perf_counter()
    for group in groups:
        train_together(run, group, device=device)
    return time.perf_counter() - start


def weights(run: Run, names: list[str]) -> list[torch.Tensor]:
    return [load_sae(run.dictionary(name)).W_dec.clone() for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("-k", nargs="+", type=int, default=[16, 32, 48, 64], help="taken in turn")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--matmul", default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    def settings(i: int, steps: int) -> Training:
        sizes = {"d_sae": args.d_sae, "k": args.k[i % len(args.k)]}
        n_tokens = steps * args.batch
        shared = {"n_tokens": n_tokens, "batch": args.batch, "order_seed": 0, "matmul": args.matmul}
        return Training(architecture="topk", hook=HOOK, sizes=sizes, seed=i, **shared)

    with tempfile.TemporaryDirectory() as folder:
        rows = planted_rows(args.rows, args.d_in, 2 * args.d_in, 8, signed=False)[0].to(torch.bfloat16)
        run = planted_run(Path(folder) / "run", rows, per_shard=65_536)
        cells = {f"cell{i}": settings(i, args.steps) for i in range(args.cells)}
        warm = {"a": settings(0, 20), "b": settings(1, 20)}
        seconds(run, [warm, {"c": warm["a"]}], args.device)
        times: dict[str, list[float]] = {"together": [], "alone": []}
        ways = {"together": [cells], "alone": [{name: cell} for name, cell in cells.items()]}
        made = {}
        for _ in range(args.rounds):
            for way, groups in ways.items():
                times[way].append(seconds(run, groups, args.device))
                made[way] = weights(run, list(cells))
        pairs = zip(made["together"], made["alone"], strict=True)
        median = {way: round(statistics.median(each), 2) for way, each in times.items()}
        result = {
            **vars(args),
            "seconds": median,
            "ratio": round(statistics.median(a / b for a, b in zip(*times.values(), strict=True)), 3),
            "largest_difference": max(float((a - b).abs().max()) for a, b in pairs),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if args.device == "cuda" else None,
            "hardware": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor(),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
