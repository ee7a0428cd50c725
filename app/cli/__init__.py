"""The `sae` command. Each command is a module here, imported when it is used, with a click command named `command`.

So `sae --help` takes no torch. What a caller got wrong becomes one line on stderr and exit 1; a bug keeps its
traceback.
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import click

_COMMANDS = {
    "demo": "The whole pipeline on the embedded model and corpus.",
    "collect": "Cache a model's activations.",
    "train": "Train one dictionary.",
    "sweep": "Train a grid of dictionaries in one pass.",
    "plan": "Memory, disk, time and GPU-hours of a command, before it starts.",
    "eval": "Measure a dictionary.",
    "index": "Build the feature store.",
    "label": "Explain features and score the explanations.",
    "search": "Find features by label, token, prompt or another feature.",
    "steer": "Base and steered text side by side.",
    "families": "Find families of latents that fire together.",
    "retrieve": "Search a corpus by meaning, with latents of the query raised or lowered.",
    "import": "Make a dictionary, or explanations, from elsewhere part of a run.",
    "export": "Write a dictionary or its features for another tool, or features as one page.",
    "runs": "List runs with their sizes.",
    "clean": "Drop a run's activations and checkpoints.",
    "app": "Open the workbench in the browser.",
    "bench": "Measure against the peers and the machine (from a checkout).",
}


class _Commands(click.Group):
    """A group that knows the commands' one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        module = "import_" if cmd_name == "import" else cmd_name  # which is no module's name
        command: click.Command = importlib.import_module(f"app.cli.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            raise click.UsageError(f"No command {args[0]!r}: expected one of {', '.join(_COMMANDS)}.", ctx) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-workbench")
def main() -> None:
    """Train, browse, label and steer with sparse autoencoders. Begin with `sae demo`."""


def run() -> None:
    """Entry point of the `sae` script: check that our packages are ours, then run the command."""
    # OpenMP's threads wait for each other by spinning; beside other work on the machine a spinning thread keeps out the
    # one it waits for, and all goes 3 to 6 times slower. A short spin costs nothing on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    _refuse_shadowed_names()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(guarded(main.main))
    try:
        code: object = guarded(main.main)
    except SystemExit as ended:  # as click ends a command
        code = ended.code
    from activations.ranks import leave

    leave(code if isinstance(code, int) else int(code is not None))


def guarded(call: Callable[..., Any]) -> int:
    """Run `call`; wrong input becomes one line and exit code 1."""
    try:
        call(standalone_mode=True)
    except Exception as error:
        if not isinstance(error, _input_errors()):
            raise
        click.echo(f"Error: {error}", err=True)
        return 1
    return 0


def _input_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is meant for the user; only looked up once something has gone wrong."""
    from activations.errors import InputError
    from data.corpora import CorpusError
    from data.store import StoreError

    return InputError, CorpusError, StoreError


def _refuse_shadowed_names() -> None:
    from app.names import ShadowedName, check_names

    try:
        check_names()
    except ShadowedName as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    run()
