"""Capture beside its ceiling (the model alone), the disk and SAELens' own cache: JSON lines, medians over rounds.

    python -m tests.benchmarks.capture [--device cuda] [--tokens 2000000] [--corpus FILE] [--peer-python PATH]

bare: the blocks up to the layer, ids on the device, nothing kept; the best of a few batch sizes is the ceiling.
ours: `collect` to disk, wall time with hashes, fsync and manifests, without tokenising and loading the model.
saelens: CacheActivationsRunner.run(), which caches one hook a run: four hooks are four runs, summed. It neither
hashes nor waits for the disk; `sync_seconds` is what the disk still had to do. Every variant runs once, the best in
each round.
disk: one big file, 1 MiB blocks, fsync at the end. read: shuffled batches over two epochs, from the page cache.
memory (with --budget-mib): peak memory of a capture whose cache is 20 times that budget.

All parts take turns in each round, so that a change of the machine's load meets all alike; `share_of_bare` is the
median of the rounds' ratios. The model must be of Llama's shape (`model.layers`).
"""

import argparse
import contextlib
import copy
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from activations import embedded
from activations.cache import training_mask
from activations.capture import collect
from activations.model import DTYPES, Model, load_model
from activations.run import Run, versions
from activations.shuffle import Shuffled
from data.corpora import read_corpus
from data.tokens import Context, pack, separator_of

CONTEXT = 128
BATCHES = {"cpu": [(32, 128), (64, 128), (16, 256)], "cuda": [(256, 128), (512, 128), (1024, 128)]}  # rows, length
TOKENS = {"cpu": 65_536, "cuda": 2_097_152}
PEER = Path(__file__).parent / "peers" / "saelens_cache.py"
PEER_VENV = "python3 -m venv /tmp/peers && /tmp/peers/bin/pip install torch==2.13.0 'sae-lens==6.54.*' transformer-lens"
VARIANTS = [
    f"{model_class}/{dtypes}"
    for model_class in ("AutoModelForCausalLM", "HookedTransformer")
    for dtypes in ("bfloat16/float16", "bfloat16/float32", "autocast/float16", "float32/float32")  # model's, on disk
]

Row = dict[str, Any]


def hooks_of(layer: int, count: int) -> list[str]:
    """`count` hooks, the deepest at `layer`; all of them outputs of modules, since SAELens reads no others by name."""
    points = [(layer, "resid_post"), (layer * 2 // 3, "resid_post"), (layer - 3, "mlp_out"), (layer - 1, "attn_out")]
    return [f"blocks.{block}.hook_{point}" for block, point in points[:count]]


def truncated(model: Model, layer: int) -> nn.Module:
    """The blocks up to `layer` of the same weights, without final norm and unembedding."""
    base = copy.copy(model.hf.model)
    base._modules = {**base._modules, "layers": base.layers[: layer + 1], "norm": nn.Identity()}
    return base


@torch.inference_mode()
def bare(blocks: nn.Module, ids: Tensor, rows: int, length: int, n_tokens: int) -> Row:
    batches = ids.flatten().split(rows * length)[: max(n_tokens // (rows * length), 1)]
    with clock(ids.device) as seconds:
        for batch in batches:
            blocks(input_ids=batch.view(-1, length), use_cache=False)
    return {"tokens_per_s": sum(batch.numel() for batch in batches) / seconds[0]}


def ours(args: argparse.Namespace, model: Model, hooks: Sequence[str], contexts: Sequence[Context]) -> Row:
    folder = args.folder / "ours"
    shutil.rmtree(folder, ignore_errors=True)
    run = new_run(args, model, folder, len(contexts))
    with peak_memory() as memory, clock(model.device) as seconds:
        collect(run, model, hooks, contexts, dtype=args.dtype)
    n_tokens = len(contexts) * CONTEXT
    return {"tokens_per_s": n_tokens / seconds[0], "bytes_per_token": size(folder / "activations") / n_tokens, **memory}


def new_run(args: argparse.Namespace, model: Model, folder: Path, n_contexts: int) -> Run:
    return Run.create(
        folder,
        model=model.name,
        revision=model.revision,
        model_dtype=args.dtype,
        corpus=args.corpus,
        corpus_hash="",
        context=CONTEXT,
        n_tokens=n_contexts * CONTEXT,
    )


def read(args: argparse.Namespace, hook: str) -> Row:
    """Reads what `ours` has just written."""
    cache = Run.open(args.folder / "ours").activations(hook)
    n_batches = 2 * sum(int(training_mask(cache, i).sum()) for i in range(cache.n_shards)) // 4096
    with clock() as first:
        batches = Shuffled(cache, batch=4096, seed=0).batches()
        next(batches)
    with clock() as seconds:
        n_bytes = sum(rows[hook].nbytes for rows, _ in itertools.islice(batches, n_batches))
    return {"first_batch_s": first[0], "gb_per_s": n_bytes / seconds[0] / 1e9, "batches": n_batches}


def disk(args: argparse.Namespace) -> Row:
    block, path = os.urandom(1 << 20), args.folder / "disk"
    with clock() as seconds, path.open("wb", buffering=0) as file:
        for _ in range(args.disk_mib):
            file.write(block)
        os.fsync(file.fileno())
    path.unlink()
    return {"gb_per_s": args.disk_mib * len(block) / seconds[0] / 1e9, "mib": args.disk_mib}


def saelens(args: argparse.Namespace, hooks: Sequence[str], variant: str, batch: int) -> Row:
    """One process that caches `hooks` one after another; `tokens_per_s` counts a token once, whatever the hooks."""
    model_class, model_dtype, dtype = variant.split("/")
    autocast = ["--autocast"] if model_dtype == "autocast" else []
    options = {
        "model": embedded.model_folder() if args.model == embedded.NAME else args.model,
        "model-class": model_class,
        "model-dtype": "float32" if autocast else model_dtype,
        "dtype": dtype,
        "ids": args.folder / "ids.npy",
        "out": args.folder / "saelens",
        "batch": batch,
        "device": args.device,
        "threads": torch.get_num_threads(),
    }
    command = [args.peer_python, str(PEER), *autocast, *(f"--{name}={value}" for name, value in options.items())]
    os.sync()
    done = subprocess.run([*command, "--hooks", *hooks], capture_output=True, text=True)
    shutil.rmtree(args.folder / "saelens", ignore_errors=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    row = json.loads(done.stdout.splitlines()[-1])
    n_tokens = row["tokens_written"]
    return {"tokens_per_s": n_tokens / row["seconds"], "bytes_per_token": row["bytes"] / n_tokens, **row}


def memory(args: argparse.Namespace, model: Model, contexts: Sequence[Context]) -> Row:
    """At the first block, since the depth costs time and no memory; the corpus goes round."""
    budget = args.budget_mib << 20
    n_contexts = 20 * budget // (model.d_model * DTYPES[args.dtype].itemsize * CONTEXT)
    run = new_run(args, model, args.folder / "memory", n_contexts)
    stream = itertools.islice(itertools.cycle(contexts), n_contexts)
    with peak_memory() as found:
        collect(run, model, ["blocks.0.hook_resid_post"], stream, dtype=args.dtype, memory=budget)
    cache = size(run.path / "activations")
    shutil.rmtree(run.path)
    return {"budget_gb": budget / 1e9, "cache_gb": cache / 1e9, **found}


@contextlib.contextmanager
def clock(device: torch.device | None = None) -> Iterator[list[float]]:
    """Yields a list that holds the seconds of the block after it; what was written before is on the disk by then."""
    seconds: list[float] = []
    on_gpu = device is not None and device.type == "cuda"
    os.sync()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield seconds
    if on_gpu:
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)


@contextlib.contextmanager
def peak_memory() -> Iterator[Row]:
    """Yields a dict that holds the process' peak RSS of the block after it, and its rise (Linux)."""
    found: Row = {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here again
    before = _status("VmRSS")
    yield found
    found |= {"peak_rss_gb": _status("VmHWM"), "rss_rise_gb": _status("VmHWM") - before}


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024 / 1e9


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def about(args: argparse.Namespace) -> Row:
    cpu = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": args.device,
        "dtype": args.dtype,
        "model": args.model,
        "layer": args.layer,
        "tokens": args.tokens,
        "versions": versions(),
    }


def pick_variant(args: argparse.Namespace, report: Callable[[Row], None]) -> tuple[str, int] | None:
    """SAELens' fastest variant, then its fastest batch; every one runs once and is reported."""
    sizes = sorted({rows * length // CONTEXT for rows, length in BATCHES[args.device]})
    found: dict[tuple[str, int], float] = {}

    def trial(variant: str, batch: int) -> None:
        row = saelens(args, hooks_of(args.layer, 1), variant, batch)
        report({"part": "saelens", "trial": True, "variant": variant, "batch": batch, **row})
        if "tokens_per_s" in row:
            found[variant, batch] = row["tokens_per_s"]

    for variant in args.peer_variants:
        trial(variant, sizes[-1])
    if found:
        fastest = max(found, key=found.__getitem__)[0]
        for batch in sizes[:-1]:
            trial(fastest, batch)
    return max(found, key=found.__getitem__) if found else None


def summary(rows: list[Row], ceiling: list[Row] | None) -> Row:
    """Medians of all that was measured in the rounds, and each round's speed."""
    numbers = [key for key, value in rows[0].items() if isinstance(value, (int, float))]
    found: Row = {key: statistics.median(row[key] for row in rows) for key in numbers}
    if "tokens_per_s" in found:
        found["rounds"] = [round(row["tokens_per_s"]) for row in rows]
        if ceiling:
            ratios = [row["tokens_per_s"] / top["tokens_per_s"] for row, top in zip(rows, ceiling, strict=True)]
            found["share_of_bare"] = statistics.median(ratios)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="bare,ours,saelens,disk,read", help="comma-separated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=list(BATCHES))
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES), help="of the model, and of our rows")
    parser.add_argument("--model", default=embedded.NAME)
    parser.add_argument("--corpus", default="sample")
    parser.add_argument("--tokens", type=int, help="default: 65,536 on a CPU, 2,097,152 on a GPU")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--hooks", default="1,4", help="how many hooks at once, comma-separated, at most 4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk-mib", type=int, default=1024, help="size of the file of `disk`")
    parser.add_argument("--budget-mib", type=int, help="runs `memory`; give --parts '' to run nothing else")
    parser.add_argument("--peer-python", help="Python of an environment with SAELens")
    parser.add_argument("--peer-variants", nargs="+", default=VARIANTS, help="class/dtype of the model/dtype on disk")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here too")
    args = parser.parse_args()
    args.tokens = (args.tokens or TOKENS[args.device]) // CONTEXT * CONTEXT
    args.folder = Path(tempfile.mkdtemp(prefix="capture-", dir=args.folder))
    return args


def main() -> None:
    args = parse()
    facts = about(args)

    def report(row: Row) -> None:
        line = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in {**row, **facts}.items()})
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                print(line, file=file)

    try:
        measure(args, report)
    finally:
        shutil.rmtree(args.folder)


def measure(args: argparse.Namespace, report: Callable[[Row], None]) -> None:
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    documents, separator = read_corpus(args.corpus), separator_of(model.tokenizer)
    contexts = [*pack(documents, model.tokenizer, context=CONTEXT, n_tokens=args.tokens, separator_id=separator)]
    assert len(contexts) == args.tokens // CONTEXT, f"the corpus has only {len(contexts) * CONTEXT} tokens"
    if args.budget_mib:
        report({"part": "memory", **memory(args, model, contexts)})

    parts: dict[str, Callable[[], Row]] = {}  # what takes turns, by its name and setting
    wanted = [part for part in args.parts.split(",") if part]
    blocks, stacked = truncated(model, args.layer), np.stack([context.ids for context in contexts])
    ids = torch.from_numpy(stacked).long().to(model.device)
    shapes = [shape for shape in BATCHES[args.device] if shape[0] * shape[1] <= args.tokens]
    for shape in shapes if "bare" in wanted else []:
        bare(blocks, ids, *shape, n_tokens=1)  # warm
        parts["bare {}x{}".format(*shape)] = lambda shape=shape: bare(blocks, ids, *shape, args.tokens // len(shapes))
    counts = sorted(map(int, args.hooks.split(",")), reverse=True)  # one hook last: `read` reads it
    for count in counts if "ours" in wanted else []:
        hooks = hooks_of(args.layer, count)
        ours(args, model, hooks, contexts[:64])  # warm
        parts[f"ours {count}"] = lambda hooks=hooks: ours(args, model, hooks, contexts)
    if "read" in wanted and "ours" in wanted:
        parts["read"] = lambda: read(args, hooks_of(args.layer, 1)[0])
    if "disk" in wanted:
        parts["disk"] = lambda: disk(args)
    best = None
    if "saelens" in wanted and args.peer_python:
        np.save(args.folder / "ids.npy", stacked)
        best = pick_variant(args, report)
        for count in counts if best else []:
            hooks = hooks_of(args.layer, count)
            parts[f"saelens {count}"] = lambda hooks=hooks, best=best: saelens(args, hooks, *best)
    elif "saelens" in wanted:
        report({"part": "saelens", "skipped": f"give --peer-python /tmp/peers/bin/python, made by: {PEER_VENV}"})

    found: dict[str, list[Row]] = {name: [] for name in parts}
    for number in range(args.rounds):
        for name, part in parts.items():
            found[name].append(part())
            print(f"round {number}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    bares = {name: found[name] for name in found if name.startswith("bare")}
    ceiling = max(bares.values(), key=lambda rows: statistics.median(row["tokens_per_s"] for row in rows), default=None)
    for name, rows in found.items():
        part, _, setting = name.partition(" ")
        shown: Row = {"part": part}
        if part == "bare":
            shown |= {"batch": setting, "ceiling": rows is ceiling}
        elif setting:
            shown["hooks"] = int(setting)
        if part == "saelens" and best:
            shown |= {"variant": best[0], "batch": best[1], "versions_of_peer": rows[0].get("versions_of_peer")}
        errors = {row["error"]: None for row in rows if "error" in row}
        report({**shown, **({"errors": [*errors]} if errors else summary(rows, ceiling))})


if __name__ == "__main__":
    main()
