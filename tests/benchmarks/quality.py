"""Dictionaries against ground truth, ours beside SAELens', on SAELens' synthetic worlds: JSON lines, a table last.

    sae bench quality --preset small
    sae bench quality --peers batchtopk,matryoshka --ours 'topk:k=8,lr=2e-3' --ours 'jumprelu:k=8,batch=1024'
    sae bench quality --full                                           # eight architectures at three k, hours
    sae bench quality --preset 16k --samples 50M --on-the-fly --sampler ours --peers '' --ours topk:k=25

A world is SAELens' SyntheticModel where SAELens is installed, and what judges is SAELens' own evaluation, of ours and
of the peers alike; else (`--judge ours`) the world is `data.planted`'s of the same recipe, and `sae.evals.truth`
judges. Samples come from a pool (--pool), or are drawn as training goes on (--on-the-fly). All dictionaries of a world
are trained in one pass over the same samples in the same order, each in batches of its own size, and all are judged on
the same ones.

ARCH:FIELD=VALUE,... takes fields of the architecture's config or of `sae.settings.Training` (--ours), fields of
SAELens' config, lr or batch (--peers); lists are written [16,64,256]. Several peers are separated by a semicolon, or by
a comma where none has fields.

A line is one dictionary in one view. `batch`: latents are chosen among all rows of an evaluation batch, as BatchTopK
and Matryoshka are trained and as SAELens' published numbers are; `saved`: each row by itself, as the saved dictionary
encodes. recall_with_child, recall_alone, absorption, split and latents_per_feature are always `sae.evals.truth`'s.
`seconds`: of training; ours of one batch size share the time that they took together. The table has mean and standard
deviation over worlds and seeds.
Controls: a random dictionary, principal components in both directions, the true directions of the most frequent
features (each with its transpose as encoder, and BatchTopK), and the true codes of those features.
"""

import argparse
import dataclasses
import math
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from activations.run import versions
from data.planted import WorldConfig
from sae.evals.truth import truth
from sae.registry import REGISTRY
from sae.settings import Training
from tests.benchmarks.lines import count, give_out, note, numbers
from tests.benchmarks.synthetic.dictionaries import Fields, Group, Ours, Preset, Theirs, View, controls, plan_of
from tests.benchmarks.synthetic.samples import Samples

STANDARD = ["batchtopk", "topk", "matryoshka", "jumprelu"]
TIMES = (0.5, 1.0, 2.0)
"""k of a full sweep, in units of the preset's."""
L1 = (2, 3, 4)
"""SAELens' coefficients for its L1 penalties in a full sweep, which follow no L0."""
FIRST_ROWS = 16_384
"""Rows from which ours take the scale and their first weights, and the controls their mean."""
COLUMNS = {
    **dict.fromkeys(["f1", "mcc", "ev"], 4),
    "l0": 2,
    **dict.fromkeys(["precision", "recall", "uniqueness", "absorption"], 4),
    **dict.fromkeys(["dead", "seconds"], 0),
}
"""Of the table, with their digits."""

_16K = WorldConfig(n_features=16_384, d_in=768, min_prob=5e-4, n_trees=128, rank=25)
_V1 = dataclasses.replace(_16K, scale_by_parent=False)
_NARROW = WorldConfig(d_in=96, min_prob=5e-4, scale_by_parent=False)
_WIDTHS = [128, 512, 2048, 4096]
PRESETS = {
    "small": Preset(WorldConfig(), 512, 8, 512, 1e-3, [16, 64, 256, 512], 1_536_000, 51_200),
    "small-full": Preset(_NARROW, 2048, 12, 512, 1e-3, [64, 256, 1024, 2048], 4_096_000, 51_200),
    "16k": Preset(_16K, 4096, 25, 1024, 3e-4, _WIDTHS, 200_000_000, 512_000),
    "16k-v1": Preset(_V1, 4096, 25, 1024, 3e-4, _WIDTHS, 200_000_000, 512_000),
    "full": Preset(_V1, 16_384, 40, 1024, 3e-4, [*_WIDTHS, 16_384], 200_000_000, 512_000),
}
"""16k is SynthSAEBench-16k as its paper has it; 16k-v1 as it was first published, where children keep their size
whatever their parent's; full: as many latents as features. small-full is like it in that, and in how many features
share a dimension, and small enough for a CPU."""


def run_world(args: argparse.Namespace, preset: Preset, seed: int) -> Iterator[Fields]:
    """Train all dictionaries of one world, and judge them."""
    alike: dict[int, list[tuple[str, Training]]] = {}  # before the world, which takes a while to build
    for name in args.ours:
        for own in args.seeds:
            plan = plan_of(name, preset, preset.n_samples, own, args.device)
            plan.config(preset.world.d_in)
            alike.setdefault(plan.batch, []).append((name, plan))
    began = time.perf_counter()
    world = dataclasses.replace(preset.world, seed=seed)
    samples = Samples(world, args.device, saelens=args.judge == "saelens", sampler=args.sampler)
    first = torch.cat([x for x, _ in samples.draw(FIRST_ROWS, 1024, seed=1_000_000 + seed)])
    note(f"world {seed}: built in {time.perf_counter() - began:.0f} s")
    groups: list[Group] = [Ours(plans, first) for plans in alike.values()]
    groups += [Theirs(name, preset, preset.n_samples, own, args.device) for name in args.peers for own in args.seeds]
    seconds = train(args, samples, groups, preset.n_samples, seed)
    facts = {
        "preset": args.preset,
        "world": seed,
        "d_sae": preset.d_sae,
        "samples": preset.n_samples,
        "pool": args.pool,
        "sampler": "saelens" if samples.by_saelens else "ours",
        "judge": args.judge,
        "n_eval": preset.n_eval,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "versions": {**versions(), **({"sae-lens": saelens_version()} if args.judge == "saelens" else {})},
    }
    latest: list[Tensor] = []
    for group, took in zip(groups, seconds, strict=True):
        for about, name, view in group.views():
            found = judged(samples, view, preset, args.judge, latest)
            yield {**about, "view": name, **found, "seconds": took / len(group.facts), **facts}
    if not args.no_controls:
        for name, view in controls(samples.world, preset.d_sae, preset.k, first, latest):
            found = judged(samples, view, preset, args.judge, latest)
            yield {"who": "control", "name": name, "seed": None, "view": "batch", **found, "seconds": 0.0, **facts}


def train(
    args: argparse.Namespace, samples: Samples, groups: Sequence[Group], n_samples: int, seed: int
) -> list[float]:
    """Feed the samples to all; returns the seconds of each group."""
    seconds = [0.0] * len(groups)
    if not groups:
        return seconds
    chunk = math.lcm(*(group.batch for group in groups))
    n_chunks = n_samples // chunk
    began = told = time.perf_counter()
    drawing = 0.0
    rows = samples.rows(n_chunks * chunk, chunk, args.pool, seed=2_000_000 + seed)
    for i in range(n_chunks):
        start = time.perf_counter()
        x = next(rows)
        sync(args.device)
        drawing += time.perf_counter() - start
        for place, group in enumerate(groups):
            start = time.perf_counter()
            for part in x.split(group.batch):
                group.step(part)
            sync(args.device)
            seconds[place] += time.perf_counter() - start
        if time.perf_counter() - told > 30:
            told = time.perf_counter()
            note(f"world {seed}: {(i + 1) / n_chunks:.1%} of the samples after {told - began:.0f} s")
    note(f"world {seed}: trained in {time.perf_counter() - began:.0f} s, {drawing:.0f} s of which to draw samples")
    return seconds


def judged(samples: Samples, view: View, preset: Preset, judge: str, latest: list[Tensor]) -> Fields:
    """All figures of one view; dead is the number of latents. latest: gets the true features of each batch."""

    def kept() -> Iterator[tuple[Tensor, Tensor]]:
        for x, z in samples.judged_on(preset.n_eval, preset.batch):
            latest[:] = [z]
            yield x, z

    found = truth(view, samples.world.directions, kept(), samples.world.parent)
    ours = {name.removeprefix("truth."): metric.value for name, metric in found.items()}
    ours["dead"] *= len(view.W_dec)
    if judge == "ours":
        return ours
    from tests.benchmarks.synthetic import saelens

    n = preset.n_eval // preset.batch * preset.batch
    return {**ours, **saelens.judge(view, samples.model, (z for _, z in kept()), n, preset.batch)}


def table(rows: Sequence[Fields]) -> str:
    """A line a method: means and standard deviations over worlds and seeds."""
    methods: dict[tuple[str, str, str], list[Fields]] = {}
    for row in rows:
        methods.setdefault((row["who"], row["name"], row["view"]), []).append(row)
    lines = [f"| who | dictionary | view | n | {' | '.join(COLUMNS)} |", "|---" * (4 + len(COLUMNS)) + "|"]
    for method, members in methods.items():
        cells = [_cell([row[name] for row in members if name in row], digits) for name, digits in COLUMNS.items()]
        lines.append(f"| {' | '.join(method)} | {len(members)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    if not values or any(map(math.isnan, values)):
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def sync(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def saelens_version() -> str | None:
    try:
        return version("sae-lens")
    except PackageNotFoundError:
        return None


def names(text: str) -> list[str]:
    return [part for part in (text.split(";") if ":" in text else re.split("[;,]", text)) if part]


def sweep(k: float) -> tuple[list[str], list[str]]:
    """(ours, SAELens') of a full sweep: the eight architectures that both have, by L0."""
    sizes = [max(round(times * k), 1) for times in TIMES]
    topk = [f"{arch}:k={size}" for arch in ("topk", "abstopk", "batchtopk", "matryoshka") for size in sizes]
    penalised = [f"{arch}:k={size}" for arch in ("jumprelu", "gated", "standard") for size in sizes]
    ours = [*topk, *(f"matching_pursuit:k={size}" for size in sizes), *penalised]
    peers = [*topk, *(f"mp:max_iterations={size}" for size in sizes), *(f"jumprelu:target_l0={size}" for size in sizes)]
    return ours, [*peers, *(f"{arch}:l1_coefficient={weight}" for arch in ("gated", "standard") for weight in L1)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = ", ".join(name for name in STANDARD if name in REGISTRY)
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--ours", action="append", help=f"may be repeated; '' for none [default: {here}]")
    parser.add_argument("--peers", type=names, help=f"'' for none [default: {', '.join(STANDARD)}]")
    parser.add_argument("--full", action="store_true", help="every architecture that SAELens has too, at several k")
    parser.add_argument("-k", type=float, help="active latents a row, of all that say nothing else")
    parser.add_argument("--d-sae", type=int)
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="of the dictionaries, such as 0,1,2")
    parser.add_argument("--worlds", type=numbers, default=[42], help="seeds of the worlds")
    parser.add_argument("--samples", type=count, help="to train on, such as 50M")
    parser.add_argument("--pool", type=count, default=409_600, help="samples drawn before, and read again and again")
    parser.add_argument("--on-the-fly", action="store_true", help="draw each sample once, while training goes on")
    parser.add_argument("--sampler", default="saelens", choices=["saelens", "ours"], help="of SAELens' world")
    parser.add_argument("--judge", choices=["saelens", "ours"], help="default: SAELens where it is installed")
    parser.add_argument("--eval-samples", type=count)
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here too")
    args = parser.parse_args(argv)
    args.judge = args.judge or ("saelens" if saelens_version() else "ours")
    if args.judge == "ours" and args.peers:
        parser.error("--peers needs SAELens: pip install sae-lens in an environment of its own")
    if args.full:
        preset = PRESETS[args.preset]
        ours, peers = sweep(args.k or preset.k)
        args.ours, args.peers = (
            args.ours or ours,
            peers if args.peers is None and args.judge == "saelens" else args.peers,
        )
    if args.peers is None:
        args.peers = STANDARD if args.judge == "saelens" else []
    args.ours = [name for name in STANDARD if name in REGISTRY] if args.ours is None else list(filter(None, args.ours))
    args.pool = None if args.on_the_fly else args.pool
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    changes = {"k": args.k, "d_sae": args.d_sae, "n_samples": args.samples, "n_eval": args.eval_samples}
    preset = PRESETS[args.preset]._replace(**{name: value for name, value in changes.items() if value})
    rows = give_out((row for seed in args.worlds for row in run_world(args, preset, seed)), args.out)
    note(table(rows))


if __name__ == "__main__":
    main()
