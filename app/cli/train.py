"""`sae train`: one dictionary from a run's cached activations."""

import json
from pathlib import Path
from typing import Any, cast

import click

from app.cli.options import COUNT, SHARE, device_option, field_of, gpus_option, json_option, overwrite_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--arch", show_default="topk", help="topk, batchtopk, jumprelu ...: docs/architectures.md has all.")
@click.option(
    "--hook", multiple=True, show_default="the run's only hook", help="Where its activations were read; repeatable."
)
@click.option("--target-hook", multiple=True, help="Transcoders: what they predict; repeatable for clt.")
@click.option("--base", metavar="ID", help="boost: the dictionary of RUN whose error it learns.")
@click.option("--name", show_default="HOOK-ARCH-dN-kK-sSEED", help="ID of the dictionary.")
@click.option("--d-sae", type=COUNT, help="Number of latents.")
@click.option("--expansion", type=click.IntRange(1), show_default="8", help="Latents, in widths of the hook.")
@click.option("-k", type=float, show_default="32", help="Active latents a token (jumprelu: on average).")
@click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="FIELD=VALUE",
    callback=lambda _, __, texts: dict(map(field_of, texts)) or None,
    help="What --arch alone has, such as detach_inner=true: docs/architectures.md has all; repeatable.",
)
@click.option("--tokens", type=COUNT, show_default="10M", help="Rows visited, over several epochs if need be.")
@click.option("--batch", type=COUNT, show_default="2048", help="Rows in a step.")
@click.option("--lr", type=float, show_default="by architecture and width", help="Peak learning rate.")
@click.option("--warmup", type=SHARE, show_default="0.05", help="Share of the run over which the rate rises.")
@click.option("--decay", type=SHARE, show_default="0.2", help="Share of the run over which it falls to 0 at the end.")
@click.option("--clip", type=float, show_default="1.0", help="Largest norm of the gradient.")
@click.option(
    "--k-from", type=COUNT, show_default="k; abstopk, matryoshka: 3 k", help="Active latents a token at first."
)
@click.option(
    "--k-anneal",
    type=SHARE,
    show_default="0.1; abstopk: 1; matryoshka: 0.5",
    help="Share over which they fall from --k-from to -k.",
)
@click.option(
    "--sparsity-warmup", type=SHARE, show_default="0; jumprelu, gated: 0.8", help="Share over which a penalty warms up."
)
@click.option("--ema", type=float, show_default="0.0", help="Save a running mean that keeps so much of itself a step.")
@click.option(
    "--dead-after", type=COUNT, show_default="a tenth of the run", help="Tokens without firing: a latent is dead."
)
@click.option("--resample-every", type=COUNT, show_default="never", help="Tokens between resamplings of the dead.")
@click.option(
    "--matmul",
    metavar="float32|bfloat16|float8",
    show_default="the machine's faster",
    help="Precision of the wide products.",
)
@click.option("--role", "roles", multiple=True, metavar="ROLE", help="Of a chat: tokens of this role only; repeatable.")
@click.option(
    "--live", is_flag=True, help="Do not wait for a whole cache: follow `sae collect`, or without one run the model."
)
@click.option("--seed", type=int, show_default="0", help="Of the weights at the start and of the order of the rows.")
@click.option("--order-seed", type=int, show_default="--seed", help="Of the order of the rows alone.")
@click.option(
    "--track", multiple=True, metavar="wandb|tensorboard", help="Draw the curves there too; repeatable, needs an extra."
)
@click.option("--keep", type=click.IntRange(1), default=2, show_default=True, help="Checkpoints that stay.")
@click.option("--resume", is_flag=True, help="With --name: take the settings that it was begun with.")
@overwrite_option
@gpus_option
@click.option(
    "--data-parallel",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Groups of GPUs that read rows of their own; the GPUs of a group hold a part of the latents each.",
)
@device_option
@json_option
def command(
    run: Path,
    name: str | None,
    track: tuple[str, ...],
    keep: int,
    resume: bool,
    overwrite: bool,
    gpus: int,
    data_parallel: int,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Train one dictionary on what RUN has cached. Example: sae train runs/mine --arch topk -k 32 --tokens 10M

    Started again it goes on from the last checkpoint and ends in the same weights as an unbroken run. On several hosts:
    torchrun --no-python ... sae train ..., with RUN on a disk that all see.
    """
    from activations.ranks import Ranks
    from app.cli.ranks import spread

    if spread(gpus):
        return
    from app.pipeline import train_run
    from app.recipe import Recipe

    # By identity: 0 is a value that was given, and equals False.
    given = {option: v for option, v in options.items() if not (v is None or v is False or v == ())}
    made = train_run(
        run,
        name=name,
        resume=resume,
        keep=keep,
        overwrite=overwrite,
        data_parallel=data_parallel,
        device=device,
        track=track,
        **cast(Recipe, given),
    )
    if not Ranks.from_environment().leads:
        return
    last = json.loads((made.folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    if as_json:
        click.echo(json.dumps({"dictionary": str(made.folder), "finished_before": made.finished_before, **last}))
        return
    word = "was trained before (--overwrite replaces it)" if made.finished_before else "trained"
    click.echo(
        f"{run / made.folder.name} {word}: batch FVU {last['fvu']:.3f}, L0 {last['l0']:.1f}, dead {last['n_dead']}"
    )
    click.echo(f"Next: sae eval {run / made.folder.name}   sae index {run / made.folder.name}")
