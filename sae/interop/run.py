"""A dictionary from elsewhere in a run: `sae import` and, back again, `sae export`.

What came from where is in the dictionary's metadata: the format, the address, and the SHA-256 of each file. Statistics
need activations, so there are none until `sae eval` has read some.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from activations.errors import InputError
from activations.files import lock
from activations.run import Run
from sae.base import SAE
from sae.files import CFG, load_sae, save_sae
from sae.interop import detect, dictionary_learning, saelens, sparsify

WRITERS: dict[str, Callable[[SAE, Path], None]] = {
    "saelens": saelens.write,
    "dictionary_learning": dictionary_learning.write,
    "sparsify": sparsify.write,
}


def bring_in(
    address: str | Path,
    run: str | Path,
    *,
    name: str | None = None,
    hook: str | None = None,
    target_hook: str | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Make the dictionary at `address` (a path, or a name on the hub) one of `run`, which may be new; its folder.

    name: by default HOOK-ARCH-dN-FORMAT. hook: what it reads, target_hook: what it predicts, where the files do not say
    or say it in other names. model: by default the run's; in a new run what the files say.
    Raises InputError for what is no dictionary, one whose hook or model nobody says, one that does not fit the run's
    activations, and a name that is taken (unless `overwrite`).
    """
    found = detect.find(address)
    sae = detect.read(found)
    sae.statistics = None
    _place(sae, hook, target_hook, address)
    told, known = sae.model_name, Run.open(run).meta.get("model") if (Path(run) / "run.json").exists() else None
    sae.metadata["model_name"] = model or known or told
    if not sae.model_name:
        raise InputError(f"{address} does not say which model it is of: add --model, as `sae collect` takes it.")
    opened = Run.start(run)
    if sae.hook in opened.hooks() and (width := opened.activations(sae.hook).d_in) != sae.d_in:
        raise InputError(f"{address} reads {sae.d_in} values, but {sae.hook} of {run} has {width}: it is of another.")
    sae.metadata["imported"] = {
        "format": found.format,
        "source": str(address),
        "model_name": told,
        "sha256": {str(file.relative_to(_root(found))): _hash(file) for file in found.files},
    }
    folder = opened.dictionary(name or f"{sae.hook}-{sae.architecture}-d{sae.d_sae}-{found.format}")
    with lock(folder / ".train.lock"):
        if (folder / "train.json").exists():
            raise InputError(f"{folder} was trained here, and would lose its settings: take another --name.")
        if (folder / CFG).exists() and not overwrite:
            raise InputError(f"{folder} is there already: take another --name, or --overwrite.")
        _empty(folder)  # statistics, figures, features and explanations are the old one's
        save_sae(sae, folder)
    return folder


def give_out(address: str | Path, form: str, out: Path) -> None:
    """Write the dictionary at `address` (RUN, RUN/ID or a folder) into the folder `out`, in one of `WRITERS`.

    Raises InputError for an architecture that the format has no form for, and for a folder with something in it.
    """
    check_empty(out)
    WRITERS[form](load_sae(address), out)


def check_empty(out: Path) -> None:
    """Raises InputError unless `out` is a new or empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already: expected a new or an empty folder.")


def _place(sae: SAE, hook: str | None, target_hook: str | None, address: str | Path) -> None:
    """Say what it reads, and what it predicts."""
    if hook:
        sae.metadata["hook_name"] = hook
        sae.metadata.pop("hook_names", None)
    if not sae.hook:
        raise InputError(f"{address} does not say which hook it reads: add --hook, such as blocks.12.hook_resid_post.")
    if sae.target != "hook":
        return
    if target_hook:
        sae.metadata |= {"hook_name_out": target_hook, "hook_names_out": [target_hook]}
    if not sae.metadata.get("hook_names_out"):
        raise InputError(f"{address} is a transcoder and does not say what it predicts: add --target-hook.")


def _empty(folder: Path) -> None:
    """Take everything out of a dictionary's folder but its lock; first what makes it one."""
    (folder / CFG).unlink(missing_ok=True)
    for each in folder.iterdir():
        if each.is_dir():
            shutil.rmtree(each)
        elif not each.name.startswith(".train."):
            each.unlink()


def _root(found: detect.Found) -> Path:
    return found.path if found.path.is_dir() else found.path.parent


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
