"""Dictionaries made of activations (ITDA): which tokens their atoms are, and how alike two of them are by that.

Two models that read one text in one order can be compared without a common space: by the tokens that became atoms.
Source: Leask et al. 2025, arXiv:2505.17769, section 5.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from activations.errors import InputError
from activations.files import write_aside
from activations.run import dictionary_folder

ATOMS = "atoms.safetensors"
"""Beside the weights: `labels` (d_sae, 2), of each atom its document and its row in the run."""

Labels = Int[Tensor, "_atoms 2"]


def save_labels(labels: Labels, folder: Path) -> None:
    with write_aside(folder / ATOMS) as aside:
        save_file({"labels": labels.cpu().contiguous()}, aside)


def labels_of(address: str | Path) -> Labels:
    """Of each atom of the dictionary RUN/ID its document and its row in the run.

    Raises InputError when it has no such atoms.
    """
    path = dictionary_folder(address) / ATOMS
    try:
        return load_file(path)["labels"]
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(f"{path} is missing or damaged ({error}): expected an itda dictionary.") from None


def jaccard(a: Labels, b: Labels) -> float:
    """Tokens that are atoms of both over those that are of either; 0 when neither has any."""
    ours, theirs = ({tuple(label) for label in labels.tolist()} for labels in (a, b))
    return len(ours & theirs) / max(len(ours | theirs), 1)


def similarities(a: Sequence[Labels], b: Sequence[Labels]) -> Float[Tensor, "_a _b"]:
    """`jaccard` of each layer of one model with each of another, layers in order."""
    return torch.tensor([[jaccard(ours, theirs) for theirs in b] for ours in a])


def layer_matching(a: Sequence[Labels], b: Sequence[Labels]) -> float:
    """Share of the layers whose most similar layer of the other model is at the same place; among equals the first.

    a, b: one model's layers and the other's, equally many.
    """
    return float((similarities(a, b).argmax(dim=1) == torch.arange(len(a))).float().mean())
