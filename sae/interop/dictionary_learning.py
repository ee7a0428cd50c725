"""dictionary_learning: a folder with ae.pt and config.json, whose `dict_class` says what it is. Read and written.

What differs between its classes, and is folded:
- AutoEncoder: centred by `bias`; its loader brings decoder columns to norm 1 and multiplies latents by what it was.
- AutoEncoderNew, JumpReluAutoEncoder: x is not centred; b_dec W_enc goes into b_enc.
- AutoEncoderTopK: k a row; its `threshold` is not used unless asked for, and is passed over.
- BatchTopKSAE, MatryoshkaBatchTopKSAE: one threshold for all latents; -1 says that none was ever set, and is refused.
An ae.pt can only be written as torch.save writes it, a pickle: tensors alone, which weights_only=True reads.
Source: dictionary.py, trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py and utils.load_dictionary, 0.1.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.errors import InputError
from activations.files import write_aside, write_json
from sae.base import SAE
from sae.interop.made import centred, make, one_of, refuse, settings, text, uncentred, with_unit_rows
from sae.interop.tensors import Tensors, read_pt

WEIGHTS, CFG = "ae.pt", "config.json"
_OURS = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
    "JumpReluAutoEncoder": "jumprelu",
}
_TOPK = ("topk", "msae", "gsae", "structured")
_THRESHOLD = ("jumprelu", "batchtopk", "matryoshka", "mutualchoice", "featurechoice")
WRITES = ("standard", "gated", *_TOPK, *_THRESHOLD)


def read(path: Path) -> SAE:
    """The dictionary in a folder with ae.pt and config.json. Raises InputError."""
    folder = path if path.is_dir() else path.parent
    trainer = settings(folder / CFG).get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    kind = one_of(trainer.get("dict_class"), "dict_class", _OURS, folder / CFG)
    tensors, _ = read_pt(folder / WEIGHTS)
    weights = _weights(tensors, kind)
    fields: dict[str, Any] = {}
    if "TopK" in kind:
        fields["k"] = tensors.whole("k")[0]
    if kind == "AutoEncoderTopK":
        tensors.ignore("threshold")
    elif "TopK" in kind:
        weights["threshold"] = _one_threshold(tensors, len(weights["W_dec"]))
    if kind == "MatryoshkaBatchTopKSAE":
        fields["prefixes"] = _prefixes(tensors, len(weights["W_dec"]))
    tensors.finish()
    return make(_OURS[kind], fields, weights, _about(trainer))


def write(sae: SAE, folder: Path) -> None:
    """Write a dictionary for `load_dictionary`. Raises InputError for one that dictionary_learning has no class for."""
    name = sae.architecture
    if name not in WRITES or getattr(sae.cfg, "refine", None):
        raise refuse(sae, "dictionary_learning", ", ".join(WRITES) + " (without refine)")
    kind, tensors = _state(sae)
    trainer: dict[str, Any] = {
        "trainer_class": "",
        "dict_class": kind,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "lm_name": sae.model_name,
        "submodule_name": sae.hook,
    }
    if layer := re.search(r"blocks\.(\d+)\.", sae.hook):
        trainer["layer"] = int(layer[1])
    if "k" in tensors:
        trainer["k"] = int(tensors["k"])
    with write_aside(folder / WEIGHTS) as aside:
        torch.save({each: tensor.detach().cpu().contiguous() for each, tensor in tensors.items()}, aside)
    write_json(folder / CFG, {"trainer": trainer, "buffer": {"ctx_len": sae.metadata.get("context_size")}})


def _weights(tensors: Tensors, kind: str) -> dict[str, Tensor]:
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        d_in, d_sae = tensors.sizes("W_enc")
        shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        weights = {name: tensors.take(name, *shape) for name, shape in shapes.items()}
        if kind == "JumpReluAutoEncoder":
            weights["threshold"] = tensors.take("threshold", d_sae).clamp(min=0.0)  # below 0 its ReLU decides
            weights["b_enc"] = centred(weights["W_enc"], weights["b_enc"], weights["b_dec"])
        return weights
    d_sae, d_in = tensors.sizes("encoder.weight")
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    weights = {
        "W_enc": tensors.take("encoder.weight", d_sae, d_in).T.contiguous(),
        "W_dec": tensors.take("decoder.weight", d_in, d_sae).T.contiguous(),
        "b_dec": tensors.take(bias.get(kind, "b_dec"), d_in),
    }
    if kind == "GatedAutoEncoder":
        names = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
        return {**weights, **{ours: tensors.take(theirs, d_sae) for ours, theirs in names.items()}}
    weights["b_enc"] = tensors.take("encoder.bias", d_sae)
    if kind == "AutoEncoder":
        return with_unit_rows(weights, "b_enc")
    if kind == "AutoEncoderNew":
        weights["b_enc"] = centred(weights["W_enc"], weights["b_enc"], weights["b_dec"])
    return weights


def _one_threshold(tensors: Tensors, d_sae: int) -> Tensor:
    value = tensors.number("threshold")
    if value < 0:
        raise InputError(f"{tensors.path} has threshold {value:g}, unset: its training ended before it was measured.")
    return torch.full((d_sae,), value)


def _prefixes(tensors: Tensors, d_sae: int) -> tuple[int, ...]:
    """Where the inner groups end."""
    n = tensors.shapes[tensors.first("group_sizes")]
    sizes = tensors.whole("group_sizes", n[0] if len(n) == 1 else 0)
    if min(sizes) < 1 or sum(sizes) != d_sae:
        raise InputError(f"{tensors.path} has group_sizes {sizes[:8]}: expected sizes above 0 that add up to {d_sae}.")
    return tuple(sum(sizes[: i + 1]) for i in range(len(sizes) - 1)) or (d_sae,)


def _state(sae: SAE) -> tuple[str, dict[str, Tensor]]:
    """(class, its state dict)."""
    name = sae.architecture
    linear = {"encoder.weight": sae.W_enc.T, "decoder.weight": sae.W_dec.T}
    if name == "gated":
        theirs = {"gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"}
        return "GatedAutoEncoder", {
            **linear,
            "decoder_bias": sae.b_dec,
            **{each: sae.get_parameter(ours) for each, ours in theirs.items()},
        }
    if name == "standard":
        return "AutoEncoder", {**linear, "encoder.bias": sae.b_enc, "bias": sae.b_dec}
    linear |= {"encoder.bias": sae.b_enc, "b_dec": sae.b_dec}
    k: float = getattr(sae.cfg, "k", 0)
    if name in _TOPK:
        return "AutoEncoderTopK", {**linear, "k": _int(k), "threshold": torch.tensor(-1.0)}
    threshold = sae.get_parameter("threshold") if name == "jumprelu" else sae.get_buffer("threshold")
    if name in ("batchtopk", "matryoshka") and k == int(k) and bool((threshold == threshold[0]).all()):
        one = {"k": _int(k), "threshold": threshold[0].clone()}
        if name == "batchtopk":
            return "BatchTopKSAE", {**linear, **one}
        levels = torch.tensor((0, *sae.cfg.levels))  # type: ignore[attr-defined]
        same = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        return "MatryoshkaBatchTopKSAE", {**same, **one, "group_sizes": levels.diff()}
    W_enc, b_dec = sae.W_enc.detach(), sae.b_dec.detach()
    return "JumpReluAutoEncoder", {
        "W_enc": W_enc,
        "b_enc": uncentred(W_enc, sae.b_enc.detach(), b_dec),
        "W_dec": sae.W_dec,
        "b_dec": b_dec,
        "threshold": threshold,
    }


def _int(k: float) -> Tensor:
    return torch.tensor(int(k), dtype=torch.int32)


def _about(trainer: dict[str, Any]) -> dict[str, Any]:
    layer, module = trainer.get("layer"), text(trainer.get("submodule_name"))
    named = re.fullmatch(r"resid_post_layer_(\d+)", module)
    hook = f"blocks.{int(named[1])}.hook_resid_post" if named else module
    if not hook and isinstance(layer, int) and layer >= 0:
        hook = f"blocks.{layer}.hook_resid_post"
    return {"model_name": text(trainer.get("lm_name")), "hook_name": hook}
