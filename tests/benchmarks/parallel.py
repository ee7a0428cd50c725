"""A training step on several GPUs beside the same step on one: JSON with ms, tokens/s, their ratio, and the losses.

    torchrun --nproc-per-node 2 -m tests.benchmarks.parallel
    torchrun --nproc-per-node 2 -m tests.benchmarks.parallel --tiny      # on a CPU: does it run

Rows are random (planted directions plus noise) and on the device already, so only the step is timed. First the leader
takes the steps alone while the others wait, then all take them together, on the same rows. Both begin from the same
dictionary, so their losses should agree. torch and triton are all it needs beside this repository.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from activations.ranks import joined
from sae.parallel import ALONE, Mesh
from sae.registry import REGISTRY
from sae.settings import Training
from sae.stepper import Stepper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="topk")
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--d-sae", type=int, default=131_072)
    parser.add_argument("-k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=20, help="Timed, after half as many that are not.")
    parser.add_argument("--data-parallel", type=int, default=1)
    parser.add_argument("--skip-alone", action="store_true", help="For widths that one GPU does not hold.")
    parser.add_argument("--profile", action="store_true", help="Print the leader's kernels of the last steps.")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.tiny:
        given.d_in, given.d_sae, given.k, given.batch, given.steps = 32, 256, 4, 256, 10
    with joined("auto") as ranks:
        where = ranks.device("auto")
        device = torch.device("cpu" if where == "auto" else where)
        mesh = Mesh(ranks, data_parallel=given.data_parallel, device=device.type)
        rows = planted(given, device)
        found: dict[str, Any] = {"torch": torch.__version__, "world": ranks.world, **vars(given)}
        if device.type == "cuda":
            found["device"] = torch.cuda.get_device_name()
        if not given.skip_alone:
            if ranks.leads:
                found["alone"] = measured(given, rows, ALONE, device)
            ranks.barrier()
        together = measured(given, [part[mesh.row :: mesh.n_rows].contiguous() for part in rows], mesh, device)
        found["together"] = together
        if ranks.leads:
            if "alone" in found:
                found["ratio"] = found["alone"]["ms"] / together["ms"]
            print(json.dumps(found, indent=1), flush=True)


def planted(given: argparse.Namespace, device: torch.device, n_batches: int = 4) -> list[Tensor]:
    """Batches of rows in bfloat16, the same on all ranks: sums of a few of d_sae / 8 directions, and noise."""
    generator = torch.Generator(device).manual_seed(0)
    n_true = max(given.d_sae // 8, 16)
    directions = torch.randn(n_true, given.d_in, generator=generator, device=device)
    batches = []
    for _ in range(n_batches):
        rows = torch.randn(given.batch, given.d_in, generator=generator, device=device)
        for _ in range(8):
            which = torch.randint(n_true, (given.batch,), generator=generator, device=device)
            rows += torch.rand(given.batch, 1, generator=generator, device=device) * directions[which]
        batches.append((rows / rows.norm(dim=1, keepdim=True).mean() * given.d_in**0.5).bfloat16())
    return batches


def measured(given: argparse.Namespace, rows: list[Tensor], mesh: Mesh, device: torch.device) -> dict[str, Any]:
    """Milliseconds a step (median, smallest), tokens/s, the last loss, of steps on `rows`, this process' part."""
    sparsity = REGISTRY[given.arch].sparsity
    settings = Training(
        architecture=given.arch,
        hook="",
        sizes={"d_sae": given.d_sae, sparsity: given.k},
        n_tokens=given.batch * 1000,
        batch=given.batch,
        matmul="bfloat16" if device.type == "cuda" else "float32",
        lr=1e-4,
    )
    sae = REGISTRY[given.arch].sae(settings.config(given.d_in), mesh)
    sae.initialise(mesh.all_rows(rows[0][: 4096 // mesh.n_rows].float().cpu()), seed=0)
    stepper = Stepper(sae.to(device), settings, 1.0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step(i: int) -> None:
        stepper.step(rows[i % len(rows)])

    n_before = given.steps // 2
    for i in range(n_before):
        step(i)
    stepper.recount()  # figures and dead latents, as the loop has them
    times = [timed(lambda i=i: step(i), device) for i in range(n_before, n_before + given.steps)]
    began = time.perf_counter()
    for i in range(given.steps):  # without waiting in between, as the loop does it
        step(i)
    wait(device)
    ms = (time.perf_counter() - began) / given.steps * 1e3
    found: dict[str, Any] = {
        "ms": ms,
        "tokens_per_s": given.batch / ms * 1e3,
        "ms_waited_for": {"median": statistics.median(times), "smallest": min(times)},
        "figures": stepper.figures(),
    }
    if device.type == "cuda":
        found["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    if given.profile and device.type == "cuda":
        with torch.profiler.profile() as profile:
            for i in range(3):
                step(i)
            wait(device)
        if mesh.leads:
            print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
    return found


def timed(work: Callable[[], None], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return (time.perf_counter() - began) * 1e3


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
