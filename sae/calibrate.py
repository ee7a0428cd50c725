"""How long a training step takes on the machine at hand: a few real steps at the real size, or at two smaller widths.

Everything in a step that grows does so in proportion to d_sae, so two widths give the line a + b * d_sae.
"""

import dataclasses
import math
import time
from statistics import mean
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from activations.errors import InputError
from activations.machine import memory_of, times_of
from activations.model import fast_dtype
from sae.base import FittedSAE
from sae.plan import DEAD, check_memory, family, needed_memory
from sae.registry import REGISTRY
from sae.settings import Training
from sae.stepper import Stepper

ENCODE_ROWS = 4096
"""Rows for which `StepTime.encode` is: the batch of `sae.statistics`."""
_NARROW = 4096
"""Latents at which a step is timed to tell how long a wider one will take."""


class StepTime(NamedTuple):
    """Seconds."""

    step: float
    """One step, its batch picked out of the cache's rows included, while no latent is dead."""
    step_dead: float
    """The same while some are: what revives them is computed then."""
    initialise: float
    """Weights made from the first rows."""
    encode: float
    """4,096 rows through the finished dictionary."""
    basis: str
    """"measured" or "fitted"."""


def step_time(
    settings: Training,
    d_in: int,
    device: torch.device,
    rows: Float[Tensor, "n d_in"] | None = None,
    *,
    patience: float = 3.0,
) -> StepTime:
    """Time the step of `settings`, at its own width where that fits and a step takes under `patience` seconds.

    Else at the widest that does and at half of that, and a line through both. rows: some of the cache, in its
    precision, scaled as in training; None takes random ones. Raises InputError when not even a narrow one fits, or the
    dictionary takes no steps.
    """
    if issubclass(REGISTRY[settings.architecture].sae, FittedSAE):
        raise InputError(f"{settings.architecture} is fitted in one pass and takes no steps: its time is not planned.")
    rows = random_rows(d_in) if rows is None else rows
    wanted = int(settings.sizes["d_sae"])
    narrow = min(wanted, max(_NARROW, 4 * math.ceil(settings.sizes[REGISTRY[settings.architecture].sparsity])))
    check_memory([_at_width(settings, narrow)], d_in, device)
    probe = time_steps(_at_width(settings, narrow), d_in, device, rows, seconds=0.5 if narrow < wanted else patience)
    free = memory_of(device)[0]

    def affordable(width: int) -> bool:
        seconds = max(probe.step, probe.step_dead) * width / narrow
        return seconds <= patience and needed_memory([_at_width(settings, width)], d_in, device) <= free

    if narrow == wanted:
        return probe
    if affordable(wanted):
        return time_steps(settings, d_in, device, rows, seconds=patience)
    widest = 2 * narrow
    while 2 * widest < wanted and affordable(2 * widest):
        widest *= 2
    if needed_memory([_at_width(settings, widest)], d_in, device) > free:
        widest = narrow
    half, whole = (
        time_steps(_at_width(settings, width), d_in, device, rows, seconds=patience) for width in (widest // 2, widest)
    )
    beyond = (wanted - widest) / (widest - widest // 2)
    step, step_dead, initialise, encode = (
        y + beyond * max(y - x, 0.0) for x, y in zip(half[:4], whole[:4], strict=True)
    )
    return StepTime(step, step_dead, initialise, encode, "fitted")


def time_steps(
    settings: Training, d_in: int, device: torch.device, rows: Float[Tensor, "n d_in"], *, seconds: float
) -> StepTime:
    """Mean times of real steps of these settings on `device`, for about so many seconds.

    The mean and not the median: a run takes the sum of its steps, whatever disturbs some of them.
    """
    sae = REGISTRY[settings.architecture].sae(settings.config(d_in))
    first = rows[:4096].float()
    began = time.perf_counter()
    sae.initialise(first, settings.seed)
    initialise = time.perf_counter() - began
    rows = rows.to(device)
    settings = dataclasses.replace(
        settings, lr=1e-5, matmul=settings.matmul or str(fast_dtype(device)).removeprefix("torch.")
    )
    stepper = Stepper(sae.to(device), settings, 1.0)
    if family(settings.architecture) == "dense":
        # In the midst of training many entries are near their thresholds: a CPU then takes all (`sae.entries`).
        for name in {"b_enc", "b_gate"} & set(sae.by_latent):
            sae.get_parameter(name).data.add_(10.0)

    def step() -> None:
        stepper.step(rows.index_select(0, torch.randint(len(rows), (settings.batch,), device=device)))

    def timed(n_dead: int, seconds: float) -> float:
        stepper.tensors["last_fired"][:n_dead] = -(1 << 60)  # they fire again, but are counted only here
        stepper.recount()
        return mean(times_of(step, device, seconds))

    alive = timed(0, seconds)
    some_dead = timed(math.ceil(DEAD * sae.d_sae), seconds / 2) if family(settings.architecture) == "sparse" else alive
    sample = rows[:ENCODE_ROWS].float()
    encode = mean(times_of(lambda: sae.encode_sparse(sample), device, seconds / 2)) * ENCODE_ROWS / len(sample)
    return StepTime(alive, some_dead, initialise, encode, "measured")


def random_rows(d_in: int) -> Float[Tensor, "n d_in"]:
    """Rows with a mean norm of sqrt(d_in), as training has them."""
    return torch.randn(16_384, d_in, generator=torch.Generator().manual_seed(0)).bfloat16()


def _at_width(settings: Training, width: int) -> Training:
    return dataclasses.replace(settings, sizes={**settings.sizes, "d_sae": width})
