"""`sae export`: a dictionary, or what its feature store holds, in another tool's form."""

import json
from collections.abc import Callable
from pathlib import Path

import click

from app.cli.options import json_option


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


@click.command()
@click.argument("address", metavar="RUN[/ID]")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(list(FORMATS)), required=True, help="Whose form it is written in.")
@json_option
def command(address: str, out: Path, form: str, as_json: bool) -> None:
    """Write a dictionary, or with --format neuronpedia its features, examples and explanations, into the folder OUT.

    Example: sae export runs/mine --format saelens exported/mine
    """
    written = FORMATS[form](address, out)
    click.echo(json.dumps({"written": str(written)}) if as_json else f"{address} is in {written}, for {form}.")
