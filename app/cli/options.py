"""Option types and options that several commands share."""

import json
import re
from collections.abc import Callable
from typing import Any

import click

from activations.errors import InputError

_UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}


class Count(click.ParamType[int]):
    """A whole number such as 4096, 500k, 2M or 1.5B."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:[._]\d+)*)([KMB]?)", str(value).strip().upper().replace("_", ""))
        if not match:
            self.fail(f"{value!r} is no count: expected a number such as 4096, 500k, 2M or 1.5B.", param, ctx)
        number = float(match[1]) * _UNITS[match[2]]
        if number != int(number) or number < 1:
            self.fail(f"{value!r} is no whole number of at least 1.", param, ctx)
        return int(number)


COUNT = Count()
SHARE = click.FloatRange(0, 1)

Command = Callable[..., Any]


def feature_numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Numbers and ranges such as 0-499 or 3,7,12, both ends included, each number once."""
    if value is None:
        return None
    numbers: dict[int, None] = {}
    for piece in value.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", piece, flags=re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 0 <= last - first < 10_000_000:
            raise click.BadParameter(f"{piece!r} is no number or range: expected such as 0-499 or 3,7,12.", ctx, param)
        numbers.update(dict.fromkeys(range(first, last + 1)))
    return list(numbers)


def field_of(text: str) -> tuple[str, Any]:
    """("a", [1, 2]) of "a=[1,2]", ("a", "word") of "a=word": a value is JSON where it can be, else text.

    Raises InputError where there is no name or no value.
    """
    name, _, value = text.partition("=")
    if not name or not value:
        raise InputError(f"{text!r} is no field with a value: expected FIELD=VALUE, such as detach_inner=true.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):  # also for numbers and nestings that Python does not read
        return name, value


def device_option(command: Command) -> Command:
    """--device auto|cpu|cuda."""
    help_ = "Where to compute; auto takes a GPU when there is one."
    return click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help=help_)(command)


def gpus_option(command: Command) -> Command:
    """--gpus, one process each."""
    help_ = "Share the work between so many GPUs of this machine."
    return click.option("--gpus", default=1, show_default=True, type=click.IntRange(1), help=help_)(command)


def json_option(command: Command) -> Command:
    """--json, output for machines."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def overwrite_option(command: Command) -> Command:
    """--overwrite, replace what is there."""
    return click.option("--overwrite", is_flag=True, help="Replace what is there.")(command)
