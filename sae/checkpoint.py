"""Checkpoints: folders `checkpoints/step-N`, written aside and renamed; the newest few are kept."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from activations.errors import InputError
from activations.files import read_json, write_aside, write_json
from activations.shuffle import Cursor

STATE = "state.safetensors"


class Place(NamedTuple):
    """Where a training is, beside its tensors."""

    step: int
    """Steps done."""
    cursor: Cursor
    """The next row."""
    scale: float
    """What rows are multiplied by; of a stream, its first rows are needed to find it."""


def steps_of(folder: Path) -> list[int]:
    """The steps that the dictionary in `folder` has checkpoints of, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def path_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:09d}"


def save(folder: Path, tensors: dict[str, Tensor], place: Place, facts: dict[str, Any]) -> None:
    """Write a checkpoint of `tensors` at `place`. facts: settings, versions."""
    with write_aside(path_of(folder, place.step)) as aside:
        aside.mkdir()
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside / STATE)
        write_json(aside / "state.json", {**place._asdict(), **facts})


def forget(folder: Path, steps: Iterable[int]) -> None:
    """Delete the checkpoints at `steps`; each is there whole or not at all."""
    gone = folder / "checkpoints" / ".forgotten"
    for step in steps:
        shutil.rmtree(gone, ignore_errors=True)  # what a killed process left
        path_of(folder, step).rename(gone)
        shutil.rmtree(gone)


def read_place(folder: Path, step: int) -> Place:
    state = read_json(path_of(folder, step) / "state.json")
    return Place(int(state["step"]), Cursor(*state["cursor"]), float(state["scale"]))


def restore(folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` from the checkpoint. Raises InputError when it is damaged or another training's."""
    path = path_of(folder, step)
    try:
        saved = load_file(path / STATE)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it, and training goes on from the one before.") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != wanted:
        wrong = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
        raise InputError(
            f"{path} is of another training: {wrong[0]} is {shapes.get(wrong[0])} there and {wanted.get(wrong[0])} "
            "here. Delete it, or train under another --name."
        )
    for name, tensor in tensors.items():
        # copy_ keeps the tensor's own memory layout, which decides the order of sums
        tensor.detach().copy_(saved[name])
