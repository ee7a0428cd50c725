"""Are the packages that Python finds ours? Flat names such as `data` and `app` can be hidden by files of the user's.

Imports nothing of ours, since that is what it checks.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

OURS = ("activations", "app", "autointerp", "data", "sae", "steering")
HOME = Path(__file__).resolve().parent.parent


class ShadowedName(ImportError):
    """Python finds a file of the user's under one of our names; the message is one line that says what to do."""


def check_names(names: Sequence[str] = OURS, home: Path = HOME) -> None:
    """Raise ShadowedName when one of `names` is found outside `home`, the folder that holds our packages."""
    for name in names:
        found, expected = _origin(name), home / name
        if found is not None and found not in (expected, expected / "__init__.py"):
            raise ShadowedName(f"`{name}` is {found}, expected {expected}; rename it or start elsewhere.")


def _origin(name: str) -> Path | None:
    """The file that `import name` runs, or the folder of a package without one; None when nothing is found."""
    module = sys.modules.get(name)
    spec = module.__spec__ if module is not None else importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.origin is not None:
        return Path(spec.origin).resolve()
    places = list(spec.submodule_search_locations or [])
    return Path(places[0]).resolve() if places else None
