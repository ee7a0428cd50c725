"""`sae families`: trees of latents that fire together."""

import json

import click

from app.cli.options import COUNT, SHARE, device_option, json_option


@click.command()
@click.argument("address", metavar="RUN[/ID]")
@click.option("--threshold", type=SHARE, default=0.1, show_default=True, help="Least share of a child's firings.")
@click.option(
    "--chance",
    type=click.FloatRange(0),
    default=0.05,
    show_default=True,
    help="Most pairs to expect by chance; 1e9 leaves all to the threshold.",
)
@click.option("--max-density", type=SHARE, default=0.2, show_default=True, help="Leave out latents that fire on more.")
@click.option("--min-firings", type=COUNT, default=10, show_default=True, help="Leave out latents with fewer.")
@click.option("--rounds", type=click.IntRange(0), default=3, show_default=True, help="Searches without the parents.")
@click.option("--all-rows", is_flag=True, help="Count on rows that were trained on too. [default: held-out ones]")
@click.option("--rows", "n_rows", type=COUNT, default=500_000, show_default=True, help="At most so many.")
@click.option(
    "--against", default=None, metavar="RUN/ID", help="Also match latents with this one's, wider or narrower."
)
@click.option("--limit", type=COUNT, default=20, show_default=True, help="Families to print; the file has all.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the controls.")
@device_option
@json_option
def command(
    address: str,
    threshold: float,
    chance: float,
    max_density: float,
    min_firings: int,
    rounds: int,
    all_rows: bool,
    n_rows: int,
    against: str | None,
    limit: int,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Find families of latents, a general one above the special ones that fire inside it, into families.json.

    Example: sae families runs/texts --all-rows
    """
    from activations.files import read_json
    from sae.evals.families import find_families
    from sae.families import FamilySettings

    settings = FamilySettings(
        threshold=threshold, chance=chance, max_density=max_density, min_firings=min_firings, rounds=rounds
    )
    path = find_families(address, settings, all_rows=all_rows, n_rows=n_rows, against=against, seed=seed, device=device)
    found = read_json(path)
    if as_json:
        click.echo(json.dumps(found))
        return
    value = {name: metric["value"] for name, metric in found["metrics"].items()}
    click.echo(
        f"{path}: {len(found['families']):,} families of {found['latents']:,} latents, on {found['rows']:,} rows of "
        f"{found['part']} documents; {value['control.independent.families.n']:.0f} where latents fire independently."
    )
    for family in found["families"][:limit]:
        children = ", ".join(str(child["latent"]) for child in family["children"][:12])
        more = ", ..." if len(family["children"]) > 12 else ""
        click.echo(
            f"{family['parent']} ({family['density']:.1%} of rows; a child fires on {family['coverage']:.0%} of these, "
            f"and it on {family['together']:.0%} of a child's): {children}{more}"
        )
    for name in ("together", "coverage", "ratio"):
        if f"families.{name}" in value:
            control = value[f"control.stand_in.families.{name}"]
            metric = found["metrics"][f"families.{name}"]
            click.echo(f"{name} {value[f'families.{name}']:.3f}, stand-in {control:.3f}: {metric['definition']}")
    if against is not None:
        click.echo(
            f"Split in 2 or more: {value['splits.several']:.1%} of the narrower's latents; nearest cosine "
            f"{value['splits.cosine']:.3f}, random rows {value['control.random.splits.cosine']:.3f}"
        )
