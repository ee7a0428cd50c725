"""`sae index`: the feature store of a dictionary."""

import json

import click

from app.cli.options import COUNT, device_option, feature_numbers, gpus_option, json_option, overwrite_option


@click.command()
@click.argument("address", metavar="RUN[/ID]")
@click.option("--tokens", "n_tokens", type=COUNT, help="Cached tokens to index, such as 500k or 1M. Default: all.")
@click.option("--batch", type=COUNT, default=4096, show_default=True, help="Tokens encoded at once.")
@click.option(
    "--loss-effect",
    type=COUNT,
    help="Also measure what the model loses without a feature: of so many, spread over those that fire. Up to "
    "48 forward passes of a context each. [default: none]",
)
@click.option("--features", metavar="NUMBERS", callback=feature_numbers, help="Or of these, such as 0-499 or 3,7,12.")
@click.option(
    "--map",
    type=click.Choice(["pca", "umap"]),
    default="pca",
    show_default=True,
    help="How the decoder rows are laid out in the plane. umap needs pip install 'sae-workbench[maps]'.",
)
@click.option(
    "--examples",
    type=click.IntRange(6, 400),
    default=56,
    show_default=True,
    help="Windows kept of each feature, about.",
)
@overwrite_option
@gpus_option
@device_option
@json_option
def command(
    address: str,
    n_tokens: int | None,
    batch: int,
    loss_effect: int | None,
    features: list[int] | None,
    map: str,
    examples: int,
    overwrite: bool,
    gpus: int,
    device: str,
    as_json: bool,
) -> None:
    """Build the feature store of a dictionary from the activations that its run has cached.

    Density, histogram, logit lens, neighbours, examples, and what fires together of every latent, in features.duckdb
    beside the dictionary. A new store takes the old one's place when it is done; explanations and scores stay. Stopped,
    the same command goes on where it was.

    Example: sae index runs/demo --tokens 1M
    """
    if features is not None and loss_effect is not None:
        raise click.UsageError("Give --features or --loss-effect, not both.")
    from activations.ranks import Ranks
    from app.cli.ranks import spread

    if spread(gpus):
        return
    from autointerp.index import index
    from data.store import open_store

    path = index(
        address,
        overwrite=overwrite,
        device=device,
        batch=batch,
        n_tokens=n_tokens,
        loss_effect=features or loss_effect or 0,
        map=map,
        examples=examples,
    )
    if not Ranks.from_environment().leads:
        return
    with open_store(path.parent) as store:
        found = store.summary()
    if as_json:
        facts = {"path": str(path), "features": found.n_features, "alive": found.n_alive, "tokens": found.n_tokens}
        click.echo(json.dumps(facts))
        return
    click.echo(f"{path}: {found.n_alive:,} of {found.n_features:,} features fire in {found.n_tokens:,} tokens.")
    click.echo(f"Next: `sae label {address}`, then `sae app`.")
