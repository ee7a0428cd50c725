"""Dictionaries against ground truth, ours beside SAELens', on SAELens' synthetic worlds: JSON lines, a table last.

    sae bench quality --preset small --peers batchtopk,matryoshka --ours topk --ours 'jumprelu:target_l0=8,lr=2e-3'
    sae bench quality --preset 16k --samples 50M --on-the-fly --seeds 0,1,2 --peers '' --ours topk:k=25,batch=2048

A world is SAELens' SyntheticModel where SAELens is installed, and what judges is SAELens' own evaluation, of ours and
of the peers alike; else (--judge ours) the world is `data.planted`'s of the same recipe and `sae.evals.truth` judges.
Samples come from a pool shared by all (--pool), or are drawn as training goes on (--on-the-fly); all dictionaries of a
world are trained in one pass and see the same samples in the same order, each in batches of its own.

--ours ARCH:FIELD=VALUE,...: fields of the architecture's config or of `sae.settings.Training`; lists as [16,64,256].
--peers ARCH:FIELD=VALUE,...: fields of SAELens' config, and lr and batch; several are separated by a semicolon, or by
a comma when none has fields.

Each line is one dictionary in one view. `batch`: latents chosen among all rows of an evaluation batch, as BatchTopK and
Matryoshka are trained (SAELens' published numbers are these); `saved`: each row by itself, as the saved dictionary
encodes. `parent recall`, `absorption` and `split` are `sae.evals.truth`'s. `seconds`: of training; ours of one batch
size take turns within it, and share it evenly. The table has the mean and standard deviation over worlds and seeds.
Controls: a random dictionary, the true one of the most frequent features with its transpose as encoder (both with
BatchTopK), principal components, and the true codes.
"""

import argparse
import dataclasses
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from activations.model import fast_dtype
from activations.run import versions
from data.planted import World, WorldConfig, build_world
from sae.base import SAE
from sae.evals.truth import truth
from sae.registry import REGISTRY
from sae.settings import Training
from sae.stack import Together
from sae.stepper import Stepper

Row = dict[str, Any]
COUNT_DEAD_EVERY = 20
"""Steps, as `sae train` does."""
FIRST_ROWS = 16_384
"""Rows from which ours take the scale and their first weights."""
EVAL_SEED = 777
MEASURES = ["f1", "mcc", "ev", "l0", "precision", "recall", "uniqueness", "dead", "absorption", "seconds"]


class Preset(NamedTuple):
    world: WorldConfig
    d_sae: int
    k: int
    batch: int
    lr: float
    """Of the peers: the published one; for `small` the best of those tried."""
    widths: list[int]
    """Prefixes of the peers' Matryoshka."""
    n_samples: int
    n_eval: int


_16K = WorldConfig(n_features=16_384, d_in=768, min_prob=5e-4, n_trees=128, rank=25)
_V1 = dataclasses.replace(_16K, scale_by_parent=False)
_WIDTHS = [128, 512, 2048, 4096]
PRESETS = {
    "small": Preset(WorldConfig(), 512, 8, 512, 1e-3, [16, 64, 256, 512], 1_536_000, 51_200),
    "16k": Preset(_16K, 4096, 25, 1024, 3e-4, _WIDTHS, 200_000_000, 512_000),
    "16k-v1": Preset(_V1, 4096, 25, 1024, 3e-4, _WIDTHS, 200_000_000, 512_000),
    "full": Preset(_V1, 16_384, 40, 1024, 3e-4, [*_WIDTHS, 16_384], 200_000_000, 512_000),
}


class Source:
    """Samples of a world: SAELens' own when it has one, else ours."""

    def __init__(self, config: WorldConfig, device: str, saelens: bool, sampler: str) -> None:
        self.device, self.model = device, None
        if saelens:
            from tests.benchmarks.peers import saelens_synthetic

            self.model: Any = saelens_synthetic.synthetic_model(config, device)
            self.world: World = saelens_synthetic.as_world(self.model, config)
        else:
            self.world = build_world(config).to(device)
        self.theirs = saelens and sampler == "saelens"

    def draw(self, n: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """n samples as (x, z), a batch at a time; the same for the same seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        devices = [torch.device(self.device)] if self.device != "cpu" else []
        with torch.random.fork_rng(devices, enabled=self.theirs):
            torch.manual_seed(seed)
            state = _rng(self.device)
        for _ in range(n // batch):
            if not self.theirs:
                yield self.world.sample(batch, generator)
                continue
            # SAELens draws from the global generator: it is ours for the time of the call alone.
            with torch.random.fork_rng(devices):
                _rng(self.device, state)
                samples = self.model.sample_with_features(batch)
                state = _rng(self.device)
            yield samples

    def rows(self, n: int, batch: int, pool: int | None, seed: int) -> Iterator[Tensor]:
        """n rows to train on. pool: so many are drawn, and read again and again in new orders; None: each once."""
        if pool is None:
            yield from (x for x, _ in self.draw(n, batch, seed))
            return
        drawn = torch.cat([x for x, _ in self.draw(pool, min(pool, 8192), seed)])
        generator = torch.Generator().manual_seed(seed)
        left = n // batch
        while left:
            for places in torch.randperm(len(drawn), generator=generator).to(self.device).split(batch)[:left]:
                if len(places) == batch:
                    yield drawn[places]
                    left -= 1


def _rng(device: str, state: Tensor | None = None) -> Tensor:
    """The state of the global generator that a device draws from, after it was set to `state` if one is given."""
    if device == "cpu":
        if state is not None:
            torch.set_rng_state(state)
        return torch.get_rng_state()
    if state is not None:
        torch.cuda.set_rng_state(state)
    return torch.cuda.get_rng_state()


class View(NamedTuple):
    """A way to encode with a dictionary, in the form that both judges ask for."""

    W_dec: Tensor
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]

    def eval(self) -> None: ...


class Group(Protocol):
    """Dictionaries that take their steps together."""

    batch: int
    facts: list[Row]
    """Of each dictionary."""

    def step(self, x: Tensor) -> None: ...
    def views(self) -> Iterator[tuple[Row, str, View]]: ...


class Ours:
    """Dictionaries of the registry with one batch size."""

    def __init__(self, settings: Sequence[tuple[str, Training]], first: Tensor) -> None:
        self.batch = settings[0][1].batch
        scale = math.sqrt(first.shape[1]) / float(first.norm(dim=1).mean())
        self.facts, self.steppers = [], []
        for name, plan in settings:
            sae = REGISTRY[plan.architecture].sae(plan.config(first.shape[1]))
            sae.initialise(first.cpu() * scale, plan.seed)
            self.steppers.append(Stepper(sae.to(first.device), plan, scale))
            self.facts.append({"who": "ours", "name": name, "seed": plan.seed, "settings": _differences(plan)})
        self.together = Together(self.steppers)

    def step(self, x: Tensor) -> None:
        self.together.step(x)
        for stepper in self.steppers:
            if stepper.settings.resamples_at(stepper.n_steps_done - 1):
                stepper.resample(x)
            if stepper.n_steps_done % COUNT_DEAD_EVERY == 0:
                stepper.recount()

    def views(self) -> Iterator[tuple[Row, str, View]]:
        for facts, stepper in zip(self.facts, self.steppers, strict=True):
            sae = stepper.finish().requires_grad_(False)
            yield facts, "saved", View(sae.W_dec, sae.encode, sae.decode)
            if hasattr(sae, "threshold") and hasattr(sae.cfg, "k"):
                yield facts, "batch", View(sae.W_dec, _batch_encoder(sae, sae.cfg.k), sae.decode)


def _batch_encoder(sae: SAE, k: float) -> Callable[[Tensor], Tensor]:
    """As a dictionary with thresholds and a k was trained: the k n largest of all latents of n rows."""

    def encode(x: Tensor) -> Tensor:
        threshold = sae.threshold.clone()
        sae.threshold.data.zero_()
        z = sae.encode(x)
        sae.threshold.data.copy_(threshold)
        return batch_topk(z, k)

    return encode


def batch_topk(z: Tensor, k: float) -> Tensor:
    """The k n largest entries of z (n, d_sae), the others 0; none below 0."""
    flat = z.relu().flatten()
    kept = flat.topk(int(k * len(z)))
    return torch.zeros_like(flat).scatter_(0, kept.indices, kept.values).view_as(z)


class Theirs:
    """One of SAELens' dictionaries."""

    def __init__(self, name: str, preset: Preset, n_samples: int, seed: int, device: str) -> None:
        from tests.benchmarks.peers.saelens_synthetic import Peer

        arch, fields = parsed(name)
        self.batch = int(fields.pop("batch", preset.batch))
        lr = fields.pop("lr", preset.lr)
        sizes = {"d_in": preset.world.d_in, "d_sae": preset.d_sae, "device": device, **_peer_sizes(arch, preset)}
        sizes |= fields
        self.peer = Peer(arch, sizes, n_steps=n_samples // self.batch, batch=self.batch, lr=lr, seed=seed)
        self.arch = arch
        settings = {**sizes, "lr": lr, "batch": self.batch}
        self.facts = [{"who": "saelens", "name": name, "seed": seed, "settings": settings}]

    def step(self, x: Tensor) -> None:
        self.peer.step(x)

    def views(self) -> Iterator[tuple[Row, str, View]]:
        sae = self.peer.sae.requires_grad_(False).eval()
        in_batch = self.arch in ("batchtopk", "matryoshka")
        yield self.facts[0], "batch" if in_batch else "saved", View(sae.W_dec, sae.encode, sae.decode)
        if in_batch:
            saved = self.peer.saved()
            yield self.facts[0], "saved", View(saved.W_dec, saved.encode, saved.decode)


def _peer_sizes(arch: str, preset: Preset) -> Row:
    """What SAELens' dictionaries are built with, where its defaults are not for these worlds."""
    if arch == "matryoshka":
        return {"k": preset.k, "matryoshka_widths": list(preset.widths), "use_matryoshka_aux_loss": True}
    if arch == "jumprelu":
        return {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(preset.k), "l0_coefficient": 1.0}
    if arch == "abstopk":
        return {"k": preset.k}
    return {"k": preset.k} if "topk" in arch else {}


def controls(source: Source, preset: Preset, k: float, first: Tensor, latest: list[Tensor]) -> Iterator[tuple[str, View]]:
    """Dictionaries that nobody trained. latest: where the judge's last true features are, for those that look."""
    world, mean = source.world, first.mean(dim=0)

    def tied(W_dec: Tensor, b_dec: Tensor) -> View:
        return View(W_dec, lambda x: batch_topk((x - b_dec) @ W_dec.T, k), lambda z: z @ W_dec + b_dec)

    generator = torch.Generator().manual_seed(0)
    random = torch.randn(preset.d_sae, world.d_in, generator=generator).to(first.device)
    yield "random dictionary", tied(random / random.norm(dim=1, keepdim=True), mean)
    components = torch.linalg.eigh(torch.cov((first - mean).T)).eigenvectors.T.flip(0)
    both = torch.cat([components, -components])[: max(preset.d_sae, 1)]
    yield "principal components", tied(both, mean)
    true = world.directions[: preset.d_sae]
    yield "true dictionary, tied", tied(true, world.bias)
    yield "true codes", View(true, lambda _: latest[0][:, : preset.d_sae], lambda z: z @ true + world.bias)


def judged(source: Source, view: View, preset: Preset, n: int, judge: str, latest: list[Tensor]) -> Row:
    """All figures of one dictionary in one view, on samples that are the same for all."""

    def samples() -> Iterator[tuple[Tensor, Tensor]]:
        for x, z in source.draw(n, preset.batch, EVAL_SEED):
            latest[:] = [z]
            yield x, z

    world = source.world
    ours = {name.partition(".")[2]: m.value for name, m in truth(view, world.directions, samples(), world.parent).items()}
    ours["dead"] *= len(view.W_dec)
    if judge == "ours":
        return {**ours, "judge": "sae.evals.truth"}
    from tests.benchmarks.peers.saelens_synthetic import judge as by_saelens

    theirs = by_saelens(view, source.model, (z for _, z in samples()), n // preset.batch * preset.batch, preset.batch)
    return {**ours, **theirs, "judge": "saelens"}


def parsed(text: str) -> tuple[str, Row]:
    """ "arch:a=1,b=[2,3]" as ("arch", {"a": 1, "b": [2, 3]})."""
    arch, _, options = text.partition(":")
    fields: Row = {}
    for part in filter(None, re.split(r",(?![^\[]*\])", options)):
        name, equals, value = part.partition("=")
        if not equals:
            raise SystemExit(f"{part!r} in {text!r} has no value: expected NAME=VALUE.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return arch, fields


def settings_of(text: str, preset: Preset, n_samples: int, seed: int, device: str) -> Training:
    """The training that --ours asks for. Raises InputError for sizes that cannot be."""
    arch, fields = parsed(text)
    if arch not in REGISTRY:
        raise SystemExit(f"{arch!r} is no architecture: expected one of {', '.join(REGISTRY)}.")
    known = {field.name for field in dataclasses.fields(Training)}
    chosen = {name: fields.pop(name) for name in list(fields) if name in known}
    sizes = {"d_sae": preset.d_sae, REGISTRY[arch].sparsity: preset.k, **fields}
    matmul = str(fast_dtype(torch.device(device))).removeprefix("torch.") if device != "cpu" else "float32"
    chosen = {"batch": preset.batch, "matmul": matmul, "seed": seed, **chosen}
    return Training(architecture=arch, hook="", sizes=sizes, n_tokens=n_samples, **chosen)


def _differences(plan: Training) -> Row:
    plain = Training(architecture=plan.architecture, hook="", sizes={}, n_tokens=plan.n_tokens)
    return {name: value for name, value in vars(plan).items() if value != getattr(plain, name)}


def run_world(args: argparse.Namespace, preset: Preset, seed: int) -> Iterator[Row]:
    """Train all dictionaries of one world, and measure them."""
    began = time.perf_counter()
    config = dataclasses.replace(preset.world, seed=seed)
    source = Source(config, args.device, args.judge == "saelens", args.sampler)
    first = torch.cat([x for x, _ in source.draw(FIRST_ROWS, preset.batch, seed=1_000_000 + seed)])
    plans: dict[int, list[tuple[str, Training]]] = {}
    for name in args.ours:
        for dictionary_seed in args.seeds:
            plan = settings_of(name, preset, args.samples, dictionary_seed, args.device)
            plans.setdefault(plan.batch, []).append((name, plan))
    groups: list[Group] = [Ours(plan, first) for plan in plans.values()]
    groups += [Theirs(name, preset, args.samples, s, args.device) for name in args.peers for s in args.seeds]
    note(f"world {seed}: built in {time.perf_counter() - began:.0f} s")
    seconds = train(args, source, groups, seed)
    facts = {
        "preset": args.preset,
        "world": seed,
        "d_sae": preset.d_sae,
        "samples": args.samples,
        "pool": args.pool,
        "sampler": "saelens" if source.theirs else "ours",
        "n_eval": args.eval_samples,
        "device": torch.cuda.get_device_name() if args.device != "cpu" else f"cpu, {torch.get_num_threads()} threads",
        "versions": {**versions(), **_saelens_version()},
    }
    latest: list[Tensor] = []
    for group in groups:
        for about, view_name, view in group.views():
            row = judged(source, view, preset, args.eval_samples, args.judge, latest)
            yield {**about, "view": view_name, **row, "seconds": seconds[id(group)] / len(group.facts), **facts}
    if not args.no_controls:
        for name, view in controls(source, preset, args.k, first, latest):
            row = judged(source, view, preset, args.eval_samples, args.judge, latest)
            yield {"who": "control", "name": name, "seed": 0, "view": "batch", **row, "seconds": 0.0, **facts}


def train(args: argparse.Namespace, source: Source, groups: Sequence[Group], seed: int) -> dict[int, float]:
    """Feed the samples to all; returns the seconds of each group, by id."""
    seconds = {id(group): 0.0 for group in groups}
    if not groups:
        return seconds
    chunk = math.lcm(*(group.batch for group in groups))
    n_chunks, began, told = args.samples // chunk, time.perf_counter(), time.perf_counter()
    drawing = 0.0
    rows = source.rows(n_chunks * chunk, chunk, args.pool, seed=2_000_000 + seed)
    for i in range(n_chunks):
        start = time.perf_counter()
        x = next(rows)
        _sync(args.device)
        drawing += time.perf_counter() - start
        for group in groups:
            start = time.perf_counter()
            for part in x.split(group.batch):
                group.step(part)
            _sync(args.device)
            seconds[id(group)] += time.perf_counter() - start
        if time.perf_counter() - told > 30:
            told, share = time.perf_counter(), (i + 1) / n_chunks
            left = (told - began) * (1 - share) / share
            note(f"world {seed}: {share:.1%}, {left:.0f} s left; drawing samples took {drawing:.0f} s so far")
    note(f"world {seed}: trained in {time.perf_counter() - began:.0f} s, of which {drawing:.0f} s to draw samples")
    return seconds


def _sync(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _saelens_version() -> Row:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"sae-lens": version("sae-lens")}
    except PackageNotFoundError:
        return {}


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[Row]) -> str:
    """Means and standard deviations over worlds and seeds, a line a method."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["who"], row["name"], row["view"]), []).append(row)
    lines = ["| who | dictionary | view | n | " + " | ".join(MEASURES) + " |", "|---" * (4 + len(MEASURES)) + "|"]
    for (who, name, view), members in groups.items():
        cells = []
        for measure in MEASURES:
            values = [row[measure] for row in members if measure in row and not math.isnan(row[measure])]
            if not values:
                cells.append("-")
                continue
            digits = 4 if measure not in ("l0", "dead", "seconds") else 2 if measure == "l0" else 0
            sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{sd}")
        lines.append(f"| {who} | {name} | {view} | {len(members)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def count(text: str) -> int:
    """ "1.5M" as 1500000."""
    factor = {"k": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:], 1)
    return round(float(text.rstrip("kMB")) * factor)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def names(text: str) -> list[str]:
        return [part for part in (text.split(";") if ":" in text else re.split("[;,]", text)) if part]

    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--ours", action="append", default=[], metavar="ARCH[:FIELD=VALUE,...]", help="may be repeated")
    parser.add_argument("--peers", type=names, default=None, help="of SAELens; default: batchtopk,topk,matryoshka,jumprelu")
    parser.add_argument("-k", type=float, help="active latents a row of all that say nothing else")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="of the dictionaries")
    parser.add_argument("--worlds", type=numbers, default=[42], help="seeds of the worlds")
    parser.add_argument("--samples", type=count, help="to train on; such as 50M")
    parser.add_argument("--pool", type=count, default=409_600, help="samples drawn before and read again and again")
    parser.add_argument("--on-the-fly", action="store_true", help="draw new samples all the time instead")
    parser.add_argument("--sampler", default="saelens", choices=["saelens", "ours"], help="ours is faster")
    parser.add_argument("--judge", choices=["saelens", "ours"], help="default: saelens where it is installed")
    parser.add_argument("--eval-samples", type=count)
    parser.add_argument("--d-sae", type=int)
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here too")
    args = parser.parse_args(argv)
    args.judge = args.judge or ("saelens" if _saelens_version() else "ours")
    if args.peers is None:
        args.peers = ["batchtopk", "topk", "matryoshka", "jumprelu"] if args.judge == "saelens" else []
    if args.on_the_fly:
        args.pool = None
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset]
    k = args.k or preset.k
    preset = preset._replace(k=int(k) if k == int(k) else k, d_sae=args.d_sae or preset.d_sae)
    args.k, args.samples = k, args.samples or preset.n_samples
    args.eval_samples = args.eval_samples or preset.n_eval
    rows = []
    for seed in args.worlds:
        for row in run_world(args, preset, seed):
            row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    print(json.dumps(row), file=file)
    print(table(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
