"""Edits of a running model: vectors and clamped latents, applied by `with steer(model, edits): ...`.

Names are imported on first use, so that `import steering` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steering.apply import steer as steer
    from steering.edit import Add as Add
    from steering.edit import Clamp as Clamp
    from steering.edit import ProjectOut as ProjectOut
    from steering.edit import ablate as ablate
    from steering.vector import SteeringVector as SteeringVector

_HOME = {
    "Add": "edit",
    "Clamp": "edit",
    "ProjectOut": "edit",
    "SteeringVector": "vector",
    "ablate": "edit",
    "steer": "apply",
}
__all__ = ["Add", "Clamp", "ProjectOut", "SteeringVector", "ablate", "steer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'steering' has no attribute {name!r}")
    return getattr(importlib.import_module(f"steering.{_HOME[name]}"), name)
