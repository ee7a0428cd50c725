"""Which format a folder or file is in, told by the names of its files alone."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from activations.errors import InputError
from activations.run import dictionary_folder
from sae.base import SAE
from sae.files import CFG, WEIGHTS
from sae.interop import dictionary_learning, gemma_scope, hub, openai, openmoss, saelens, sparsify


class Found(NamedTuple):
    """A dictionary in some format."""

    format: str
    path: Path
    """The folder or file, here."""
    files: tuple[Path, ...]
    """What it is made of."""


READERS: dict[str, Callable[[Path], SAE]] = {
    "saelens": saelens.read,
    "sparsify": sparsify.read,
    "dictionary_learning": dictionary_learning.read,
    "gemma_scope": gemma_scope.read,
    "openmoss": openmoss.read,
    "openai": openai.read,
}
_FOLDERS: list[tuple[str, tuple[str, ...]]] = [
    ("saelens", (CFG, WEIGHTS)),
    ("sparsify", (sparsify.CFG, sparsify.WEIGHTS)),
    ("dictionary_learning", (dictionary_learning.CFG, dictionary_learning.WEIGHTS)),
    ("gemma_scope", (gemma_scope.NPZ,)),
    ("gemma_scope", (gemma_scope.SAFETENSORS,)),
    *(("openmoss", (about, weights)) for about in (openmoss.NEW, openmoss.OLD) for weights in openmoss.WEIGHTS),
]
"""Format and the files that a folder of it has; the first that fits is it."""
EXPECTED = "; ".join(
    [
        "cfg.json and sae_weights.safetensors (SAELens, ours)",
        "cfg.json and sae.safetensors (sparsify)",
        "config.json and ae.pt (dictionary_learning)",
        "params.npz or params.safetensors (Gemma Scope)",
        "config.json or hyperparams.json and weights (OpenMOSS)",
        "one .pt file (OpenAI)",
    ]
)


def detect(path: Path) -> Found | None:
    """The dictionary in a folder, or that a file belongs to; None where no format fits."""
    if path.is_file() and path.suffix == ".pt" and path.name != dictionary_learning.WEIGHTS:
        return Found("openai", path, (path,))
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent if path.is_file() else path
    for name, files in _FOLDERS:
        if all((folder / file).is_file() for file in files):
            return Found(name, folder, tuple(folder / file for file in files))
    states = sorted(set(folder.glob("*.pt")) - {folder / dictionary_learning.WEIGHTS})
    return Found("openai", states[0], (states[0],)) if len(states) == 1 else None


def find(address: str | Path) -> Found:
    """The dictionary at a path, RUN or RUN/ID, or of a name on the hub. Raises InputError where there is none."""
    path = Path(address)
    in_run = (path.parent / "run.json").exists()
    if not path.exists() and not in_run and hub.is_name(str(address)):
        path = hub.fetch(str(address))
    elif not path.exists() or (path / "run.json").exists():
        path = dictionary_folder(path)
    if found := detect(path):
        return found
    if (path / CFG).exists():
        return Found("saelens", path, (path / CFG,))  # without its weights, as its loader will say
    inner = sorted(each.name for each in path.iterdir() if each.is_dir() and detect(each)) if path.is_dir() else []
    if inner:
        more = f" and {len(inner) - 5} more" if len(inner) > 5 else ""
        raise InputError(f"{address} holds {len(inner)} dictionaries: name one of {', '.join(inner[:5])}{more}.")
    raise InputError(f"{address} is no dictionary: expected {EXPECTED}.")


def read(found: Found) -> SAE:
    """The dictionary, on the CPU. Raises InputError."""
    return READERS[found.format](found.path)
