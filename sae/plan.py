"""What a training needs before it starts: bytes, FLOPs and seconds, as pure functions of its settings.

The memory is that of the fullest moment of a step: float32 weights, Adam's two moments and gradients, on a GPU beside
low-precision copies of the matrices. A dictionary too large for one GPU is cut by latents: each GPU holds
d_sae / n rows of the wide matrices, sees every row of a batch, chooses among its own latents, and adds its part of
x_hat to that of the others. Where a number was fitted and not counted, it says to what.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from activations.errors import InputError
from activations.machine import Machine, memory_of
from sae.architectures.matching_pursuit import MatchingPursuitSAE
from sae.base import Config
from sae.dense import AT_ONCE, CACHED
from sae.registry import REGISTRY
from sae.settings import Training
from sae.stepper import GRAPH_BELOW

FILLED = 0.92
"""Share of a device's memory that a plan fills: what fragments and communication take is not in the sums."""
CHECKPOINT_SECONDS = 60.0
STATISTICS_TOKENS = 1_000_000
"""Tokens that a finished dictionary's statistics are taken over, at most."""
DEAD = 1 / 4
"""Share of a k-sparse dictionary's latents that may be dead for all that a plan knows: reviving them takes memory."""
_MOST_GPUS = 1 << 20
_PROGRAM = {"cpu": 620_000_000, "cuda": 800_000_000}
"""Bytes of a process before it trains: Python, torch and its libraries."""
_BATCH = 24
"""Bytes a number of the batch (batch, d_in): x, x_hat, errors and gradients. Fitted, as what is left of the peaks of
four TopK steps on H100s and four on a CPU when all that is counted here is taken away."""
_SCRATCH = {"cpu": 6, "cuda": 0}
"""Bytes a parameter that come and go beside the gradients: fitted to TopK and JumpReLU steps at two widths on a CPU."""
_PASSES = 10
"""How often a JumpReLU step reads or writes (batch, d_sae) numbers of two bytes: pre written; read, z written; z read;
its gradient written; that and pre read, pre's gradient written; both read for the weights' gradients."""
_DEAD_PASSES = 10
"""The same of (batch, dead latents): fitted to one TopK step of 25 % dead latents on an H100."""
_REUSE = 2.6
"""How much faster a GPU picks rows in a step than in random order: rows of a batch stay in its cache. Fitted to TopK
steps of 65,536 and 131,072 latents of width 2,304 on an H100."""
_LAUNCHES = 3e-4
"""Seconds of a step on a GPU that do not shrink with it. Fitted to a step of 9,216 latents on an H100 (0.8 ms)."""


class Parts(NamedTuple):
    """Bytes on one device, or seconds of one step, by what they go into."""

    of: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.of.values())


def family(architecture: str) -> str:
    """ "sparse" where a row keeps k latents and only those are trained, "pursuit" where it picks them one by one, else
    "dense"."""
    if architecture == MatchingPursuitSAE.architecture:
        return "pursuit"
    return "sparse" if REGISTRY[architecture].sparsity == "k" else "dense"


@lru_cache
def tensors_of(architecture: str, config: Config) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """Shape of each (parameter, buffer) of a dictionary, without making it."""
    with torch.device("meta"):
        sae = REGISTRY[architecture].sae(config)
    parameters = {name: p.shape for name, p in sae.named_parameters()}
    buffers = {name: t.shape for name, t in sae.state_dict().items() if name not in parameters}
    return parameters, buffers


def n_parameters(settings: Training, d_in: int) -> int:
    return sum(shape.numel() for shape in tensors_of(settings.architecture, settings.config(d_in))[0].values())


def n_wide(settings: Training, d_in: int) -> int:
    """Numbers in the matrices alone."""
    shapes = tensors_of(settings.architecture, settings.config(d_in))[0].values()
    return sum(shape.numel() for shape in shapes if len(shape) == 2)


def checkpoint_bytes(settings: Training, d_in: int) -> int:
    """One checkpoint: weights, both moments of Adam, buffers, when each latent last fired. Without the header."""
    parameters, buffers = tensors_of(settings.architecture, settings.config(d_in))
    n, n_buffers = (sum(shape.numel() for shape in shapes.values()) for shapes in (parameters, buffers))
    return 12 * n + 4 * (len(parameters) + n_buffers) + 8 * _d_sae(settings)


def dictionary_bytes(settings: Training, d_in: int) -> int:
    """The finished dictionary: weights, and density, maximum and minimum of each latent. Without the headers."""
    buffers = tensors_of(settings.architecture, settings.config(d_in))[1]
    saved = sum(buffers[name].numel() for name in REGISTRY[settings.architecture].sae.saved)
    return 4 * (n_parameters(settings, d_in) + saved) + 12 * _d_sae(settings)


def memory(
    cells: Sequence[Training],
    d_in: int,
    kind: str,
    *,
    shards: int = 1,
    rows: int = 1,
    row_bytes: int = 0,
    cached_rows: int = 0,
) -> Parts:
    """Bytes on each of `shards` devices of `kind` ("cpu" or "cuda") while `cells` are trained on one feed of batches.

    rows: groups of devices that share a batch's rows. row_bytes, cached_rows: of the cache, whose windows are held
    beside; 0 leaves them out. Of a k-sparse dictionary a share of `DEAD` is taken to be dead.
    """
    n = sum(n_parameters(cell, d_in) for cell in cells)
    low = [cell for cell in cells if kind == "cuda" and cell.matmul != "float32"]
    batch = max(cell.batch for cell in cells) // rows
    fullest = [_step_memory(cell, d_in, kind, shards, rows) for cell in cells]
    # Graphs keep the memory that their steps passed through; other steps take turns in it.
    graphs = [kind == "cuda" and shards * rows == 1 and c.batch * _d_sae(c) <= GRAPH_BELOW for c in cells]
    turns = {name: max((s[name] for s, g in zip(fullest, graphs, strict=True) if not g), default=0) for name in _STEP}
    kept = {name: sum(s[name] for s, g in zip(fullest, graphs, strict=True) if g) for name in _STEP}
    return Parts(
        {
            "weights": _share(4 * n, shards),
            "moments of Adam": _share(8 * n, shards),
            "running mean": _share(sum(4 * n_parameters(cell, d_in) for cell in cells if cell.ema), shards),
            "low-precision copies": _share(sum(2 * n_wide(cell, d_in) for cell in low), shards),
            **{name: turns[name] + kept[name] for name in _STEP},
            "batch": _BATCH * batch * d_in,
            "rows of the cache": min(row_bytes * cached_rows, 4 << 30),
            "program": _PROGRAM[kind],
        }
    )


def needed_memory(cells: Sequence[Training], d_in: int, device: torch.device, *, shards: int = 1, rows: int = 1) -> int:
    """Bytes that training takes on one device beside the program, which is there already, and rows of the cache."""
    parts = memory(cells, d_in, device.type, shards=shards, rows=rows)
    return int(parts.total - parts.of["program"])


def check_memory(cells: Sequence[Training], d_in: int, device: torch.device, *, shards: int = 1, rows: int = 1) -> None:
    """Raise InputError when the device has not the memory that training `cells` together takes; as `memory`."""
    need, (free, there) = needed_memory(cells, d_in, device, shards=shards, rows=rows), memory_of(device)
    if need > free:
        what, less = f"{sum(map(_d_sae, cells)):,} latents", "lower --d-sae or --batch"
        if len(cells) > 1:
            what, less = f"{len(cells)} dictionaries with {what} together", "train fewer at a time"
        raise InputError(
            f"Training {what} of width {d_in:,} takes {need / 1e9:.1f} GB and "
            f"{'the GPU' if device.type == 'cuda' else 'this machine'} has {free / 1e9:.1f} of {there / 1e9:.1f} GB "
            f"free: {less}, or see `sae plan`."
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


def step_flops(settings: Training, d_in: int, dead: float = 0.0) -> float:
    """FLOPs of a step's wide products: five, or the encoder's alone where the rest is sparse, and four of the dead; one
    a pick of a pursuit."""
    kind = family(settings.architecture)
    products = 1 + 4 * dead if kind == "sparse" else settings.mean_k if kind == "pursuit" else 5
    return float(products) * 2.0 * settings.batch * d_in * _d_sae(settings)


def step_bytes(settings: Training, d_in: int, dead: float = 0.0) -> dict[str, float]:
    """Bytes that a step moves through memory, by what for: the optimiser, wide activations, rows picked out."""
    n, kind = n_parameters(settings, d_in), family(settings.architecture)
    k = settings.mean_k
    passes = {"sparse": 2 + _DEAD_PASSES * dead, "pursuit": 2 * k, "dense": _PASSES}[kind]
    # Gradient written and read twice (its norm, the step); weight and two moments read and written; a copy of 2 bytes.
    moved = {"optimiser": 38.0 * n, "latents": 2.0 * passes * settings.batch * _d_sae(settings)}
    if kind != "dense":  # decoding, its gradient to the values, and both weight gradients; or residuals each way
        moved["gathers"] = 4 * 2.0 * settings.batch * k * d_in
    return moved


def step_seconds(settings: Training, d_in: int, machine: Machine, gpus: int = 1, dead: float = 0.0) -> Parts:
    """Seconds of a step by rates alone, nothing overlapped; dead: share of a k-sparse dictionary's latents.

    Within 15 % of the six steps that were measured on H100s: TopK of 9,216, 65,536 (also with 25 % dead) and 131,072
    latents (also on two), JumpReLU of 65,536.
    """
    rate = machine.matmul["bfloat16" if settings.matmul != "float32" else "float32"]
    moved, on_gpu = step_bytes(settings, d_in, dead), machine.kind == "cuda"
    seconds = {
        "product": step_flops(settings, d_in, dead) / gpus / rate,
        "optimiser": moved["optimiser"] / gpus / machine.adam,
        "latents": moved["latents"] / gpus / machine.copy,
        "gathers": moved.get("gathers", 0.0) / gpus / (machine.gather * (_REUSE if on_gpu else 1)),
    }
    if on_gpu:
        seconds["launches"] = _LAUNCHES
    if gpus > 1:
        link = machine.link if gpus <= machine.per_host else machine.network
        # x_hat is summed over the GPUs (out and in, two bytes), and each row's candidates go to all (8 bytes each).
        exchanged = 4.0 * settings.batch * d_in
        if family(settings.architecture) == "sparse":
            exchanged += 8.0 * settings.batch * settings.mean_k * gpus
        seconds["links"] = exchanged / link if link else 0.0
    return Parts(seconds)


def checkpoint_count(seconds: float) -> int:
    """Checkpoints written in a training of so many seconds."""
    return int(seconds // CHECKPOINT_SECONDS)


def _d_sae(settings: Training) -> int:
    return int(settings.sizes["d_sae"])


_STEP = ("gradients", "pre-activations", "dead latents", "scratch")


def _step_memory(settings: Training, d_in: int, kind: str, shards: int, rows: int) -> dict[str, int]:
    """Bytes that one dictionary's step comes to beside the state and the batch."""
    n, batch, d_sae = n_parameters(settings, d_in), settings.batch // rows, _share(_d_sae(settings), shards)
    entry = 2 if settings.matmul != "float32" else 4
    gradients, scratch, dead = _share(4 * n, shards), _share(_SCRATCH[kind] * n, shards), 0
    at_once = min(max(AT_ONCE if kind == "cuda" else CACHED, 256 * d_sae), batch * d_sae)
    if family(settings.architecture) == "sparse":
        # A GPU has not the gradients yet while it has pre-activations, nor most of what a batch comes to.
        early = gradients + 16 * batch * d_in if kind == "cuda" else 0
        wide = max(entry * at_once + 24 * batch * int(settings.largest_k) - early, 0)
        m = math.ceil(DEAD * d_sae)
        dead = 2 * entry * batch * m + (4 + entry) * m * d_in
    elif family(settings.architecture) == "pursuit":
        # A gradient for each pick, in float32, twice while they are summed by latent; products of some rows.
        wide = entry * at_once + 8 * batch * int(settings.largest_k) * d_in
    else:
        # pre, z and the gradient; a CPU makes them in several steps (fewer where few entries count: `sae.entries`).
        wide = (3 if kind == "cuda" else 6) * entry * batch * d_sae
    return dict(zip(_STEP, (gradients, wide, dead, scratch), strict=True))


def _share(whole: int, shards: int) -> int:
    return math.ceil(whole / shards)
