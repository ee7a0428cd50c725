"""Import a peer's trainer alone: not its viewers, loaders and loggers, which a machine with GPUs often lacks.

What is installed is always taken. A placeholder stands only for what is missing and only while the peer is imported, so
a step that did need it would fail, not run differently.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Placeholder(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        del module


@contextlib.contextmanager
def placeholders(*packages: str) -> Iterator[None]:
    """Let `packages` and all modules in them be imported inside the block, installed or not."""
    # First, since transformers asks once what is installed and must hear the truth.
    from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: F401

    finder = _Finder(packages)
    sys.meta_path.append(finder)  # the last that is asked
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for JSON lines
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Placeholder)]:
            del sys.modules[name]


def without_init(package: str, **names: Any) -> None:
    """Let `import package.module` work without running the package's __init__, which would import everything.

    names: what its modules expect to find in it. Raises ModuleNotFoundError when it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    if package not in sys.modules:
        sys.modules[package] = module = importlib.util.module_from_spec(spec)
        module.__dict__.update(names)
