"""Dictionaries of a language model's activations, ours beside the peers', on the same rows in the same order.

    sae collect runs/lm --hook blocks.15.hook_resid_post --corpus FOLDER --tokens 15M
    sae bench language_model runs/lm --ours topk --ours 'topk:lr=3.5e-4' --peers saelens --steps 12000 --batch 4096
    sae bench language_model runs/lm --ours batchtopk:k=64 --peers '' --probing sae_probes-0.4.2-py3-none-any.whl

--ours is ARCH:FIELD=VALUE,... as `sae bench quality` has it; --peers are those of `sae bench train` (topk or jumprelu).
All are trained in one pass over the run's cache, on ordinary tokens scaled to a mean norm of sqrt(d_in), and judged on
held-out documents: FVU, L0 and the share of latents that never fired; what the model's cross-entropy loses a token when
an ordinary token's activations are replaced (--contexts contexts; 0: not measured); with --probing, a folder or wheel
of labelled sets, the AUC of a logistic regression on 16 latents, mean over sets, and its difference to the first
dictionary's on the same sets with a bootstrap interval. One JSON line a dictionary.
"""

import argparse
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from activations.cache import CachedActivations, held_out_mask, scale_of
from activations.model import Model, load_model
from activations.run import Run
from activations.shuffle import Shuffled
from data.planted import WorldConfig
from sae import sparse
from sae.evals.labelled import kept_rows, labelled_sets, rows_path, sets_folder
from sae.evals.probing import paired, sparse_aucs, split
from sae.evals.splice_loss import splice_losses
from sae.settings import Training
from tests.benchmarks.lines import give_out
from tests.benchmarks.peers.peer import Setting
from tests.benchmarks.synthetic.dictionaries import Fields, Ours, Preset, plan_of

FIRST_ROWS = 16_384
"""Rows from which all take their first weights."""


class Trained(NamedTuple):
    """A dictionary of scaled rows."""

    about: Fields
    recon: Callable[[Tensor], tuple[Tensor, Tensor]]
    """(x_hat, z) of x."""
    d_sae: int

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return sparse.to_sparse(self.recon(x)[1])


def plans_of(args: argparse.Namespace, d_in: int, seed: int) -> list[tuple[str, Training]]:
    """What `--ours` asks for. Raises InputError for what cannot be."""
    preset = Preset(WorldConfig(d_in=d_in), args.d_sae, args.k, args.batch, 0.0, [], args.steps * args.batch, 0)
    plans = [(name, plan_of(name, preset, preset.n_samples, seed, args.device)) for name in args.ours]
    for _, plan in plans:
        plan.config(d_in)
    return plans


def train(
    args: argparse.Namespace, cache: CachedActivations, plans: Sequence[tuple[str, Training]], seed: int
) -> list[Trained]:
    """All dictionaries of one seed."""
    scale, d_in = scale_of(cache.moments), cache.d_in
    batches = Shuffled(cache, batch=args.batch, seed=seed, device=torch.device(args.device)).batches()
    rows = (parts[cache.hook].to(args.device, torch.float32) * scale for parts, _ in batches)
    first = torch.cat([next(rows) for _ in range(math.ceil(FIRST_ROWS / args.batch))])
    ours = Ours(plans, first) if plans else None
    shape = {"d_in": d_in, "d_sae": args.d_sae, "k": round(args.k), "batch": args.batch, "n_steps": args.steps}
    dtype = "float32" if args.device == "cpu" else "autocast"
    setting = Setting(arch=args.arch, **shape, dtype=dtype, device=args.device, lr=None, seed=seed)
    peers = {
        name: importlib.import_module(f"tests.benchmarks.peers.{name}").Trainer(setting, first) for name in args.peers
    }
    for _, x in zip(range(args.steps), rows, strict=False):
        if ours is not None:
            ours.step(x)
        for peer in peers.values():
            peer.step(x)
    made = []
    for about, view, each in ours.views() if ours is not None else ():
        if view == "saved":
            made.append(Trained(about, lambda x, each=each: _both(each, x), len(each.W_dec)))
    for name, peer in peers.items():
        made.append(Trained({"who": name, "name": f"{args.arch}:k={args.k:g}", "seed": seed}, peer.recon, args.d_sae))
    return made


def _both(view: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    z = view.encode(x)
    return view.decode(z), z


@torch.no_grad()
def held_out(cache: CachedActivations, trained: Trained, device: str) -> Fields:
    """FVU, L0 and the share of unused latents over the ordinary tokens of held-out documents."""
    scale, n, l0, error, power = scale_of(cache.moments), 0, 0.0, 0.0, 0.0
    total = torch.zeros(cache.d_in, dtype=torch.float64, device=device)
    fired = torch.zeros(trained.d_sae, dtype=torch.bool, device=device)
    for shard in range(cache.n_shards):
        for rows in cache.rows(shard)[held_out_mask(cache, shard)].split(4096):
            x = rows.to(device, torch.float32) * scale
            x_hat, z = trained.recon(x)
            error += float((x - x_hat).double().square().sum())
            power += float(x.double().square().sum())
            total += x.double().sum(dim=0)
            l0 += float((z != 0).sum())
            fired |= (z != 0).any(dim=0)
            n += len(x)
    spread = power - float(total.square().sum()) / n
    return {"fvu": error / spread, "l0": l0 / n, "unused": 1 - float(fired.float().mean()), "n": n}


def losses(
    model: Model, cache: CachedActivations, trained: Sequence[Trained], n_contexts: int
) -> tuple[list[float], int]:
    """(what each dictionary's reconstruction costs in nats a token, tokens)."""
    scale = scale_of(cache.moments)
    changes = {str(i): lambda x, each=each: each.recon(x.float() * scale)[0] / scale for i, each in enumerate(trained)}
    found = splice_losses(changes, model, [cache], [cache], n_contexts=n_contexts)[cache.hook]
    clean = float(found.clean.mean())
    return [float(found.ce[str(i)].mean()) - clean for i in range(len(trained))], found.n_tokens


@torch.no_grad()
def probed(
    args: argparse.Namespace, run: Run, model: Model, cache: CachedActivations, trained: Sequence[Trained]
) -> list[list[float]]:
    """AUC of 16 latents on each labelled set, of each dictionary."""
    sets = list(labelled_sets(sets_folder(args.probing), n_rows=args.set_rows, seed=0))
    found: list[list[float]] = [[] for _ in trained]
    for each in sets:
        rows = kept_rows(rows_path(run.path, cache.hook, each.name), model, cache.hook, each.texts)
        x = rows.to(args.device, torch.float32) * scale_of(cache.moments)
        training, test = split(each.classes, 0)
        for scores, dictionary in zip(found, trained, strict=True):
            aucs = sparse_aucs(x, each.classes, dictionary, training, test, 0)  # type: ignore[arg-type]
            scores.append(aucs["16"])
    return found


def run(args: argparse.Namespace) -> Iterator[Fields]:
    """A row for each dictionary."""
    where = Run.open(args.run)
    cache = where.activations(args.hook)
    plans = {seed: plans_of(args, cache.d_in, seed) for seed in args.seeds}  # what is wrong in them is said first
    model = None
    if args.contexts or args.probing:
        model = load_model(where.model_name, dtype=where.meta["model_dtype"], device=args.device)
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    for seed in args.seeds:
        trained = train(args, cache, plans[seed], seed)
        rows: list[Fields] = [{**each.about, **held_out(cache, each, args.device)} for each in trained]
        if model is not None and args.contexts:
            costs, n_tokens = losses(model, cache, trained, args.contexts)
            for row, cost in zip(rows, costs, strict=True):
                row |= {"delta_ce": cost, "ce_tokens": n_tokens}
        if model is not None and args.probing:
            scores = probed(args, where, model, cache, trained)
            for row, own in zip(rows, scores, strict=True):
                difference = paired(np.array(own) - np.array(scores[0]), rows[0]["name"], "16", 0)
                row |= {"auc_16": float(np.mean(own)), "sets": len(own), "over_the_first": difference.value}
                row |= {"lo": difference.lo, "hi": difference.hi}
        for row in rows:
            yield {**row, "steps": args.steps, "batch": args.batch, "hardware": hardware}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--hook", default="blocks.15.hook_resid_post")
    parser.add_argument("--ours", action="append", default=[], help="ARCH:FIELD=VALUE,...; may be repeated")
    parser.add_argument("--peers", default="", help="such as saelens,sparsify")
    parser.add_argument("--arch", default="topk", choices=["topk", "jumprelu"], help="of the peers")
    parser.add_argument("-k", type=float, default=32)
    parser.add_argument("--d-sae", type=int, default=9216)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--contexts", type=int, default=1024)
    parser.add_argument("--probing", type=Path)
    parser.add_argument("--set-rows", type=int, default=400)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args(argv)
    args.peers = [name for name in args.peers.split(",") if name]
    give_out(run(args))


if __name__ == "__main__":
    main()
