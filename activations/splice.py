"""The only place that puts hooks on a model: read activations at a hook, or replace them; always undone.

Positions are absolute within each row's own text: a KV cache (one new token a forward) and left padding are counted, so
that an edit which skips position 0 skips it in every forward. Works on our Model, on a bare transformers model, on any
torch module, and on a TransformerLens bridge (through the transformers model inside it).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from activations.hooks import Tap, resolve


class Where(NamedTuple):
    """Which tokens a forward pass sees."""

    positions: Int[Tensor, "batch time"]
    """Absolute position of each token within its row's text; -1 on padding."""
    ids: Int[Tensor, "batch time"] | None
    """Token ids, when the model was called with them."""


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
            stack.callback(_observe(tap, keep(hook)).remove)
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
        where[:] = [_where(args, kwargs)]

    def apply(x: Tensor) -> Tensor:
        here = where[0] if where else _plain_where(x)
        return edit(x, here).to(x.dtype)

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        stack.callback(_substitute(tap, apply).remove)
        yield


def _where(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Where:
    """Positions of the tokens of this forward pass, from what the model was called with."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    tokens = ids if isinstance(ids, Tensor) else kwargs["inputs_embeds"]
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
    return Where(positions, ids if isinstance(ids, Tensor) else None)


def _plain_where(x: Tensor) -> Where:
    """For a module that is called by itself, outside its model: positions count from 0."""
    return Where(torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1), None)


def _observe(tap: Tap, see: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    if tap.side == "input":

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(args[0] if args else kwargs["hidden_states"])

        return tap.module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        see(output[0] if isinstance(output, tuple) else output)

    return tap.module.register_forward_hook(after)


def _substitute(tap: Tap, apply: Callable[[Tensor], Tensor]) -> torch.utils.hooks.RemovableHandle:
    if tap.side == "input":

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (apply(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": apply(kwargs["hidden_states"])}

        return tap.module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (apply(output[0]), *output[1:]) if isinstance(output, tuple) else apply(output)

    return tap.module.register_forward_hook(after)


@contextmanager
def _stoppable(module: nn.Module, got: dict[str, Tensor]) -> Iterator[None]:
    """Make `module.forward` return None when a hook ends the pass early; restored on leaving."""
    forward = module.forward

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
        del module.forward  # the instance attribute; the class's own method shows again
