"""`sae export`: a dictionary, or what its feature store holds, in another tool's form or as a page to pass on."""

import json
from collections.abc import Callable
from pathlib import Path

import click

from app.cli.options import feature_numbers, json_option


def _dictionary(form: str) -> Callable[[str, Path], Path]:
    def write(address: str, out: Path) -> Path:
        from sae.interop.run import give_out

        give_out(address, form, out)
        return out

    return write


def _neuronpedia(address: str, out: Path) -> Path:
    from autointerp.neuronpedia import export

    return export(address, out)


FORMATS: dict[str, Callable[[str, Path], Path]] = {
    "saelens": _dictionary("saelens"),
    "dictionary_learning": _dictionary("dictionary_learning"),
    "sparsify": _dictionary("sparsify"),
    "neuronpedia": _neuronpedia,
}
"""Name -> what writes RUN[/ID] below a folder, and says where."""
PAGE = "html"
"""The form that is one file, of some features."""


@click.command()
@click.argument("address", metavar="RUN[/ID]")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice([*FORMATS, PAGE]), required=True, help="Whose form it is written in."
)
@click.option(
    "--features", metavar="NUMBERS", callback=feature_numbers, help="With --format html: which, such as 3,7,12 or 0-9."
)
@json_option
def command(address: str, out: Path, form: str, features: list[int] | None, as_json: bool) -> None:
    """Write a dictionary, or with --format neuronpedia its features, examples and explanations, into the folder OUT.

    With --format html the features that --features names are written into the file OUT: one page that opens in any
    browser without a server or a network.

    Examples: sae export runs/mine --format saelens exported/mine;
    sae export runs/mine --format html --features 3,7,12 features.html
    """
    if (form == PAGE) != (features is not None):
        raise click.UsageError("--format html needs --features, such as --features 3,7,12; no other format has them.")
    if features is None:
        written, what = FORMATS[form](address, out), address
    else:
        from app.feature_file import write_features

        written = write_features(address, features, out)
        what = f"{len(features):,} {'feature' if len(features) == 1 else 'features'} of {address}"
    how = f"is in {written}, for {form}" if features is None else f"in {written}: open it in a browser"
    click.echo(json.dumps({"written": str(written)}) if as_json else f"{what} {how}.")
