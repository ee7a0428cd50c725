"""Sparse dictionaries: one contract (`sae.base`), one file an architecture, one training loop (`sae.train`).

Names are imported on first use, so that `import sae` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.base import SAE as SAE
    from sae.files import load_sae as load_sae
    from sae.files import save_sae as save_sae

_HOME = {"SAE": "base", "load_sae": "files", "save_sae": "files"}
__all__ = ["SAE", "load_sae", "save_sae"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sae' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sae.{_HOME[name]}"), name)
