"""`sae train`: one dictionary from a run's cached activations."""

import json
from pathlib import Path

import click

from app.cli.options import COUNT, device_option, gpus_option, json_option, overwrite_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--arch", default="topk", show_default=True, help="topk, jumprelu or abstopk.")
@click.option("--hook", default=None, help="Where its activations were read. [default: the run's only hook]")
@click.option("--name", default=None, help="ID of the dictionary. [default: HOOK-ARCH-dN-kK-sSEED]")
@click.option("--d-sae", type=COUNT, default=None, help="Number of latents.")
@click.option(
    "--expansion", type=click.IntRange(1), default=8, show_default=True, help="Latents, in widths of the hook."
)
@click.option(
    "-k", "sparsity", type=float, default=32, show_default=True, help="Active latents a token (jumprelu: on average)."
)
@click.option(
    "--tokens", type=COUNT, default="10M", show_default=True, help="Rows visited, over several epochs if need be."
)
@click.option("--batch", type=COUNT, default=2048, show_default=True, help="Rows in a step.")
@click.option("--lr", type=float, default=None, help="Peak learning rate. [default: by architecture and width]")
@click.option("--role", "roles", multiple=True, metavar="ROLE", help="Of a chat: tokens of this role only; repeatable.")
@click.option(
    "--live", is_flag=True, help="Do not wait for a whole cache: follow `sae collect`, or without one run the model."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--keep", type=click.IntRange(1), default=2, show_default=True, help="Checkpoints that stay.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint; this is what happens anyway.")
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
    arch: str,
    hook: str | None,
    name: str | None,
    d_sae: int | None,
    expansion: int,
    sparsity: float,
    tokens: int,
    batch: int,
    lr: float | None,
    roles: tuple[str, ...],
    live: bool,
    seed: int,
    keep: int,
    resume: bool,
    overwrite: bool,
    gpus: int,
    data_parallel: int,
    device: str,
    as_json: bool,
) -> None:
    """Train one dictionary on what RUN has cached. Example: sae train runs/mine --arch topk -k 32 --tokens 10M

    Started again it goes on from the last checkpoint and ends in the same weights as an unbroken run. On several hosts:
    torchrun --no-python ... sae train ..., with RUN on a disk that all see.
    """
    del resume
    from activations.ranks import Ranks
    from app.cli.ranks import spread

    if spread(gpus):
        return
    from app.pipeline import train_run

    made = train_run(
        run,
        arch=arch,
        hook=hook,
        name=name,
        d_sae=d_sae,
        expansion=expansion,
        k=sparsity,
        tokens=tokens,
        batch=batch,
        lr=lr,
        roles=roles,
        live=live,
        seed=seed,
        keep=keep,
        overwrite=overwrite,
        data_parallel=data_parallel,
        device=device,
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
