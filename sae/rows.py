"""What a training row is made of: what the dictionary reads, then what it predicts, then a gradient, side by side.

Which of these there are follows from the architecture: most read one hook and give it back.
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from activations.cache import Activations, CachedActivations, scale_of
from activations.errors import InputError
from activations.joined import Joined, Pooled
from sae.base import SAE
from sae.registry import REGISTRY
from sae.settings import Training


def rows_for(settings: Training, at: Callable[[str], Activations]) -> Activations:
    """The rows that a dictionary is trained on. at: gives those at a hook.

    Raises InputError where they cannot be put together, or the gradients that it needs are not cached.
    """
    kind = REGISTRY[settings.architecture].sae
    reads = [at(hook) for hook in settings.reads]
    if len(reads) > 1 and not kind.joint:
        norms = [scale_of(_moments(each, settings.order)) for each in reads]
        return Pooled(reads, [norm / norms[0] for norm in norms])
    parts = [*reads, *(at(hook) for hook in settings.target_hooks)]
    if kind.weighs_gradient:
        if not isinstance(reads[0], CachedActivations):
            raise InputError(
                f"{settings.architecture} reads cached gradients: run `sae collect --gradients`, no --live."
            )
        parts.append(reads[0].gradients())
    return parts[0] if len(parts) == 1 else Joined(parts)


def width_read(settings: Training, rows: Activations) -> int:
    """d_in of the dictionary that is trained on `rows`."""
    n_read = len(settings.reads) if REGISTRY[settings.architecture].sae.joint else 1
    return sum(part.d_in for part in rows.parts[:n_read])


def parts_read(sae: SAE, rows: Activations) -> list[CachedActivations]:
    """The parts of cached `rows` that the dictionary reads."""
    parts = _cached(rows)
    ends = accumulate(part.d_in for part in parts)
    return [part for part, end in zip(parts, ends, strict=True) if end <= sae.d_in]


def parts_given_back(sae: SAE, rows: Activations) -> list[CachedActivations]:
    """The parts of cached `rows` that the dictionary gives back, side by side in x_hat."""
    read = parts_read(sae, rows)
    return _cached(rows)[len(read) :] if sae.target == "hook" else read


def sizes_of_hooks(architecture: str, widths: Sequence[int], target_widths: Sequence[int]) -> dict[str, Any]:
    """The fields of the architecture's config that follow from the hooks, from their widths."""
    follow = {"widths": tuple(widths), "layers": len(widths)}
    if target_widths:
        follow["d_out"] = sum(target_widths)
    fields = {field.name for field in dataclasses.fields(REGISTRY[architecture].config)}
    return {name: value for name, value in follow.items() if name in fields}


def scales_of(rows: Activations, order: str) -> list[float]:
    """What each part of a row is multiplied by, so that its mean norm is the square root of its width."""
    return [scale_of(_moments(part, order)) for part in rows.parts]


def columns_of(rows: Activations, scales: Sequence[float]) -> float | Float[Tensor, " columns"]:
    """The scale of each column of a row; one number where there is one part."""
    if len(scales) == 1:
        return scales[0]
    widths = torch.tensor([part.d_in for part in rows.parts])
    return torch.tensor(scales, dtype=torch.float32).repeat_interleave(widths)


def _moments(part: Activations, order: str) -> Any:
    if order == "shuffled" and isinstance(part, CachedActivations):
        return part.moments
    return part.opening_moments  # whether or not the other shards are there by now


def _cached(rows: Activations) -> list[CachedActivations]:
    parts = [part for part in rows.parts if isinstance(part, CachedActivations)]
    assert len(parts) == len(rows.parts), f"{rows.hook} is not cached"
    return parts
