"""Checkpoints: folders `checkpoints/step-N`, written aside and renamed; the newest few are kept.

Tensors go through torch's distributed checkpoints into safetensors files, one a process, each with the place of its
parts in the whole. So what N processes wrote, M read, however either share the latents.
"""

import math
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from activations.errors import InputError
from activations.files import read_json, write_aside, write_json
from activations.shuffle import Cursor
from sae.parallel import ALONE, Mesh


class Place(NamedTuple):
    """Where a training is, beside its tensors."""

    step: int
    """Steps done."""
    cursor: Cursor
    """The next row."""
    scales: tuple[float, ...]
    """What the parts of rows are multiplied by; of a stream, its first rows are needed to find it. Of a boost, then
    the factor of its target."""


def steps_of(folder: Path) -> list[int]:
    """The steps that the dictionary in `folder` has checkpoints of, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def path_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:09d}"


def save(folder: Path, tensors: dict[str, Tensor], place: Place, facts: dict[str, Any], mesh: Mesh = ALONE) -> None:
    """Write a checkpoint of `tensors` at `place`. facts: settings, versions.

    On a mesh all processes call this together: each writes its own parts, and the leader gives the folder its name once
    all are there.
    """
    path = path_of(folder, place.step)
    if not mesh.leads:
        aside = mesh.ranks.from_leader(None)
        _write(aside, tensors, mesh)
        mesh.ranks.barrier()
        return
    with write_aside(path) as aside:
        aside.mkdir()
        mesh.ranks.from_leader(aside)
        _write(aside, tensors, mesh)
        write_json(aside / "state.json", {**place._asdict(), **facts})
    mesh.ranks.barrier()


def forget(folder: Path, steps: Iterable[int]) -> None:
    """Delete the checkpoints at `steps`; each is there whole or not at all."""
    gone = folder / "checkpoints" / ".forgotten"
    for step in steps:
        shutil.rmtree(gone, ignore_errors=True)  # what a killed process left
        path_of(folder, step).rename(gone)
        shutil.rmtree(gone)


def read_place(folder: Path, step: int) -> Place:
    state = read_json(path_of(folder, step) / "state.json")
    return Place(int(state["step"]), Cursor(*state["cursor"]), tuple(map(float, state["scales"])))


def restore(folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` from the checkpoint. Raises InputError when it is damaged or another training's."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    path = path_of(folder, step)
    try:
        reader = HuggingFaceStorageReader(str(path))
        saved = reader.read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it, and training goes on from the one before.") from None
    shapes = {}
    for name, there in saved.items():
        assert isinstance(there, TensorStorageMetadata)
        shapes[name] = tuple(there.size)
        if sum(math.prod(chunk.sizes) for chunk in there.chunks) != math.prod(there.size):
            raise InputError(
                f"{path} is damaged (a part of {name} is missing): delete it, and training goes on from the one before."
            )
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != wanted:
        wrong = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
        raise InputError(
            f"{path} is of another training: {wrong[0]} is {shapes.get(wrong[0])} there and {wanted.get(wrong[0])} "
            "here. Delete it, or train under another --name."
        )
    # Each process reads for itself what it needs. The copy keeps a tensor's own memory layout, which decides the order
    # of sums.
    with _alone_on_purpose():
        load(dict(tensors), storage_reader=reader, no_dist=True)


def _write(aside: Path, tensors: dict[str, Tensor], mesh: Mesh) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # With `save_distributed` there is no index file: the parts say themselves where they belong.
    writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
    with _alone_on_purpose():
        save(dict(tensors), storage_writer=writer, no_dist=mesh.ranks.world == 1)


@contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """Without torch's warning that a checkpoint is one process' own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
