"""`steer`: edits applied to a running model for the length of a `with` block.

Rows that are never edited: position 0 (absolute, so in generation with a KV cache it is the prompt's first token and
nothing else), padding, and sinks (rows of a norm over the hook's threshold, judged before the first edit there).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.errors import InputError
from activations.hooks import resolve
from activations.splice import Where, replace, torch_module
from steering.edit import Add, Delta, Edit
from steering.vector import SteeringVector


@contextmanager
def steer(
    model: object, edits: SteeringVector | Edit | Sequence[SteeringVector | Edit], strength: float = 1.0
) -> Iterator[None]:
    """Within the block, the model runs edited; afterwards, also after an exception, it is as it was.

    model: our Model, a transformers model, or a TransformerLens bridge.
    edits: one or several, of any hooks; a vector is an Add. Those of one hook apply in order, each seeing x as the ones
    before it left it. Blocks nest. strength: multiplies each edit's coefficient (see `steering.edit`); at 0, Add and
    ProjectOut put no hook on the model at all.
    Arithmetic is in float32 whatever the model's dtype, and the result is rounded once.
    Raises InputError for a hook that the model lacks; and, at the first forward pass, for an edit of another width.
    """
    if not math.isfinite(strength):
        raise InputError(f"strength={strength}: expected a finite number.")
    by_hook: dict[str, list[Edit]] = {}
    for edit in as_edits(edits):
        resolve(torch_module(model), edit.hook)
        if not (scaled := edit.scaled(strength)).is_nothing:
            by_hook.setdefault(edit.hook, []).append(scaled)
    with ExitStack() as stack:
        for hook, group in by_hook.items():
            stack.enter_context(replace(model, hook, _Composed(group)))
        yield


def as_edits(edits: SteeringVector | Edit | Sequence[SteeringVector | Edit]) -> list[Edit]:
    """`edits` as a list, vectors turned into Add."""
    several = edits if isinstance(edits, Sequence) else [edits]
    return [Add(edit) if isinstance(edit, SteeringVector) else edit for edit in several]


def editable(
    x: Float[Tensor, "batch time d"], where: Where, sink_threshold: float | None
) -> Bool[Tensor, "batch time"]:
    """The rows that edits may change: past position 0, no padding (position -1), no sink where that is known."""
    keep = where.positions.to(x.device) > 0
    return keep if sink_threshold is None else keep & (x.norm(dim=-1) <= sink_threshold)


class _Composed:
    """The edits of one hook, one after another, as the splice calls them."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self.edits = edits
        # A sink is a matter of the hook, so one threshold serves all; the lowest that is known.
        self.sink_threshold = min((t for e in edits if (t := e.sink_threshold) is not None), default=None)
        self._deltas: tuple[torch.device | None, list[Delta]] = (None, [])

    def __call__(self, x: Float[Tensor, "batch time d"], where: Where) -> Float[Tensor, "batch time d"]:
        rows = x.to(torch.promote_types(x.dtype, torch.float32))
        keep = editable(rows, where, self.sink_threshold)[..., None]
        for delta in self._on(x):
            rows = torch.where(keep, rows + delta(rows), rows)
        return rows

    def _on(self, x: Tensor) -> list[Delta]:
        """The deltas on the device of x, made at the first forward pass, since only then is the device known."""
        if self._deltas[0] != x.device:
            for edit in self.edits:
                if edit.d != x.shape[-1]:
                    raise InputError(
                        f"An edit of width {edit.d} met activations of width {x.shape[-1]} at {edit.hook}: "
                        "it was made for another model or another hook."
                    )
            with torch.inference_mode(False):  # so that they also serve a later pass that takes gradients
                self._deltas = (x.device, [edit.on(x.device) for edit in self.edits])
        return self._deltas[1]
