"""The training step beside SAELens', dictionary_learning's and sparsify's and the machine's own limits: JSON lines.

    sae bench train --d-sae 9216 --dtype autocast
    sae bench train --run RUN --extra-steps 2000

Every trainer is driven as its own library drives it, with its own loss, optimiser and bookkeeping (see `peers`); no
model runs, the rows are in memory. All take turns in each round, so that a change of the machine's load meets all
alike; figures are medians over the rounds, and `x_ours` is the median of the rounds' ratios. A peer that is not
installed is left out and said so.

Speed bought with quality does not count: after all steps (warm-up, timed, --extra-steps; the same batches for all)
FVU, L0 and the share of dead latents are taken on rows that nobody trained on, and `fvu_x_dense` is FVU over that of
the dense reference, our loss in plain PyTorch.

roofline: gemm is the encoder's product alone, timed between the trainers. dense: five such products, pre-activations
and latents written and read once, and the traffic of Adam. sparse: one product, pre-activations written and read once,
four passes over the rows of the active latents, and Adam. peak_mib: weights, gradients, optimiser and what a step needs
besides, on a GPU; on a CPU the size of one process says nothing of the several trainers in it.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.cache import held_out_mask, scale_of, training_mask
from activations.run import Run, versions
from activations.shuffle import Shuffled
from tests.benchmarks.peers.peer import Peer, Setting

PEERS = ["ours", "ours_float8", "dense", "saelens", "dictionary_learning", "sparsify"]
TEST_ROWS = 16_384

Row = dict[str, Any]


def synthetic(n: int, d: int, seed: int) -> Tensor:
    """n rows like a model's, of mean norm sqrt(d): sums of 40 of 8 d directions, few of them frequent, with
    heavy-tailed weights; a mean with four outlying dimensions; noise."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(8 * d, d, generator=g), dim=1)
    frequency = torch.arange(1, 8 * d + 1) ** -0.9
    mean = 0.3 * torch.randn(d, generator=g)
    mean[:4] += torch.tensor([8.0, -6.0, 5.0, 4.0])
    rows = torch.empty(n, d)
    for part in rows.split(16_384):
        chosen = torch.multinomial(frequency, len(part) * 40, replacement=True, generator=g).view(-1, 40)
        weights = torch.exp(0.6 * torch.randn(len(part), 40, generator=g))
        sums = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=weights, mode="sum")
        part.copy_(sums + mean + 0.15 * torch.randn(len(part), d, generator=g))
    return rows * (d**0.5 / rows.norm(dim=1).mean())


def cached(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """(training rows in their shuffled order, rows of held-out documents), scaled as for training."""
    run = Run.open(args.run)
    cache = run.activations(args.hook or run.hooks()[0])
    n_train = sum(int(training_mask(cache, i).sum()) for i in range(cache.n_shards))
    batches = Shuffled(cache, batch=args.batch, seed=args.seed).batches()
    n_batches = max(min(args.rows, n_train) // args.batch, 1)
    train = torch.cat([rows[cache.hook].float() for rows, _ in itertools.islice(batches, n_batches)])
    test = torch.cat([cache.rows(i)[held_out_mask(cache, i)].float() for i in range(cache.n_shards)])
    scale = scale_of(cache.moments)
    return train * scale, test[:TEST_ROWS] * scale


def feed(rows: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches without end, the same for each caller."""
    g = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=g).to(rows.device)
        for part in order[: len(rows) // batch * batch].split(batch):
            yield rows[part]


def sync(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str) -> float:
    sync(device)
    start = time.perf_counter()
    call()
    sync(device)
    return time.perf_counter() - start


def roofline(args: argparse.Namespace, gemm: float) -> Row:
    """Bounds in ms from the encoder's product (seconds) and the rate at which memory is copied, measured here."""
    x = torch.empty(1 << (28 if args.device != "cpu" else 25), device=args.device)
    y = torch.empty_like(x)
    copy = statistics.median(seconds(lambda: y.copy_(x), args.device) for _ in range(7))
    rate = 2 * x.numel() * 4 / copy  # bytes read and written
    width = 2 if args.dtype == "autocast" else 4
    weights = 2 * args.d_in * args.d_sae * 4
    adam = (7 + 1) * weights / rate  # reads p, g, m, v and writes p, m, v; g was written before
    pre = 2 * args.batch * args.d_sae * width / rate
    gathers = 4 * args.batch * args.k * args.d_in * width / rate
    flops = 2 * args.batch * args.d_in * args.d_sae
    return {
        "gemm_tflops": flops / gemm / 1e12,
        "copy_gb_per_s": rate / 1e9,
        "gemm_ms": gemm * 1e3,
        "dense_ms": (5 * gemm + 2 * pre + adam) * 1e3,
        "sparse_ms": (gemm + pre + gathers + adam) * 1e3,
    }


class Contender:
    """A trainer with its batches and what was measured of it."""

    def __init__(self, name: str, args: argparse.Namespace, setting: Setting, rows: Tensor) -> None:
        """Builds it and warms it up. Raises ImportError when it is not installed."""
        trainer: type[Peer] = importlib.import_module(f"tests.benchmarks.peers.{name}").Trainer
        if setting.arch not in trainer.architectures:
            raise NotImplementedError(f"it has no {setting.arch}")
        self.name, self.args, self.seconds = name, args, list[float]()
        before = torch.cuda.memory_allocated()
        self.peer = trainer(setting, rows[:4096])
        self.batches = feed(rows, args.batch, args.seed)
        if args.dead_frac:
            self.peer.kill(round(args.dead_frac * args.d_sae))
        self.advance(args.warmup)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.advance(1)
        self.peak = torch.cuda.max_memory_allocated() - before

    def advance(self, n: int) -> None:
        torch.set_float32_matmul_precision(self.peer.matmul_precision)
        for x in itertools.islice(self.batches, n):
            self.peer.step(x)

    def turn(self) -> None:
        """A block of timed steps."""
        batches = list(itertools.islice(self.batches, self.args.block))
        torch.set_float32_matmul_precision(self.peer.matmul_precision)
        took = seconds(lambda: [self.peer.step(x) for x in batches], self.args.device)
        self.seconds.append(took / self.args.block)

    @torch.no_grad()
    def quality(self, test: Tensor) -> Row:
        """FVU, L0 and the share of latents that were 0 on all of `test`, in float32."""
        torch.set_float32_matmul_precision("highest")
        error, l0, fired = 0.0, 0.0, torch.zeros(self.args.d_sae, dtype=torch.bool, device=test.device)
        for x in test.split(1024):
            x_hat, z = self.peer.recon(x)
            error += float((x - x_hat).square().sum())
            l0 += float((z != 0).sum()) / len(test)
            fired |= (z != 0).any(dim=0)
        total = float((test - test.mean(dim=0)).square().sum())
        return {"fvu": error / total, "l0": l0, "dead": 1 - float(fired.float().mean())}

    def figures(self) -> Row:
        times = sorted(self.seconds)
        return {
            "step_ms": statistics.median(times) * 1e3,
            "step_ms_quartiles": [round(times[len(times) * i // 4] * 1e3, 3) for i in (1, 3)],
            "rows_per_s": round(self.args.batch / statistics.median(times)),
            "peak_mib": round(self.peak / 2**20) if self.args.device == "cuda" else None,
        }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated")
    parser.add_argument("--arch", default="topk", choices=["topk", "jumprelu"])
    parser.add_argument("--d-in", type=int, default=576, help="width of the synthetic rows")
    parser.add_argument("--d-sae", type=int, default=9216)
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=["float32", "autocast"])
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each")
    parser.add_argument("--warmup", type=int, help="steps before them; default: 3 on a CPU, 15 on a GPU")
    parser.add_argument("--block", type=int, help="steps of a turn; default: 1 on a CPU, 10 on a GPU")
    parser.add_argument("--extra-steps", type=int, default=0, help="untimed steps before FVU, L0 and dead are taken")
    parser.add_argument("--dead-frac", type=float, default=0.0, help="share of latents made dead, so that AuxK runs")
    parser.add_argument("--lr", type=float, help="of every trainer; default: each its own")
    parser.add_argument("--run", type=Path, help="take the rows that a run has cached")
    parser.add_argument("--hook", help="of --run; default: its first")
    parser.add_argument("--rows", type=int, default=262_144, help="rows in memory to train on, in float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here too")
    args = parser.parse_args(argv)
    args.warmup = args.warmup if args.warmup is not None else 3 if args.device == "cpu" else 15
    args.block = args.block or (1 if args.device == "cpu" else 10)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.run:
        train, test = (rows.to(args.device) for rows in cached(args))
        args.d_in = train.shape[1]
    else:
        rows = synthetic(args.rows + TEST_ROWS, args.d_in, args.seed).to(args.device)
        train, test = rows[:-TEST_ROWS], rows[-TEST_ROWS:]
    n_rounds = -(-args.steps // args.block)
    same = ("arch", "d_in", "d_sae", "k", "batch", "dtype", "device", "lr", "seed")
    n_steps = args.warmup + 1 + n_rounds * args.block + args.extra_steps
    setting = Setting(n_steps=n_steps, **{name: getattr(args, name) for name in same})
    facts = {
        **vars(setting),
        "dead_frac": args.dead_frac,
        "rows": str(args.run or "synthetic"),
        "n_rows": len(train),
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }

    def report(row: Row) -> None:
        line = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in {**row, **facts}.items()})
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                print(line, file=file)

    contenders: list[Contender] = []
    for name in args.peers.split(","):
        try:
            contenders.append(Contender(name, args, setting, train))
        except Exception as error:  # a peer's troubles are not ours: the others are still measured
            if name in ("ours", "dense"):
                raise
            report({"part": name, "left_out": f"{type(error).__name__}: {error}"})
    gemm = measure(args, contenders, n_rounds)
    bounds = roofline(args, gemm)
    report({"part": "roofline", **bounds})
    for contender in contenders:
        contender.advance(args.extra_steps)
    quality = {contender.name: contender.quality(test) for contender in contenders}
    times = {contender.name: contender.seconds for contender in contenders}
    for contender in contenders:
        row: Row = {"part": contender.name, **contender.figures(), **quality[contender.name]}
        if "ours" in times:
            row["x_ours"] = statistics.median(a / b for a, b in zip(times[contender.name], times["ours"], strict=True))
        row |= {f"x_{name}": row["step_ms"] / bounds[f"{name}_ms"] for name in ("gemm", "dense", "sparse")}
        if "dense" in quality:
            row["fvu_x_dense"] = row["fvu"] / quality["dense"]["fvu"]
        version = {"version": importlib.metadata.version(package)} if (package := contender.peer.package) else {}
        report({**row, **version, "note": contender.peer.note})


def measure(args: argparse.Namespace, contenders: list[Contender], n_rounds: int) -> float:
    """Time all in turns; returns the median seconds of the encoder's product, timed between them."""
    dtype = torch.bfloat16 if args.dtype == "autocast" else torch.float32
    x = torch.randn(args.batch, args.d_in, device=args.device, dtype=dtype)
    W = torch.randn(args.d_sae, args.d_in, device=args.device, dtype=dtype)
    products = []
    x @ W.T  # warm
    for i in range(n_rounds):
        torch.set_float32_matmul_precision("highest")
        products.append(seconds(lambda: [x @ W.T for _ in range(args.block)], args.device) / args.block)
        at = i % max(len(contenders), 1)
        for contender in contenders[at:] + contenders[:at]:
            contender.turn()
    return statistics.median(products)


if __name__ == "__main__":
    main()
