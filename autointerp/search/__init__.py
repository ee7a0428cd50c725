"""Finding features: by words or meaning of their labels, by a token, by a text they fire on, by another feature.

`search(address, text, by=...)` loads what a question needs; beneath it is one function for each way of asking, for who
has the store, the dictionary and the model open already. All take the same `Filters` and give the same `Found`.
Names are imported on first use: words and tokens are found without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autointerp.search.address import search as search
    from autointerp.search.found import Found as Found
    from autointerp.search.found import Hit as Hit
    from autointerp.search.meaning import LabelVectors as LabelVectors
    from autointerp.search.meaning import by_meaning as by_meaning
    from autointerp.search.prompt import by_prompt as by_prompt
    from autointerp.search.similar import by_feature as by_feature
    from autointerp.search.stored import by_token as by_token
    from autointerp.search.stored import by_words as by_words

_HOME = {
    "search": "address",
    "Found": "found",
    "Hit": "found",
    "LabelVectors": "meaning",
    "by_meaning": "meaning",
    "by_prompt": "prompt",
    "by_feature": "similar",
    "by_token": "stored",
    "by_words": "stored",
}
__all__ = [
    "Found",
    "Hit",
    "LabelVectors",
    "by_feature",
    "by_meaning",
    "by_prompt",
    "by_token",
    "by_words",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'autointerp.search' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autointerp.search.{_HOME[name]}"), name)
