"""Tests. `check` is the type checker put on every annotated function: beartype, with an int allowed as a float."""

from typing import Any


def check(function: Any) -> Any:
    from beartype import BeartypeConf, beartype  # here, since the benchmarks run without it

    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
