"""One process of `test_parallel`: RUN DATA_PARALLEL NAME trains every case as NAME-CASE; with "stop", half of it."""

import sys
from pathlib import Path
from typing import Any

import torch

from activations.ranks import joined, leave
from activations.run import Run
from sae import checkpoint
from sae.parallel import Mesh
from sae.settings import Training
from sae.train import train
from tests.tiny import HOOK

CASES: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "sizes": {"d_sae": 64, "k": 2}},
    "abstopk": {"architecture": "abstopk", "sizes": {"d_sae": 64, "k": 2}, "ema": 0.9},
    "batchtopk": {"architecture": "batchtopk", "sizes": {"d_sae": 64, "k": 2.5, "refine": 1}},
    "jumprelu": {"architecture": "jumprelu", "sizes": {"d_sae": 64, "target_l0": 2, "start_l0": 1.5}},
    "resampled": {"architecture": "topk", "sizes": {"d_sae": 64, "k": 12}, "k_from": 16, "resample_every": 1280},
}
STEPS, HALF = 80, 40


class Stopped(Exception):
    pass


def main(run: Path, data_parallel: int, name: str, stop: bool) -> None:
    torch.set_num_threads(1)
    save = checkpoint.save

    def save_and_stop(*args: Any) -> None:
        save(*args)
        if args[2].step == HALF:
            raise Stopped

    if stop:
        checkpoint.save = save_and_stop
    with joined() as ranks:
        mesh = Mesh(ranks, data_parallel=data_parallel)
        for case, changes in CASES.items():
            # float32: in bfloat16 the last bit of a sum decides which latents are chosen
            settings = Training(
                hook=HOOK, n_tokens=64 * STEPS, batch=64, dead_tokens=64 * 5, matmul="float32", **changes
            )
            try:
                seconds = 0.0 if stop else 1e9
                train(Run.open(run), settings, name=f"{name}-{case}", mesh=mesh, checkpoint_seconds=seconds)
            except Stopped:
                assert stop


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], stop="stop" in sys.argv)
    leave(0)
