"""Hook names: TransformerLens' names, mapped onto the modules of a plain transformers model.

`blocks.15.hook_resid_post` is the output of the sixteenth block. Any module path of any torch module works as a name
too and means that module's output. A name resolves to a `Tap`: a module, whether its input or its output is meant, and
which columns of it.

Rows are (batch, time, d) at every hook: where TransformerLens has heads as an axis of their own (hook_q, hook_k,
hook_v, hook_z), they are joined, and `heads_of` says how many; a number behind such a name takes one head:
`blocks.5.attn.hook_z.3`, which TransformerLens lacks. Two more differences, both for the better in edits:
hook_mlp_in is what the MLP gets, after the norm (TransformerLens' mlp.hook_in; its own hook_mlp_in is before the norm,
and off by default); and an edit at hook_resid_mid changes the residual stream, not only what the MLP's norm sees.
"""

import re
from typing import Any, NamedTuple

from torch import Tensor, nn

from activations.errors import InputError


class Heads(NamedTuple):
    """Some heads of a module's tensor, whose columns are slots of `d_head`, one for each head of queries, keys ..."""

    d_head: int
    slots: slice

    def get(self, x: Tensor) -> Tensor:
        """The rows that x holds, heads joined."""
        return x.unflatten(-1, (-1, self.d_head))[..., self.slots, :].flatten(-2)

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        """A new x that holds `rows`."""
        y = x.clone()
        y.unflatten(-1, (-1, self.d_head))[..., self.slots, :] = rows.unflatten(-1, (-1, self.d_head))
        return y


class Copy(NamedTuple):
    """All of a tensor, as a copy: the code of a model that we do not know may go on to change its tensors in place."""

    def get(self, x: Tensor) -> Tensor:
        return x.clone()

    def put(self, _x: Tensor, rows: Tensor) -> Tensor:
        return rows.clone()


class Tap(NamedTuple):
    """Where a hook sits: the input or the output of `module`."""

    module: nn.Module
    side: str
    """"input" or "output"."""
    block: int
    """The layer's number, -1 outside the blocks."""
    part: Heads | Copy | None = None
    """How the hook's rows lie in the module's tensor; None where they are the tensor."""
    heads: int | None = None
    """How many heads a row joins; None for a hook without heads, and for a single head."""
    around: nn.Module | None = None
    """The block that goes on with the tensor past `module`, too: what an edit adds, its output must get."""


class _Family(NamedTuple):
    """A kind of model; paths are those inside its base model, and inside a block."""

    blocks: str
    final_norm: str
    paths: dict[str, str]
    """Hook -> the module whose input or output it is (`_SIDES` says which)."""
    qkv: str = "apart"
    """How one projection holds queries, keys and values: "joined" one after another, or "by head"; else "apart"."""


# What TransformerLens calls it, in the order a block gets there -> whether it is a module's input or its output.
_SIDES = {
    "hook_resid_pre": "input",
    "attn.hook_q": "output",
    "attn.hook_k": "output",
    "attn.hook_v": "output",
    "attn.hook_z": "input",
    "hook_attn_out": "output",
    "hook_resid_mid": "input",
    "hook_mlp_in": "input",
    "mlp.hook_post": "input",
    "hook_mlp_out": "output",
    "hook_resid_post": "output",
}
_QKV = ("attn.hook_q", "attn.hook_k", "attn.hook_v")

# hook_attn_out and hook_mlp_out are what the block adds to its residual stream: after a norm or dropout that follows
# attention or MLP. So resid_pre + attn_out = resid_mid, and resid_mid + mlp_out = resid_post.
_LLAMA = {
    "hook_resid_pre": "",
    "attn.hook_q": "self_attn.q_proj",
    "attn.hook_k": "self_attn.k_proj",
    "attn.hook_v": "self_attn.v_proj",
    "attn.hook_z": "self_attn.o_proj",
    "hook_attn_out": "self_attn",
    "hook_resid_mid": "post_attention_layernorm",
    "hook_mlp_in": "mlp",
    "mlp.hook_post": "mlp.down_proj",
    "hook_mlp_out": "mlp",
    "hook_resid_post": "",
}
_GEMMA2 = _LLAMA | {
    "hook_attn_out": "post_attention_layernorm",
    "hook_resid_mid": "pre_feedforward_layernorm",
    "hook_mlp_out": "post_feedforward_layernorm",
}
_OLMO2 = _GEMMA2 | {"hook_resid_mid": "mlp"}
_PHI3 = _LLAMA | dict.fromkeys(_QKV, "self_attn.qkv_proj")
_PHI3 |= {"hook_attn_out": "resid_attn_dropout", "hook_mlp_out": "resid_mlp_dropout"}
_GPT2 = {
    "hook_resid_pre": "",
    **dict.fromkeys(_QKV, "attn.c_attn"),
    "attn.hook_z": "attn.c_proj",
    "hook_attn_out": "attn",
    "hook_resid_mid": "ln_2",
    "hook_mlp_in": "mlp",
    "mlp.hook_post": "mlp.c_proj",
    "hook_mlp_out": "mlp",
    "hook_resid_post": "",
}
_NEOX = {
    "hook_resid_pre": "",
    **dict.fromkeys(_QKV, "attention.query_key_value"),
    "attn.hook_z": "attention.dense",
    "hook_attn_out": "post_attention_dropout",
    "hook_resid_mid": "post_attention_layernorm",
    "hook_mlp_in": "mlp",
    "mlp.hook_post": "mlp.dense_4h_to_h",
    "hook_mlp_out": "post_mlp_dropout",
    "hook_resid_post": "",
}
_LLAMAS = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "gemma", "olmo", "helium", "arcee", "seed_oss")
_FAMILIES = {
    **dict.fromkeys(_LLAMAS, _Family("layers", "norm", _LLAMA)),
    **dict.fromkeys(("gemma2", "gemma3_text"), _Family("layers", "norm", _GEMMA2)),
    "gemma3": _Family("language_model.layers", "language_model.norm", _GEMMA2),  # with its eyes
    **dict.fromkeys(("olmo2", "olmo3"), _Family("layers", "norm", _OLMO2)),
    "phi3": _Family("layers", "norm", _PHI3, qkv="joined"),
    "gpt2": _Family("h", "ln_f", _GPT2, qkv="joined"),
    "gpt_neox": _Family("layers", "final_layer_norm", _NEOX, qkv="by head"),
}
_NAME = re.compile(r"blocks\.(\d+)\.(.+?)(?:\.(\d+))?")


def hook_names(model: nn.Module) -> list[str]:
    """All of TransformerLens' hook names that this model has, in the order of the layers; [] for an unknown family.

    Single heads (`blocks.5.attn.hook_z.3`) are not listed.
    """
    family = _family(model)
    if family is None:
        return []
    points = _points(model, family)
    return [f"blocks.{layer}.{point}" for layer in range(len(_blocks(model, family))) for point in points]


def heads_of(model: nn.Module, name: str) -> int | None:
    """How many heads a row at `name` joins, so that `x.unflatten(-1, (heads, -1))` has them apart.

    None for a hook without heads, and for a single head. Raises InputError for a hook that the model lacks.
    """
    return resolve(model, name).heads


def resolve(model: nn.Module, name: str) -> Tap:
    """Find the module that `name` means. Raises InputError that lists near names when the model lacks it."""
    family = _family(model)
    if family is not None and (match := _NAME.fullmatch(name)):
        blocks, layer, point = _blocks(model, family), int(match[1]), match[2]
        if point in _points(model, family) and layer < len(blocks):
            return _tap(model, family, name, layer, point, None if match[3] is None else int(match[3]))
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise InputError(_no_such_hook(model, name)) from None
    block = next((int(part) for part in name.split(".") if part.isdigit()), -1)
    return Tap(module, "output", block, Copy() if family is None else None)


def final_norm_of(model: nn.Module) -> nn.Module:
    """The norm before the unembedding. Raises InputError for an unknown family of models."""
    family = _family(model)
    if family is None:
        raise InputError(
            f"{type(model).__name__} is of no family whose final norm is known: expected {', '.join(_FAMILIES)}."
        )
    return _base(model).get_submodule(family.final_norm)


def _tap(model: nn.Module, family: _Family, name: str, layer: int, point: str, head: int | None) -> Tap:
    block = _blocks(model, family)[layer]
    module, side = block.get_submodule(family.paths[point]), _SIDES[point]
    around = block if point == "hook_resid_mid" else None
    if point not in (*_QKV, "attn.hook_z"):
        if head is not None:
            raise InputError(f"{name}: {point} has no heads, so that no number can follow it.")
        return Tap(module, side, layer, around=around)
    d_head, slots = _slots(model, family, point)
    if head is None:
        whole = family.qkv == "apart" or point == "attn.hook_z"
        part = None if whole else Heads(d_head, slice(slots.start, slots.stop, slots.step))
        return Tap(module, side, layer, part, heads=len(slots))
    if head >= len(slots):
        raise InputError(f"{name}: {point} has {len(slots)} heads: expected a head from 0 to {len(slots) - 1}.")
    return Tap(module, side, layer, Heads(d_head, slice(slots[head], slots[head] + 1)))


def _slots(model: nn.Module, family: _Family, point: str) -> tuple[int, range]:
    """(d_head, the slots of this width in the module's tensor that are the heads of `point`)."""
    whole: Any = model.config
    config = whole.get_text_config()  # of a model with eyes, too
    n_q = int(config.num_attention_heads)
    n_kv = int(getattr(config, "num_key_value_heads", None) or n_q)
    d_head = int(getattr(config, "head_dim", None) or config.hidden_size // n_q)
    if point == "attn.hook_z":
        return d_head, range(n_q)
    which = _QKV.index(point)
    n = (n_q, n_kv, n_kv)
    if family.qkv == "by head":
        return d_head, range(which, 3 * n_q, 3)
    start = sum(n[:which]) if family.qkv == "joined" else 0
    return d_head, range(start, start + n[which])


def _points(model: nn.Module, family: _Family) -> list[str]:
    return [point for point in family.paths if point != "hook_resid_mid" or not _is_parallel(model)]


def _is_parallel(model: nn.Module) -> bool:
    """Whether attention and MLP both start from resid_pre, so that nothing is between them."""
    return bool(getattr(model.config, "use_parallel_residual", False))


def _family(model: nn.Module) -> _Family | None:
    family = _FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    try:
        return family if family and _blocks(model, family) else None
    except AttributeError:  # of a known family, but wrapped in something
        return None


def _base(model: nn.Module) -> nn.Module:
    """The model without its head: transformers' `base_model`, which is the model itself where there is no head."""
    base = getattr(model, "base_model", model)
    assert isinstance(base, nn.Module)
    return base


def _blocks(model: nn.Module, family: _Family) -> nn.ModuleList:
    blocks = _base(model).get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _no_such_hook(model: nn.Module, name: str) -> str:
    family = _family(model)
    if family is None:
        return f"No hook {name!r} in {type(model).__name__}: expected a module path from its named_modules()."
    last = len(_blocks(model, family)) - 1
    why = " (its attention and MLP run side by side)" if "hook_resid_mid" in name and _is_parallel(model) else ""
    return (
        f"No hook {name!r} in {type(model).__name__}{why}: expected blocks.0 to blocks.{last} and one of "
        f"{', '.join(_points(model, family))}, or a module path."
    )
