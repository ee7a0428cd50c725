"""Token sequences through a language model: the rows at each hook for one shard, on the model's device.

Sequences of one length are stacked as they stand; others are sorted by length, padded on the right and masked, so that
each is alone in its row of the batch. How a shard is cut into batches depends on the shard alone: whoever computes it,
whenever, gets the same bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from activations.cache import GRADIENT_SUFFIX
from activations.model import Model
from activations.splice import follow, read

ROWS_PER_BATCH = {"cpu": 4_096, "cuda": 65_536}
OnRows = Callable[[int], None]


class Batch(NamedTuple):
    """Some sequences of a shard, padded on the right."""

    ids: Int[Tensor, "batch time"]
    mask: Int[Tensor, "batch time"] | None
    """1 on tokens, 0 on padding; None when nothing is padded."""
    at: slice | Int[Tensor, " rows"]
    """Where in the shard the batch's tokens stand, in the order in which they stand in the batch."""


def batches(ids: Int[Tensor, " rows"], positions: Int[Tensor, " rows"], rows_per_batch: int) -> Iterator[Batch]:
    """A shard's tokens in batches of at most `rows_per_batch` tokens, padding included (but at least one sequence)."""
    starts = (positions == 0).nonzero().flatten()
    lengths = torch.diff(starts, append=torch.tensor([len(ids)]))
    longest = int(lengths.max())
    if bool((lengths == longest).all()):
        n = max(rows_per_batch // longest, 1)
        for first in range(0, len(starts), n):
            at = slice(first * longest, min(first + n, len(starts)) * longest)
            yield Batch(ids[at].view(-1, longest).long(), None, at)
        return
    order = np.argsort(-lengths.numpy(), kind="stable")
    while len(order):
        n = max(rows_per_batch // int(lengths[order[0]]), 1)  # sorted, so the first is the longest
        yield _padded(ids, [(int(starts[s]), int(lengths[s])) for s in order[:n]])
        order = order[n:]


def _padded(ids: Tensor, sequences: Sequence[tuple[int, int]]) -> Batch:
    longest = max(length for _, length in sequences)
    padded = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, (start, length) in enumerate(sequences):
        padded[row, :length] = ids[start : start + length]
        mask[row, :length] = 1
    at = torch.cat([torch.arange(start, start + length) for start, length in sequences])
    return Batch(padded, mask, at)


@torch.inference_mode()
def rows_at(
    model: Model,
    ids: Int[Tensor, " rows"],
    positions: Int[Tensor, " rows"],
    hooks: Sequence[str],
    dtype: torch.dtype,
    rows_per_batch: int | None = None,
    on_rows: OnRows = lambda _: None,
) -> dict[str, Float[Tensor, "rows _d"]]:
    """Rows at each hook for a shard of tokens; each forward pass stops after the last hook.

    dtype: of the rows. rows_per_batch: tokens in a forward pass; None takes what suits the device. on_rows: called
    with the number of tokens after each pass.
    """
    out: dict[str, Tensor] = {}
    per_batch = rows_per_batch or ROWS_PER_BATCH.get(model.device.type, 4_096)
    with read(model, hooks, stop=True) as got:
        for batch in batches(ids, positions, per_batch):
            _call(model, batch)
            for hook in hooks:
                _put(out, hook, got[hook], batch, len(ids), dtype)
            on_rows(_size(batch.at))
    return out


def rows_with_gradients(
    model: Model,
    ids: Int[Tensor, " rows"],
    positions: Int[Tensor, " rows"],
    hooks: Sequence[str],
    dtype: torch.dtype,
    rows_per_batch: int | None = None,
    on_rows: OnRows = lambda _: None,
) -> dict[str, Float[Tensor, "rows _d"]]:
    """As `rows_at`, with a column HOOK + GRADIENT_SUFFIX beside each hook: what a row does to its sequence's loss.

    The loss is the cross-entropy (nats) of the next token, summed over the sequence, so that a gradient does not depend
    on what shares its batch. A forward and a backward pass through the whole model.
    """
    out: dict[str, Tensor] = {}
    gradient_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16  # float16 has too small a range
    per_batch = rows_per_batch or ROWS_PER_BATCH.get(model.device.type, 4_096) // 4  # the logits are wide
    with torch.enable_grad(), follow(model, hooks) as got:
        for batch in batches(ids, positions, per_batch):
            logits = _call(model, batch).logits
            target = send(batch.ids, model.device)[:, 1:]
            if batch.mask is not None:
                target = torch.where(send(batch.mask, model.device)[:, 1:] == 1, target, -100)
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten(), reduction="sum")
            tensors = [got[hook] for hook in hooks]
            # A hook behind the last one that matters has no part in the loss: its gradient is 0.
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
            for hook, x, gradient in zip(hooks, tensors, gradients, strict=True):
                _put(out, hook, x.detach(), batch, len(ids), dtype)
                _put(out, hook + GRADIENT_SUFFIX, gradient, batch, len(ids), gradient_dtype)
            on_rows(_size(batch.at))
    return out


def widths(model: Model, hooks: Sequence[str]) -> dict[str, int]:
    """Width of the rows at each hook, from a pass over two tokens."""
    two = torch.zeros(2, dtype=torch.int32)
    rows = rows_at(model, two, torch.arange(2, dtype=torch.int32), hooks, torch.float32)
    return {hook: x.shape[1] for hook, x in rows.items()}


def _call(model: Model, batch: Batch) -> Any:
    """Run the model; returns what it does, or None when a hook ended the pass."""
    mask = None if batch.mask is None else send(batch.mask, model.device)
    return model.hf(input_ids=send(batch.ids, model.device), attention_mask=mask, use_cache=False)


def _put(out: dict[str, Tensor], name: str, x: Tensor, batch: Batch, n_rows: int, dtype: torch.dtype) -> None:
    """Put a pass's activations (batch, time, d) where they stand in the shard."""
    if name not in out:
        out[name] = torch.empty(n_rows, x.shape[-1], dtype=dtype, device=x.device)
    rows = x.flatten(0, 1)
    if batch.mask is None:
        out[name][batch.at] = rows.to(dtype)
        return
    assert isinstance(batch.at, Tensor)
    kept = batch.mask.flatten().nonzero().flatten()
    out[name].index_copy_(0, send(batch.at, x.device), rows.index_select(0, send(kept, x.device)).to(dtype))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for what it is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _size(at: slice | Tensor) -> int:
    return at.stop - at.start if isinstance(at, slice) else len(at)
