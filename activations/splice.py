"""The only place that puts hooks on a model: read activations at hooks, replace them, or follow them; always undone.

Positions are absolute within each row's own text: a KV cache (one new token a forward) and left padding are counted, so
that an edit which skips position 0 skips it in every forward. Works on our Model, on a bare transformers model, on any
torch module, and on a TransformerLens bridge (through the transformers model inside it).

Activations are (batch, time, d) at a language model's hooks. Those of other modules come as they are: (batch, d),
(batch, channels, height, width) ...; of a tuple, a dict or a dataclass, the first tensor is meant.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from activations.errors import InputError
from activations.hooks import Tap, resolve


class Where(NamedTuple):
    """Which tokens the activations at a hook are of."""

    positions: Int[Tensor, "batch ..."]
    """Absolute position of each token within its row's text; -1 on padding. Where the call of the model does not tell
    (pixels, a plain module), they count from 0 along the second axis of activations (batch, time, d); activations of
    another shape have no time axis, and one 0 a row."""
    ids: Int[Tensor, "batch time"] | None
    """Token ids, when the model was called with them and has an activation for each."""


Edit = Callable[[Tensor, Where], Tensor]


@runtime_checkable
class _Wrapper(Protocol):
    hf: nn.Module


class _Stop(Exception):
    """Ends a forward pass once the last wanted hook has been read."""


def torch_module(model: object) -> nn.Module:
    """The torch module to hook: our Model's `.hf`, a bridge's original model, or the module itself."""
    if isinstance(model, _Wrapper):
        return model.hf
    original = getattr(model, "original_model", None)  # TransformerLens' bridge
    module = original if isinstance(original, nn.Module) else model
    assert isinstance(module, nn.Module), f"expected a torch module, got {type(model).__name__}"
    return module


@contextmanager
def read(model: object, hooks: Sequence[str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Within the block, each forward pass leaves its activations in the yielded dict: hook name -> (batch, time, d).

    stop: end each forward pass after the last of `hooks`. Call the torch module then
        (`model.hf(...)`), which returns None.
    Raises InputError for a hook that the model lacks; no hook is left on the model then.
    """
    module = torch_module(model)
    taps = {hook: resolve(module, hook) for hook in hooks}
    got: dict[str, Tensor] = {}

    def keep(hook: str) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            got[hook] = x
            if stop and len(got) == len(taps):
                raise _Stop

        return see

    with ExitStack() as stack:
        if stop:
            stack.enter_context(_stoppable(module, got))
        for hook, tap in taps.items():
            _attach(stack, tap, keep(hook))
        yield got


@contextmanager
def replace(model: object, hook: str, edit: Edit) -> Iterator[None]:
    """Within the block, `edit(x, where)` takes the place of the activations x (batch, time, d) at `hook`.

    `edit` returns the same shape; the result is cast back to the dtype of x. Blocks nest: the inner one edits last.
    """
    module = torch_module(model)
    tap = resolve(module, hook)
    where: list[Where] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        where[:] = _where(args, kwargs)

    def apply(x: Tensor) -> Tensor:
        here = where[0] if where and where[0].positions.shape == x.shape[:-1] else _plain_where(x)
        return edit(x, here).to(x.dtype)

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        _attach(stack, tap, apply)
        yield


@contextmanager
def follow(model: object, hooks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, each forward pass leaves in the yielded dict the tensors that it went on with, for gradients.

    `torch.autograd.grad(loss, list(got.values()))` is then the gradient of the loss at each hook, though no parameter
    requires one; the values are those of a pass without the block. The dict is in the order of the forward pass.
    Raises InputError for a hook that the model lacks, and in a forward pass under no_grad or inference_mode.
    """
    module = torch_module(model)
    taps = {hook: resolve(module, hook) for hook in hooks}
    got: dict[str, Tensor] = {}

    def keep(hook: str) -> Callable[[Tensor], Tensor]:
        def mark(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise InputError(
                    f"No gradient reaches {hook} under torch.no_grad or inference_mode, and a Model called by itself "
                    "is under the latter: call model.hf(input_ids=ids), with gradients on."
                )
            # A node of its own also where x has a gradient already: x may go other ways than through this hook.
            got[hook] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            return got[hook]

        return mark

    with ExitStack() as stack:
        for hook, tap in taps.items():
            _attach(stack, tap, keep(hook))
        yield got


def _where(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Where]:
    """Positions of the tokens of this forward pass, from what the model was called with; [] when that is no tokens."""
    first = kwargs.get("input_ids", args[0] if args else None)
    ids = first if isinstance(first, Tensor) and first.dim() == 2 and not first.is_floating_point() else None
    tokens = ids if ids is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        return []
    batch, time = tokens.shape[:2]
    cache = kwargs.get("past_key_values")
    seen = int(cache.get_seq_length()) if cache is not None else 0
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        # The mask covers the cached tokens too; the count of real tokens so far is the position, whatever the padding.
        count = mask.long().cumsum(dim=1)[:, -time:] - 1
        positions = torch.where(mask[:, -time:].bool(), count, -1)
    else:
        positions = torch.arange(seen, seen + time, device=tokens.device).expand(batch, time)
    return [Where(positions, ids)]


def _plain_where(x: Tensor) -> Where:
    """For activations that are not of the tokens of the call, or of a module called outside its model."""
    if x.dim() == 3:
        return Where(torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1), None)
    return Where(torch.zeros(x.shape[:1], dtype=torch.long, device=x.device), None)


def _attach(stack: ExitStack, tap: Tap, act: Callable[[Tensor], Tensor | None]) -> None:
    """Until the stack closes, show `act` the rows at the tap; they give way to what it returns, unless that is None."""
    shift: list[Tensor] = []

    def on(x: Tensor) -> Tensor | None:
        rows = act(x if tap.part is None else tap.part.get(x))
        if rows is None:
            return None
        new = rows if tap.part is None else tap.part.put(x, rows)
        if tap.around is not None:
            shift[:] = [new - x]
        return new

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = on(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = on(_first(output))
        return None if new is None else _with_first(output, new)

    def carry(_module: nn.Module, _args: Any, output: Any) -> Any:
        return _with_first(output, _first(output) + shift.pop()) if shift else None

    if tap.side == "input":
        stack.callback(tap.module.register_forward_pre_hook(before, with_kwargs=True).remove)
    else:
        stack.callback(tap.module.register_forward_hook(after).remove)
    if tap.around is not None:  # before all who look at the block's output, whenever they came
        stack.callback(tap.around.register_forward_hook(carry, prepend=True).remove)


def _first(output: Any) -> Tensor:
    """The first tensor of what a module returned."""
    if isinstance(output, Tensor):
        return output
    found = next((value for _, value in _items(output) if isinstance(value, Tensor)), None)
    if found is None:
        raise InputError(f"A module at a hook returned {type(output).__name__} without a tensor: hook another one.")
    return found


def _with_first(output: Any, new: Tensor) -> Any:
    """`output` with another first tensor; the module's own object stays as it was."""
    if isinstance(output, Tensor):
        return new
    key = next(key for key, value in _items(output) if isinstance(value, Tensor))
    if isinstance(output, tuple | list):
        items = [new if i == key else value for i, value in enumerate(output)]
        return getattr(type(output), "_make", type(output))(items)  # _make: a named tuple's
    if not isinstance(output, Mapping):
        return dataclasses.replace(output, **{key: new})
    changed: Any = copy.copy(output)
    changed[key] = new
    return changed


def _items(output: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(output, tuple | list):
        return iter(enumerate(output))
    if isinstance(output, Mapping):
        return iter(output.items())
    fields = dataclasses.fields(output) if dataclasses.is_dataclass(output) else ()
    return ((field.name, getattr(output, field.name)) for field in fields)


@contextmanager
def _stoppable(module: nn.Module, got: dict[str, Tensor]) -> Iterator[None]:
    """Make `module.forward` return None when a hook ends the pass early; restored on leaving."""
    forward, own = module.forward, "forward" in vars(module)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        got.clear()
        try:
            return forward(*args, **kwargs)
        except _Stop:
            return None

    module.forward = stopping
    try:
        yield
    finally:
        if own:  # another block's, or a library's
            module.forward = forward
        else:
            del module.forward  # the instance attribute; the class's own method shows again
