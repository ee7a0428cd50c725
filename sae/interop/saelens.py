"""SAELens: cfg.json and sae_weights.safetensors, of its version 6 and before. Read and written.

What we save is in its form already where it has the architecture (`sae.registry`); `is_foreign` says which of its
folders need more, which is folded here:
- `apply_b_dec_to_input` false: x is not centred; b_dec W_enc goes into b_enc.
- `rescale_acts_by_decoder_norm`: latents are chosen, and given, times the norm of their decoder row, which gets norm 1.
- `normalize_activations` layer_norm with TopK: our `mlsae`; z comes out as theirs times the row's standard deviation.
- before version 6: flat keys, and `activation_fn` topk for the architecture.
Refused: scales that are not in the files (expected_average_only_in), other normalisations of single rows, ReLU and
JumpReLU transcoders, temporal SAEs.
Source: sae_lens/saes/*.py and loading/pretrained_sae_loaders.py, 6.54.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from activations.errors import InputError
from sae.base import SAE
from sae.files import CFG, WEIGHTS, load_own, save_sae
from sae.interop.made import centred, make, one_of, refuse, settings, standardised, text, whole, with_unit_rows
from sae.interop.tensors import Tensors, read_safetensors
from sae.registry import REGISTRY

WRITES = tuple(name for name, entry in REGISTRY.items() if entry.saelens) + ("msae", "gsae", "structured")
_READS = ("standard", "topk", "abstopk", "jumprelu", "gated")
_FLAT = ("hook_name", "hook_point", "activation_fn", "activation_fn_str")
_NORMALISATIONS = ("none", "layer_norm")
_EPS = 1e-5


def is_foreign(cfg: dict[str, Any]) -> bool:
    """Whether something has to be folded before the dictionary is one of ours."""
    transcoder = "transcoder" in str(cfg.get("architecture")) and "k" not in cfg
    return (
        transcoder
        or any(key in cfg for key in _FLAT)
        or cfg.get("apply_b_dec_to_input") is False
        or cfg.get("normalize_activations") not in (None, "none")
        or bool(cfg.get("rescale_acts_by_decoder_norm"))
    )


def read(path: Path) -> SAE:
    """The dictionary in a folder with cfg.json and sae_weights.safetensors. Raises InputError."""
    folder = path if path.is_dir() else path.parent
    about = folder / CFG
    if not is_foreign(cfg := settings(about)):
        return load_own(folder)
    cfg = _of_version_6(cfg)
    name = one_of(cfg["architecture"], "architecture", _READS, about)
    norm = cfg.get("normalize_activations") or "none"  # before version 6 it may be false, or true for a scale
    if norm not in _NORMALISATIONS or (norm == "layer_norm" and name != "topk"):
        raise InputError(
            f"{about} has normalize_activations={norm!r} of {name}: expected none, or layer_norm of topk. "
            "A scale that is not in the file has to be folded in first (fold_activation_norm_scaling_factor)."
        )
    tensors = read_safetensors(folder / WEIGHTS)
    weights = _weights(tensors, name)
    fields = {"k": whole(cfg, "k", about)} if "topk" in name else {}
    if cfg.get("rescale_acts_by_decoder_norm"):
        weights = with_unit_rows(weights, "b_enc")
    told = cfg.get("metadata")
    metadata = {**(told if isinstance(told, dict) else {})}
    metadata |= {key: text(metadata.get(key)) for key in ("model_name", "hook_name")}
    plain = cfg.get("apply_b_dec_to_input", True) is False
    if norm == "layer_norm":
        if not plain:
            weights["b_enc"] = centred(weights["W_enc"], weights["b_enc"], -weights["b_dec"])
        return standardised(weights, fields["k"], _EPS, metadata)
    if plain:
        for bias in ("b_gate", "b_enc"):
            if bias in weights:
                weights[bias] = centred(weights["W_enc"], weights[bias], weights["b_dec"])
        if "b_mag" in weights:
            weights["b_mag"] = centred(weights["W_enc"] * weights["r_mag"].exp(), weights["b_mag"], weights["b_dec"])
    return make(name, fields, weights, metadata)


def write(sae: SAE, folder: Path) -> None:
    """Write a dictionary for `SAE.load_from_disk`. Raises InputError for one that SAELens has no class for."""
    if sae.architecture not in WRITES or getattr(sae.cfg, "refine", None):
        raise refuse(sae, "SAELens", ", ".join(WRITES) + " (without refine)")
    if REGISTRY[sae.architecture].saelens is None:  # another training of what is a TopK when it is done
        weights = {name: p.detach().cpu() for name, p in sae.named_parameters()}
        sae = make("topk", {"k": sae.cfg.k}, weights, sae.metadata)  # type: ignore[attr-defined]
    save_sae(sae, folder)


def _of_version_6(cfg: dict[str, Any]) -> dict[str, Any]:
    """Settings with the keys of version 6."""
    if not any(key in cfg for key in _FLAT):
        return {"architecture": "standard", **cfg}
    chosen = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    kwargs = cfg.get("activation_fn_kwargs")
    name = cfg.get("architecture", "standard")
    if chosen == "topk":
        name = "topk"
    elif chosen != "relu":
        name = f"{name} with {chosen!r}"  # which is then refused by this name
    metadata = {"hook_name": cfg.get("hook_name") or cfg.get("hook_point"), "model_name": cfg.get("model_name")}
    k = kwargs.get("k") if isinstance(kwargs, dict) else None
    return {**cfg, "architecture": name, **({} if k is None else {"k": k}), "metadata": metadata}


def _weights(tensors: Tensors, name: str) -> dict[str, Tensor]:
    d_in, d_sae = tensors.sizes("W_enc")
    latents = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(name, ("b_enc",))
    weights = {
        "W_enc": tensors.take("W_enc", d_in, d_sae),
        "W_dec": tensors.take("W_dec", d_sae, d_in),
        "b_dec": tensors.take("b_dec", d_in),
        **{each: tensors.take(each, d_sae) for each in latents},
    }
    if "threshold" in weights:
        weights["threshold"].clamp_(min=0.0)  # below 0 its ReLU decides
    scaling = "scaling_factor"  # of finetuned dictionaries, and for a while 1 in all others
    if scaling in tensors and bool((tensors.take(scaling, d_sae) == 1).all()):
        tensors.ignore(scaling)
    elif scaling in tensors:
        raise InputError(f"{tensors.path} has a {scaling} other than 1: fold it into W_dec first.")
    tensors.finish()
    return weights
