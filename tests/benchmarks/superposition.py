"""Which hidden variables of simulated cells dictionaries recover from a representation: JSON lines, a table last.

    sae bench superposition
    sae bench superposition --dims 20 --widths 512 --ours topk:k=4 --ours standard:target_l0=8 --seeds 0,1,2

Cells are `data.superposition`'s: 100 programs (`program`: what makes the counts; `activity`: the same before a cell's
type and covariate), 40 types, 3 covariates. A representation of `--dims` dimensions is learnt from the counts by an
autoencoder (or is a random projection of them, --representation projection), and each dictionary is trained on it.
Judged on other cells: `best`, mean |correlation| of a variable with the latent that follows it best; `recovered`, the
share of variables followed at over .95; `latents`, how many follow one.

Not dictionaries: `linear regression` on the representation is told the variable, and says what is there to be found;
`dimensions` and `principal components` are directions of the representation; `random dictionary` is not trained;
`shuffled` is the dictionary before it in the list with its rows in another order: what a best latent reaches by chance.
A seed says the wiring, the cells, the representation and the dictionary.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from activations.errors import InputError
from activations.run import versions
from data.superposition import Cells, Superposition
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import SAE
from sae.evals.controls import projection, random_dictionary
from sae.evals.recovery import RECOVERED, correlation, recovery, redundant
from sae.registry import REGISTRY
from sae.settings import Training
from tests.benchmarks.lines import count, give_out, note, numbers
from tests.benchmarks.synthetic.dictionaries import Fields, Ours, View, parsed

STANDARD = ["topk:k=4", "topk:k=16", "topk:k=32", "standard:target_l0=16"]
GROUPS = ("program", "activity", "type", "covariate")
COLUMNS = {f"{group}.{name}": 3 for group in GROUPS for name in ("best", "recovered")} | {
    "program.latents": 2,
    "fvu": 3,
    "l0": 1,
    "alive": 0,
    "redundant": 0,
}
"""Of the table, with their digits."""
Encode = Callable[[Tensor], Tensor]
Variables = dict[str, Tensor]
"""By group, a column each."""


def run_seed(args: argparse.Namespace, seed: int) -> Iterator[Fields]:
    """All dictionaries of one simulation."""
    world = Superposition(n_observed=args.observed, seed=seed)
    cells, others = world.sample(args.cells, 1000 + seed), world.sample(args.judged, 2000 + seed)
    for d in args.dims:
        began = time.perf_counter()
        represent = representation(args, cells.observed, d, seed)
        x, judged_x = represent(cells.observed), represent(others.observed)
        note(f"seed {seed}: {d} dimensions after {time.perf_counter() - began:.0f} s")
        facts = {
            "seed": seed,
            "dims": d,
            "representation": args.representation,
            "cells": args.cells,
            "judged": args.judged,
            "observed": args.observed,
            "visits": args.visits,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        for row in _dictionaries(args, x, variables(cells), judged_x, variables(others), seed):
            yield {**row, **facts}


def _dictionaries(
    args: argparse.Namespace, x: Tensor, told: Variables, judged_x: Tensor, truth: Variables, seed: int
) -> Iterator[Fields]:
    """x, told: the cells to train on; judged_x, truth: the others."""
    mean = x.mean(dim=0)
    yield {"name": "linear regression", "width": None, **_regression(x, told, judged_x, truth)}
    _, _, components = torch.linalg.svd(x - mean, full_matrices=False)
    for name, rows in (("dimensions", torch.eye(x.shape[1])), ("principal components", components)):
        yield {"name": name, "width": len(rows), **judged(projection(mean, rows).encode(judged_x), truth)}
    for width in args.widths:
        sizes = TopKConfig(d_in=x.shape[1], d_sae=width, k=8)
        control = random_dictionary(TopKSAE(sizes), mean, k=8, seed=seed)
        yield {"name": "random dictionary", "width": width, **_judged(control, judged_x, truth)}
        began = time.perf_counter()
        ours = Ours([(name, plan_of(name, width, args, seed)) for name in args.ours], x)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(args.visits // args.batch):
            ours.step(x[torch.randint(len(x), (args.batch,), generator=generator)])
        seconds = (time.perf_counter() - began) / len(args.ours)
        codes = None
        for about, view_name, view in ours.views():
            if view_name == "saved":
                codes = view.encode(judged_x)
                named = {"name": about["name"], "width": width, "settings": about["settings"], "seconds": seconds}
                yield {**named, **_judged(view, judged_x, truth)}
        assert codes is not None
        order = torch.randperm(len(codes), generator=generator)
        yield {"name": "shuffled", "width": width, **judged(codes[order], truth)}


def variables(cells: Cells) -> Variables:
    """The hidden variables; a class is a column that says whether the cell is of it."""
    return {
        "program": cells.program,
        "activity": cells.activity,
        "type": one_hot(cells.type).float(),
        "covariate": one_hot(cells.covariate).float(),
    }


def judged(codes: Tensor, truth: Variables) -> Fields:
    """best, recovered and latents of each group; how many latents live and repeat others."""
    alive = codes[:, (codes != 0).any(dim=0)]
    found: Fields = {
        "alive": alive.shape[1],
        "redundant": redundant(alive),
        "l0": float((codes != 0).sum(1).float().mean()),
    }
    for group, columns in truth.items():
        metrics = recovery(correlation(alive, columns), len(codes), name=group)
        found |= {name: metric.value for name, metric in metrics.items()}
    return found


def _judged(dictionary: SAE | View, x: Tensor, truth: Variables) -> Fields:
    codes = dictionary.encode(x)
    error = (dictionary.decode(codes) - x).square().sum()
    return {**judged(codes, truth), "fvu": float(error / (x - x.mean(dim=0)).square().sum())}


def _regression(x: Tensor, told: Variables, judged_x: Tensor, truth: Variables) -> Fields:
    """What least squares on the representation says of each variable, fitted on the cells that are trained on."""
    found: Fields = {}
    for group, columns in truth.items():
        predicted = _with_one(judged_x) @ torch.linalg.lstsq(_with_one(x), told[group]).solution
        best = correlation(predicted, columns).diagonal()
        found |= {f"{group}.best": float(best.mean()), f"{group}.recovered": float((best > RECOVERED).float().mean())}
    return found


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], dim=1)


def representation(args: argparse.Namespace, observed: Tensor, d: int, seed: int) -> Encode:
    """Observed counts to d numbers: the encoder of an autoencoder trained on them, or a random projection."""
    generator = torch.Generator().manual_seed(seed)
    if args.representation == "projection":
        matrix = torch.randn(observed.shape[1], d, generator=generator) / observed.shape[1] ** 0.5
        return lambda y: y @ matrix
    torch.manual_seed(seed)
    n = observed.shape[1]
    encoder = nn.Sequential(nn.Linear(n, args.hidden), nn.ReLU(), nn.Linear(args.hidden, d))
    decoder = nn.Sequential(nn.Linear(d, args.hidden), nn.ReLU(), nn.Linear(args.hidden, n), nn.ReLU())
    scale = observed.std()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    for _ in range(args.epochs):
        for part in torch.randperm(len(observed), generator=generator).split(256):
            y = observed[part] / scale
            loss = (decoder(encoder(y)) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    encoder.requires_grad_(False)
    fvu = float(loss.detach()) / float((observed / scale).var(dim=0).mean())
    note(f"autoencoder of {d} dimensions: FVU {fvu:.3f} on its last batch")
    return lambda y: encoder(y / scale)


def plan_of(text: str, width: int, args: argparse.Namespace, seed: int) -> Training:
    """The training of ARCH:FIELD=VALUE,... (fields of the architecture's config). Raises InputError."""
    arch, fields = parsed(text)
    if arch not in REGISTRY:
        raise InputError(f"{arch!r} is no architecture: expected one of {', '.join(REGISTRY)}.")
    lr = {"lr": fields.pop("lr")} if "lr" in fields else {}
    sizes = {"d_sae": width, **fields}
    return Training(
        architecture=arch,
        hook="",
        sizes=sizes,
        n_tokens=args.visits,
        batch=args.batch,
        seed=seed,
        matmul="float32",
        **lr,
    )


def table(rows: Sequence[Fields]) -> str:
    """A line a method: means and standard deviations over seeds."""
    methods: dict[tuple[str, str, str], list[Fields]] = {}
    for row in rows:
        methods.setdefault((str(row["dims"]), row["name"], str(row["width"] or "-")), []).append(row)
    lines = [f"| dims | dictionary | width | n | {' | '.join(COLUMNS)} |", "|---" * (4 + len(COLUMNS)) + "|"]
    for method, members in methods.items():
        cells = [_cell([row[name] for row in members if name in row], digits) for name, digits in COLUMNS.items()]
        lines.append(f"| {' | '.join(method)} | {len(members)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=numbers, default=[20, 100], help="of the representation, such as 20,100")
    parser.add_argument("--widths", type=numbers, default=[128, 512], help="latents of the dictionaries")
    parser.add_argument("--ours", action="append", help=f"ARCH:FIELD=VALUE,...; may be repeated [{' '.join(STANDARD)}]")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--representation", default="autoencoder", choices=["autoencoder", "projection"])
    parser.add_argument("--hidden", type=int, default=256, help="width of the autoencoder's hidden layers")
    parser.add_argument("--epochs", type=int, default=10, help="of the autoencoder")
    parser.add_argument("--observed", type=int, default=1000, help="counts of a cell; the paper has 20,000")
    parser.add_argument("--cells", type=count, default=20_000, help="to train on")
    parser.add_argument("--judged", type=count, default=5_000, help="other cells, to judge on")
    parser.add_argument("--visits", type=count, default=500_000, help="rows that a dictionary is trained on")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here too")
    args = parser.parse_args(argv)
    args.ours = args.ours or STANDARD
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = give_out((row for seed in args.seeds for row in run_seed(args, seed)), args.out)
    note(table(rows))


if __name__ == "__main__":
    main()
