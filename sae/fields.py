"""Values for the fields of an architecture's config, held to the names and types that its dataclass has.

Values come from command lines, TOML, JSON and notebooks; no dataclass looks at their types by itself.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from sae.base import Config, ConfigError, fields_from

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}


def checked(config: type[Config], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` as the fields of `config` take it: lists as tuples. Raises ConfigError for other names and types."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    values = fields_from(given)
    for name, value in values.items():
        if name not in fields:
            chosen = [f"{n}={_shown(f.default)}" for n, f in fields.items() if f.default is not dataclasses.MISSING]
            raise ConfigError(f"there is no field {name!r}: expected {', '.join(chosen) or 'none'}.")
        if not _fits(value, fields[name].type):
            raise ConfigError(f"{name}={_shown(value)}: expected {_expected(fields[name].type)}.")
    return values


def _fits(value: Any, kind: Any) -> bool:
    if (origin := get_origin(kind)) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if origin in (tuple, Sequence):
        return isinstance(value, tuple) and all(_fits(each, get_args(kind)[0]) for each in value)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # neither infinite nor NaN
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _expected(kind: Any) -> str:
    if (origin := get_origin(kind)) in (Union, UnionType):
        return " or ".join(map(_expected, get_args(kind)))
    if origin in (tuple, Sequence):
        return f"a list of {_expected(get_args(kind)[0]).removeprefix('a ')}s"
    return _EXPECTED[kind]


def _shown(value: Any) -> str:
    """On one line, as it is written after `-o FIELD=`."""
    return json.dumps(value, default=repr)
