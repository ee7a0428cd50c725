"""Our dictionaries beside SAELens' and dictionary_learning's: same cached activations, order, width, k, batch, steps.

    sae bench quality_cached RUN --hook HOOK --arch topk --seeds 0 1 2 --d-sae 4608 -k 32 --steps 3000

Needs `pip install sae-lens dictionary-learning` in an environment of its own. One JSON line a dictionary: FVU and L0
over ordinary tokens of held-out documents. Every trainer is the peer's own class with its own loss, optimiser and
defaults; each peer also runs at our learning rate (`lr` in its row), and its better row is the one to compare with.
All get x scaled to a mean norm of sqrt(d_in), as each of them advises. JumpReLU is compared at the L0 that a peer
reached: ours is trained to that L0 (`--l0`).
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.cache import CachedActivations, held_out_mask, scale_of
from activations.run import Run
from activations.shuffle import Shuffled
from sae.files import load_sae
from sae.registry import REGISTRY
from sae.settings import Training
from sae.train import train

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]  # scaled x -> scaled x_hat, latents


def saelens(args: argparse.Namespace, batches: Iterator[Tensor], d_in: int, lr: float | None, seed: int) -> Reconstruct:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    sizes = {"d_in": d_in, "d_sae": args.d_sae, "dtype": "float32", "device": args.device}
    if args.arch == "jumprelu":
        # Anthropic's settings as SAELens' documentation gives them; L0 follows from the coefficient. (Its mode with a
        # target L0 left 86 % of the latents unused at every coefficient tried.)
        config = JumpReLUTrainingSAEConfig(
            jumprelu_sparsity_loss_mode="tanh",
            l0_coefficient=args.saelens_l0_coefficient,
            l0_warm_up_steps=args.steps,
            pre_act_loss_coefficient=3e-6,
            jumprelu_bandwidth=2.0,
            jumprelu_init_threshold=0.1,
            jumprelu_ste_to_input=True,
            **sizes,
        )
        sae: Any = JumpReLUTrainingSAE(config)
    elif args.arch == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=args.k, **sizes))
    else:
        sae = AbsTopKTrainingSAE(AbsTopKTrainingSAEConfig(k=args.k, **sizes))
    trainer: Any = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=args.steps * args.batch,
            train_batch_size_samples=args.batch,
            lr=lr or 3e-4,
            lr_end=(lr or 3e-4) / 10,
            lr_warm_up_steps=args.steps // 20,
            lr_decay_steps=args.steps // 5,
            device=args.device,
            autocast=args.device != "cpu",
            dead_feature_window=max(args.steps // 10, 1),
        ),
        sae=sae,
        data_provider=iter(()),
    )
    sae.to(args.device)
    for _, x in zip(range(args.steps), batches, strict=False):
        trainer.step(x)
        trainer.n_training_steps += 1

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        z, _ = sae.encode_with_hidden_pre(x)
        return sae.decode(z), z

    return reconstruct


def dictionary_learning(
    args: argparse.Namespace, batches: Iterator[Tensor], d_in: int, lr: float | None, seed: int
) -> Reconstruct:
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    common: dict[str, Any] = {
        "steps": args.steps,
        "activation_dim": d_in,
        "dict_size": args.d_sae,
        "layer": 0,
        "lm_name": "",
        "warmup_steps": args.steps // 20,
        "decay_start": args.steps * 4 // 5,
        "seed": seed,
        "device": args.device,
    }
    if lr is not None:
        common["lr"] = lr
    # their own normalisation: a mean square norm of 1
    unit = d_in**-0.5
    if args.arch == "jumprelu":
        trainer: Any = JumpReluTrainer(target_l0=float(args.k), sparsity_warmup_steps=args.steps // 4, **common)
    else:
        trainer = TopKTrainer(k=args.k, threshold_start_step=10**9, **common)
    for step, x in zip(range(args.steps), batches, strict=False):
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.device != "cpu"):
            trainer.update(step, x * unit)

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        if args.arch == "jumprelu":
            x_hat, z = trainer.ae(x * unit, output_features=True)
        else:
            z = trainer.ae.encode(x * unit)
            x_hat = trainer.ae.decode(z)
        return x_hat / unit, z

    return reconstruct


@torch.no_grad()
def held_out(cache: CachedActivations, reconstruct: Reconstruct, device: str) -> dict[str, float]:
    """FVU, L0 and the share of latents that never fired, over held-out documents; FVU is free of the scale of x."""
    error = power = l0 = n = 0.0
    total: Tensor | float = 0.0
    fired: Tensor | None = None
    for i in range(cache.n_shards):
        for rows in cache.rows(i)[held_out_mask(cache, i)].split(4096):
            x = rows.to(device, torch.float32) * scale_of(cache.moments)
            x_hat, z = reconstruct(x)
            error += float((x - x_hat.float()).square().sum())
            power += float(x.square().sum())
            total = total + x.sum(dim=0)
            l0 += float((z != 0).sum())
            now = (z != 0).any(dim=0)
            fired = now if fired is None else fired | now
            n += len(x)
    assert isinstance(total, Tensor)
    assert fired is not None
    return {
        "fvu": error / (power - float(total.square().sum()) / n),
        "l0": l0 / n,
        "unused": 1 - float(fired.float().mean()),
        "n": n,
    }


def ours(args: argparse.Namespace, run: Run, cache: CachedActivations, seed: int) -> dict[str, float]:
    field = REGISTRY[args.arch].sparsity
    sizes = {"d_sae": args.d_sae, field: args.l0 or args.k, **json.loads(args.sizes)}
    settings = Training(
        architecture=args.arch,
        hook=args.hook,
        sizes=sizes,
        n_tokens=args.steps * args.batch,
        batch=args.batch,
        seed=seed,
        lr=args.lr,
        matmul=None if args.device != "cpu" else "float32",
    )
    with tempfile.TemporaryDirectory(dir=run.path) as scratch:
        run_copy = Run(run.path, run.meta)
        run_copy.dictionary = lambda name: Path(scratch) / name  # type: ignore[method-assign]
        sae = load_sae(train(run_copy, settings, device=args.device), device=args.device)
    scale = scale_of(cache.moments)
    return held_out(cache, lambda x: (sae.reconstruct(x / scale) * scale, sae.encode(x / scale)), args.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--hook", default="blocks.15.hook_resid_post")
    parser.add_argument("--arch", default="topk", choices=list(REGISTRY))
    parser.add_argument("--trainers", nargs="+", default=["ours", "saelens", "dictionary_learning"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--l0", type=float, default=None, help="target of our JumpReLU, to match a peer's")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=None, help="ours; the default is the registry's")
    parser.add_argument("--peer-lrs", nargs="+", type=float, default=[0.0, 1e-3], help="0 is the peer's default")
    parser.add_argument("--sizes", default="{}", help="further fields of our config, JSON")
    parser.add_argument("--saelens-l0-coefficient", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    run = Run.open(args.run)
    cache = run.activations(args.hook)
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    for seed in args.seeds:
        for name in args.trainers:
            if name == "dictionary_learning" and args.arch == "abstopk":
                continue  # it has none
            for lr in [None] if name == "ours" else [lr or None for lr in args.peer_lrs]:
                start = time.perf_counter()
                if name == "ours":
                    result = ours(args, run, cache, seed)
                else:
                    rows = Shuffled(cache, batch=args.batch, seed=seed).batches()
                    batches = (x.to(args.device, torch.float32) * scale_of(cache.moments) for x in rows)
                    trainer = {"saelens": saelens, "dictionary_learning": dictionary_learning}[name]
                    result = held_out(cache, trainer(args, batches, cache.d_in, lr, seed), args.device)
                seconds = round(time.perf_counter() - start, 1)
                shape = {"d_sae": args.d_sae, "k": args.k, "steps": args.steps, "batch": args.batch}
                row = {"trainer": name, "arch": args.arch, "lr": lr or args.lr, "seed": seed, **shape, **result}
                print(json.dumps({**row, "seconds": seconds, "hardware": hardware}), flush=True)


if __name__ == "__main__":
    main()
