"""Tensors of files from elsewhere. Nothing in them is run, and their sizes are checked before memory is taken.

- .safetensors: the header says names, types and shapes, and the library holds it against the file's size.
- .pt: `weights_only=True`, as an uncompressed archive alone: a compressed one may grow without bound, and the form
  before torch 1.6 takes the memory that it declares. A view that is larger than its storage is refused.
- .npz: `allow_pickle=False`; each array's header is held against the size of its member.
"""

import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from activations.errors import InputError
from sae.files import FLOATS

_MOST_DEFLATED = 64
"""Times that an .npz may be larger than its file; weights hardly shrink."""
_SLACK = 2**20


class Tensors:
    """The tensors of one file. They are taken one by one, with the shape that they must have.

    Every refusal is an InputError that names the file.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], get: Callable[[str], Tensor]) -> None:
        """get: the tensor of a name in `shapes`; called only once its shape is right."""
        self.path, self.shapes = path, dict(shapes)
        self._get = get
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def first(self, *names: str) -> str:
        """Which of these names of one thing the file has."""
        found = next((name for name in names if name in self), None)
        if found is None:
            have = ", ".join(sorted(self.shapes)[:12]) or "nothing"
            raise InputError(f"{self.path} has no tensor {names[0]}: expected one, and it has {have}.")
        return found

    def sizes(self, name: str) -> tuple[int, int]:
        """The shape of a matrix, (rows, columns)."""
        shape = self.shapes[self.first(name)]
        if len(shape) != 2 or min(shape) < 1:
            raise InputError(f"{self.path} has {name} of shape {shape}: expected a matrix.")
        return shape[0], shape[1]

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of weights as float32, a copy."""
        tensor = self._load(name, shape)
        if not tensor.dtype.is_floating_point:
            raise InputError(f"{self.path} has {name} of type {_type(tensor)}: expected a floating-point type.")
        tensor = tensor.to(torch.float32, copy=True).contiguous()
        if not torch.isfinite(tensor).all():
            raise InputError(f"{self.path} has {name} with values that are not finite: the file is damaged.")
        return tensor

    def number(self, name: str) -> float:
        """A tensor that is one number."""
        return float(self.take(name))

    def whole(self, name: str, n: int | None = None) -> list[int]:
        """A tensor of whole numbers: one, or a row of `n`."""
        shape = () if n is None else (n,)
        tensor = self._load(name, shape)
        if tensor.dtype.is_floating_point or tensor.dtype is torch.bool:
            raise InputError(f"{self.path} has {name} of type {_type(tensor)}: expected whole numbers.")
        return [int(value) for value in tensor.flatten()]

    def ignore(self, *names: str) -> None:
        """Pass over what does not belong to the finished dictionary."""
        self._taken.update(names)

    def finish(self) -> None:
        """Refuse a file with tensors that nobody took: whatever they do would be left out."""
        if rest := sorted(set(self.shapes) - self._taken):
            raise InputError(f"{self.path} has a tensor {rest[0]} that this kind of dictionary has not: it is another.")

    def _load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self.shapes[self.first(name)]
        if found != shape:
            raise InputError(f"{self.path} has {name} of shape {found}: expected {shape}.")
        self._taken.add(name)
        return self._get(name)


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a .safetensors file. Raises InputError."""
    try:
        file = safe_open(path, framework="pt")
        headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is missing or damaged ({error}).") from None
    if wrong := next((name for name, each in headers.items() if each.get_dtype() not in FLOATS), None):
        shown = headers[wrong].get_dtype()
        raise InputError(f"{path} has {wrong} of type {shown}: expected one of {', '.join(FLOATS)}.")
    return Tensors(path, {name: tuple(each.get_shape()) for name, each in headers.items()}, file.get_tensor)


def read_pt(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """(the tensors of a .pt file, what else lies beside them: numbers, texts, dicts). Raises InputError."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except (zipfile.BadZipFile, OSError):
        raise InputError(f"{path} is damaged, or of torch before 1.6: save it again with a newer torch.") from None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise InputError(f"{path} is compressed: torch.save makes no such file; save it again with torch.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds more than tensors, and is not run: expected a state dict alone.") from None
    except (RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged ({reason}).") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds a {type(loaded).__name__}: expected a state dict.")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        sparse = tensor.layout is not torch.strided or tensor.is_quantized
        if sparse or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise InputError(f"{path} has {name} of shape {tuple(tensor.shape)} in less memory: expected it whole.")
    others = {str(name): value for name, value in loaded.items() if not isinstance(value, Tensor)}
    return Tensors(path, {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__), others


def read_npz(path: Path) -> Tensors:
    """The arrays of an .npz file. Raises InputError."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            grown = sum(member.file_size for member in members)
            if grown > _MOST_DEFLATED * path.stat().st_size + _SLACK:
                raise InputError(f"{path} would grow to {grown:,} bytes: expected weights, which hardly compress.")
            shapes = {member.filename.removesuffix(".npy"): _npy_shape(archive, member, path) for member in members}
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except InputError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}).") from None

    def get(name: str) -> Tensor:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return torch.from_numpy(np.ascontiguousarray(arrays[name]))
        except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} is damaged at {name} ({error}).") from None

    return Tensors(path, shapes, get)


def _npy_shape(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> tuple[int, ...]:
    """The shape in an array's header, if the array is of floats and as large as its member."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        left = member.file_size - file.tell()
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise InputError(f"{path} has {member.filename} of type {dtype}: expected a floating-point type.")
    if math.prod(shape) * dtype.itemsize != left:
        raise InputError(f"{path} has {member.filename} of shape {shape} in {left:,} bytes: it is damaged.")
    return tuple(int(size) for size in shape)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
