"""The model and its hooks: load, splice (the only hooks), capture, shards on disk, exact shuffle.

Names are imported on first use, so that `import activations` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activations.errors import InputError as InputError
    from activations.model import Model as Model
    from activations.model import load_model as load_model
    from activations.run import Run as Run

_HOME = {"InputError": "errors", "Model": "model", "load_model": "model", "Run": "run"}
__all__ = ["InputError", "Model", "Run", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'activations' has no attribute {name!r}")
    return getattr(importlib.import_module(f"activations.{_HOME[name]}"), name)
