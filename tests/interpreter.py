"""Triton kernels without a GPU: import this before anything that imports Triton. On a GPU it changes nothing."""

import os
from importlib.util import find_spec
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_also_index(tensor: Any, scope: Any) -> None:
        # NumPy 2.4 no longer turns an array of one entry into an int, which Triton 3.6 asks of the bounds of a loop.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_also_index
