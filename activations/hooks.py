"""Hook names: TransformerLens' names, mapped onto the modules of a plain transformers model.

`blocks.15.hook_resid_post` is the output of the sixteenth block. Any module path of the model works as a name too and
means that module's output. A name resolves to a `Tap`: a module, and whether its input or its output is meant.
"""

import re
from typing import NamedTuple

from torch import nn

from activations.errors import InputError


class Tap(NamedTuple):
    """Where a hook sits: the input or the output of `module`; `block` is the layer's number, -1 outside the blocks."""

    module: nn.Module
    side: str  # "input" or "output"
    block: int


class _Family(NamedTuple):
    blocks: str  # path of the list of blocks
    attention: str
    mlp: str
    attention_out: str  # the projection whose input is hook_z, heads joined
    mlp_out: str  # the projection whose input is mlp.hook_post
    final_norm: str


_LLAMA = _Family("model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj", "model.norm")
_FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), _LLAMA),
    "gpt2": _Family("transformer.h", "attn", "mlp", "attn.c_proj", "mlp.c_proj", "transformer.ln_f"),
    "gpt_neox": _Family(
        "gpt_neox.layers", "attention", "mlp", "attention.dense", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"
    ),
}
# What TransformerLens calls it -> (member of the family that holds the path inside the block, side).
_POINTS = {
    "hook_resid_pre": (None, "input"),
    "hook_resid_post": (None, "output"),
    "hook_attn_out": ("attention", "output"),
    "hook_mlp_out": ("mlp", "output"),
    "hook_mlp_in": ("mlp", "input"),
    "attn.hook_z": ("attention_out", "input"),
    "mlp.hook_post": ("mlp_out", "input"),
}
_NAME = re.compile(r"blocks\.(\d+)\.(.+)")


def hook_names(model: nn.Module) -> list[str]:
    """All of TransformerLens' hook names that this model has, in the order of the layers; [] for an unknown family."""
    family = _family(model)
    if family is None:
        return []
    n_blocks = len(_blocks(model, family))
    return [f"blocks.{layer}.{point}" for layer in range(n_blocks) for point in _POINTS]


def resolve(model: nn.Module, name: str) -> Tap:
    """Find the module that `name` means. Raises InputError that lists near names when the model lacks it."""
    family = _family(model)
    if (match := _NAME.fullmatch(name)) and family is not None:
        blocks, layer, point = _blocks(model, family), int(match[1]), match[2]
        if point in _POINTS and layer < len(blocks):
            member, side = _POINTS[point]
            module = blocks[layer] if member is None else blocks[layer].get_submodule(getattr(family, member))
            return Tap(module, side, layer)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise InputError(_no_such_hook(model, name)) from None
    block = next((int(part) for part in name.split(".") if part.isdigit()), -1)
    return Tap(module, "output", block)


def final_norm_of(model: nn.Module) -> nn.Module:
    """The norm before the unembedding. Raises InputError for an unknown family of models."""
    family = _family(model)
    if family is None:
        raise InputError(
            f"{type(model).__name__} is of no family whose final norm is known: expected {', '.join(_FAMILIES)}."
        )
    return model.get_submodule(family.final_norm)


def _family(model: nn.Module) -> _Family | None:
    return _FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))


def _blocks(model: nn.Module, family: _Family) -> nn.ModuleList:
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _no_such_hook(model: nn.Module, name: str) -> str:
    family = _family(model)
    if family is None:
        return f"No hook {name!r} in {type(model).__name__}: expected a module path from its named_modules()."
    last = len(_blocks(model, family)) - 1
    points = ", ".join(_POINTS)
    return (
        f"No hook {name!r} in {type(model).__name__}: expected blocks.0 to blocks.{last} and one of {points}, "
        f"such as blocks.{last // 2}.hook_resid_post, or a module path."
    )
