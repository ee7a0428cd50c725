"""`sae bench`: the benchmarks of a checkout, each a module of tests/benchmarks."""

import ast
import os
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent.parent


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("name", required=False)
@click.argument("arguments", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)
def command(name: str | None, arguments: tuple[str, ...]) -> None:
    """Run the benchmark NAME, which prints JSON lines; without NAME, list them.

    Example: sae bench train --arch topk --steps 20. Its own options: sae bench train --help
    """
    known = benchmarks(ROOT)
    if name is None:
        with (formatter := click.HelpFormatter()).section("Benchmarks"):
            formatter.write_dl(list(known.items()))
        click.echo(formatter.getvalue(), nl=False)
        return
    if name not in known:
        raise click.ClickException(f"There is no benchmark {name!r}: expected one of {', '.join(known)}.")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # -P: a folder `tests` where the user stands is not ours.
    run = [sys.executable, "-P", "-m", f"tests.benchmarks.{name}", *arguments]
    os.execve(sys.executable, run, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)})


def benchmarks(root: Path) -> dict[str, str]:
    """Name and first line of each benchmark. Raises ClickException when `root` is no checkout."""
    files = sorted((root / "tests" / "benchmarks").glob("[!_]*.py"))
    if not files:
        raise click.ClickException(
            "The benchmarks are in the source, not in the installed package: clone the repository, "
            "`pip install --editable .` there, and run `sae bench` again."
        )
    return {file.stem: _first_line(file) for file in files}


def _first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
