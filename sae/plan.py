"""What a training needs before it starts: bytes, FLOPs and seconds, as pure functions of its settings.

The memory is that of a step with float32 weights, Adam's two moments and gradients, on a GPU with low-precision copies
of both wide matrices and pre-activations of a part of the rows at a time. A dictionary too large for one GPU is cut by
latents: each GPU holds d_sae / n rows of the wide matrices, sees every row of a batch, chooses among its own latents,
and adds its part of x_hat to that of the others.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from activations.errors import InputError
from activations.machine import Machine, memory_of
from sae.base import Config
from sae.registry import REGISTRY
from sae.settings import Training

FILLED = 0.92
"""Share of a device's memory that a plan fills: what fragments and communication take is not in the sums."""
CHECKPOINT_SECONDS = 60.0
STATISTICS_TOKENS = 1_000_000
"""Tokens that a finished dictionary's statistics are taken over, at most."""
_GPU_WIDE = 1 << 28
"""Pre-activations that a GPU holds at once."""
_MOST_GPUS = 1 << 20
_PROGRAM = {"cpu": 620_000_000, "cuda": 800_000_000}
"""Bytes of a process before it trains: Python, torch and its libraries."""
# How often a step holds (batch, d_sae) and (d_sae, d_in) numbers of four bytes at its fullest, beside weights and
# gradients: found by measuring peaks on a CPU, sparse ones with dead latents (1.1 without).
_WIDE = {"sparse": 2.4, "dense": 8.0}
_SCRATCH = {"cpu": 1, "cuda": 0}
# Products of (batch, d_in, d_sae) a step, and how often it reads or writes the (batch, d_sae) of two bytes each.
_PRODUCTS = {"sparse": 1, "dense": 5}
_PASSES = {"sparse": 2, "dense": 16}


class Parts(NamedTuple):
    """Bytes on one device, or seconds of one step, by what they go into."""

    of: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.of.values())


def family(architecture: str) -> str:
    """ "sparse" where a row keeps k latents and only those are trained, else "dense"."""
    return "sparse" if REGISTRY[architecture].sparsity == "k" else "dense"


@lru_cache
def tensors_of(architecture: str, config: Config) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers in each (parameter, buffer) of a dictionary, without making it."""
    with torch.device("meta"):
        sae = REGISTRY[architecture].sae(config)
    parameters = {name: p.numel() for name, p in sae.named_parameters()}
    buffers = {name: t.numel() for name, t in sae.state_dict().items() if name not in parameters}
    return parameters, buffers


def n_parameters(settings: Training, d_in: int) -> int:
    return sum(tensors_of(settings.architecture, settings.config(d_in))[0].values())


def checkpoint_bytes(settings: Training, d_in: int) -> int:
    """One checkpoint: weights, both moments of Adam, buffers, when each latent last fired. Without the header."""
    parameters, buffers = tensors_of(settings.architecture, settings.config(d_in))
    return 12 * sum(parameters.values()) + 4 * (len(parameters) + sum(buffers.values())) + 8 * _d_sae(settings)


def dictionary_bytes(settings: Training, d_in: int) -> int:
    """The finished dictionary: weights, and density, maximum and minimum of each latent. Without the headers."""
    return 4 * n_parameters(settings, d_in) + 12 * _d_sae(settings)


def memory(
    cells: Sequence[Training], d_in: int, kind: str, *, shards: int = 1, row_bytes: int = 0, cached_rows: int = 0
) -> Parts:
    """Bytes on each of `shards` devices of `kind` ("cpu" or "cuda") while `cells` are trained on one feed of batches.

    row_bytes, cached_rows: of the cache, whose windows are held beside; 0 leaves them out.
    """
    n = sum(n_parameters(cell, d_in) for cell in cells)
    wide = sum(2 * d_in * _d_sae(cell) for cell in cells)
    scratch = max(4 * d_in * _d_sae(cell) for cell in cells)
    held = max(_wide(cell, kind, shards) for cell in cells)
    batch = max(cell.batch for cell in cells)
    return Parts(
        {
            "weights": _share(4 * n, shards),
            "moments of Adam": _share(8 * n, shards),
            "gradients": _share(4 * max(n_parameters(cell, d_in) for cell in cells), shards),
            "low-precision copies": _share(2 * wide, shards) if kind == "cuda" else 0,
            "scratch": _share(_SCRATCH[kind] * scratch, shards),
            "pre-activations": held,
            "batch": 6 * 4 * batch * d_in,
            "rows of the cache": min(row_bytes * cached_rows, 4 << 30),
            "program": _PROGRAM[kind],
        }
    )


def needed_memory(settings: Training, d_in: int, device: torch.device) -> int:
    """Bytes that training takes on one device, rows of the cache apart."""
    return int(memory([settings], d_in, device.type).total)


def check_memory(settings: Training, d_in: int, device: torch.device) -> None:
    """Raise InputError when the device has not the memory that training takes."""
    need, (free, there) = needed_memory(settings, d_in, device), memory_of(device)
    if need > free:
        raise InputError(
            f"Training {_d_sae(settings):,} latents of width {d_in:,} takes {need / 1e9:.1f} GB and "
            f"{'the GPU' if device.type == 'cuda' else 'this machine'} has {free / 1e9:.1f} of {there / 1e9:.1f} GB "
            "free: lower --d-sae or --batch, or see `sae plan train --gpus N`."
        )


def needed_gpus(cells: Sequence[Training], d_in: int, bytes_each: int) -> int:
    """The smallest number of GPUs, with so many bytes each, that hold `cells` cut by latents.

    Raises InputError when what each GPU holds whole (batch, program) is too much already.
    """

    def fits(n: int) -> bool:
        return memory(cells, d_in, "cuda", shards=n).total <= FILLED * bytes_each

    if not fits(_MOST_GPUS):
        raise InputError(
            f"A batch of {max(cell.batch for cell in cells):,} rows of width {d_in:,} does not fit "
            f"{bytes_each / 1e9:.1f} GB however many GPUs share the latents: lower --batch."
        )
    return 1 + bisect_left(range(1, _MOST_GPUS), True, key=fits)


def step_flops(settings: Training, d_in: int) -> float:
    """FLOPs of a step's wide products: the encoder's alone where the rest is sparse, else all five."""
    return _PRODUCTS[family(settings.architecture)] * 2.0 * settings.batch * d_in * _d_sae(settings)


def step_bytes(settings: Training, d_in: int) -> dict[str, float]:
    """Bytes that a step moves through memory, by what for: the optimiser, wide activations, rows picked out."""
    n, kind = n_parameters(settings, d_in), family(settings.architecture)
    # Gradient written and read twice (its norm, the step); weight and two moments read and written; a copy of 2 bytes.
    moved = {"optimiser": 38.0 * n, "latents": 2.0 * _PASSES[kind] * settings.batch * _d_sae(settings)}
    if kind == "sparse":  # decoding, its gradient to the values, and both weight gradients
        k = settings.sizes["k"]
        moved["gathers"] = 4 * 2.0 * settings.batch * k * d_in
    return moved


def step_seconds(settings: Training, d_in: int, machine: Machine, gpus: int = 1) -> Parts:
    """Seconds of a step by rates alone, nothing overlapped: what a well-made step comes near to, not a measurement."""
    rate = machine.matmul["bfloat16" if settings.matmul != "float32" else "float32"]
    moved = step_bytes(settings, d_in)
    seconds = {
        "product": step_flops(settings, d_in) / gpus / rate,
        "optimiser": moved["optimiser"] / gpus / machine.adam,
        "latents": moved["latents"] / gpus / machine.copy,
        "gathers": moved.get("gathers", 0.0) / gpus / machine.gather,
    }
    if gpus > 1:
        link = machine.link if gpus <= machine.per_host else machine.network
        # x_hat is summed over the GPUs (out and in, two bytes), and each row's candidates go to all (8 bytes each).
        exchanged = 4.0 * settings.batch * d_in
        if family(settings.architecture) == "sparse":
            exchanged += 8.0 * settings.batch * settings.sizes["k"] * gpus
        seconds["links"] = exchanged / link if link else 0.0
    return Parts(seconds)


def checkpoint_count(seconds: float) -> int:
    """Checkpoints written in a training of so many seconds."""
    return int(seconds // CHECKPOINT_SECONDS)


def _d_sae(settings: Training) -> int:
    return int(settings.sizes["d_sae"])


def _wide(settings: Training, kind: str, shards: int) -> int:
    """Bytes of (rows, d_sae) tensors of a step."""
    entries = settings.batch * _share(_d_sae(settings), shards)
    if kind == "cuda":
        entries = min(entries, _GPU_WIDE)
    return int(4 * _WIDE[family(settings.architecture)] * entries)


def _share(whole: int, shards: int) -> int:
    return math.ceil(whole / shards)
