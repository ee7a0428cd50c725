"""`sae index`: the feature store of a dictionary."""

import json

import click

from app.cli.options import COUNT, device_option, json_option, overwrite_option


@click.command()
@click.argument("address", metavar="RUN[/ID]")
@click.option("--tokens", "n_tokens", type=COUNT, help="Cached tokens to index, such as 500k or 1M. Default: all.")
@click.option("--batch", type=COUNT, default=4096, show_default=True, help="Tokens encoded at once.")
@overwrite_option
@device_option
@json_option
def command(address: str, n_tokens: int | None, batch: int, overwrite: bool, device: str, as_json: bool) -> None:
    """Build the feature store of a dictionary from the activations that its run has cached.

    Density, histogram, logit lens, neighbours and examples of every latent, in features.duckdb beside the dictionary. A
    new store takes the old one's place when it is done; explanations and scores stay.

    Example: sae index runs/demo --tokens 1M
    """
    from autointerp.index import index
    from data.store import open_store

    path = index(address, overwrite=overwrite, device=device, batch=batch, n_tokens=n_tokens)
    with open_store(path.parent) as store:
        found = store.summary()
    if as_json:
        facts = {"path": str(path), "features": found.n_features, "alive": found.n_alive, "tokens": found.n_tokens}
        click.echo(json.dumps(facts))
        return
    click.echo(f"{path}: {found.n_alive:,} of {found.n_features:,} features fire in {found.n_tokens:,} tokens.")
    click.echo(f"Next: `sae label {address}`, then `sae app`.")
