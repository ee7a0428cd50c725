"""OpenMOSS' Language-Model-SAEs (llamascopium), and its older form, which Llama Scope is in. Read only.

    p = f_in x W_E + b_E        z = p * 1[n p > t]        y_hat = (z W_D + b_D) / f_out        f = sqrt(d) / mean norm

n is the norm of a latent's decoder row where `sparsity_include_decoder_norm`, else 1; t is 0 for ReLU. The dataset-wise
factors f are folded in, so that x and z are in the activations' own units (their z, divided by f_in). x is not centred.
Folded too: their `standardize_parameters_of_dataset_norm` leaves the threshold as it is, which then means another one;
here it is t / (n f_in). Only Llama Scope's `jump_relu_threshold`, one number, was taken after that step: there it is
t / n, n the norm of the standardised row.
TopK chooses by n p: decoder rows get norm 1, and z is multiplied by n. Refused: token- and batch-wise norms, GLU
encoders, BatchTopK (its choice needs a batch), transcoders but those of TopK.
Source: src/llamascopium/models/{sae,sparse_dictionary}.py and, for Llama Scope, He et al. 2024, arXiv:2410.20526.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.errors import InputError
from sae.base import SAE
from sae.interop.made import centred, make, one_of, positive, settings, text, whole, with_unit_rows
from sae.interop.tensors import Tensors, read_safetensors

OLD, NEW = "hyperparams.json", "config.json"
WEIGHTS = ("sae_weights.safetensors", "checkpoints/pruned.safetensors", "checkpoints/final.safetensors")
_NORM = "dataset_average_activation_norm"


def read(path: Path) -> SAE:
    """The dictionary in a folder with config.json or hyperparams.json. Raises InputError."""
    folder = path if path.is_dir() else path.parent
    about = folder / (NEW if (folder / NEW).exists() else OLD)
    cfg = settings(about)
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), folder / WEIGHTS[0])
    if cfg.get("use_glu_encoder") or cfg.get("sae_type", "sae") != "sae":
        kind = "a GLU encoder" if cfg.get("use_glu_encoder") else f"sae_type={cfg['sae_type']!r}"
        raise InputError(f"{about} has {kind}: expected a plain SAE or transcoder.")
    if cfg.get("apply_decoder_bias_to_pre_encoder"):
        raise InputError(f"{about} has apply_decoder_bias_to_pre_encoder=true: expected false, as in all releases.")
    act = one_of(cfg.get("act_fn", "relu"), "act_fn", ("relu", "jumprelu", "topk"), about)
    norm = one_of(cfg.get("norm_activation", "inference"), "norm_activation", ("dataset-wise", "inference"), about)
    hooks = text(cfg.get("hook_point_in")), text(cfg.get("hook_point_out") or cfg.get("hook_point_in"))
    tensors = read_safetensors(file)
    factors = _factors(cfg, tensors, hooks, about) if norm == "dataset-wise" else (1.0, 1.0)
    tensors.ignore(*(name for name in tensors.shapes if name.startswith(f"{_NORM}.")))
    weights = _weights(tensors, bool(cfg.get("use_decoder_bias", True)))
    f_in, f_out = factors
    weights["b_enc"] /= f_in
    weights["b_dec"] /= f_out
    weights["W_dec"] *= f_in / f_out
    threshold = _threshold(cfg, tensors, weights, f_in, about) if act == "jumprelu" else None
    tensors.finish()
    return _made(cfg, act, hooks, weights, threshold, about)


def _made(
    cfg: dict[str, Any],
    act: str,
    hooks: tuple[str, str],
    weights: dict[str, Tensor],
    threshold: Tensor | None,
    path: Path,
) -> SAE:
    told = {"hook_name": hooks[0], "model_name": text(cfg.get("model_name"))}
    fields = {"k": whole(cfg, "top_k", path)} if act == "topk" else {}
    if act == "topk" and cfg.get("sparsity_include_decoder_norm", True):
        weights = with_unit_rows(weights, "b_enc")
    if hooks[0] != hooks[1]:
        if act != "topk":
            raise InputError(f"{path} is a {act} transcoder's: ours are TopK, so that none can be made of it.")
        return make("transcoder", fields, weights, {**told, "hook_name_out": hooks[1], "hook_names_out": [hooks[1]]})
    weights["b_enc"] = centred(weights["W_enc"], weights["b_enc"], weights["b_dec"])
    if threshold is not None:
        weights["threshold"] = threshold.clamp(min=0.0)
    return make({"relu": "standard"}.get(act, act), fields, weights, told)


def _weights(tensors: Tensors, with_bias: bool) -> dict[str, Tensor]:
    """W_enc, b_enc, W_dec and b_dec, from either form's names: matrices lie the other way round in torch's Linear."""
    if "W_E" in tensors:
        d_in, d_sae = tensors.sizes("W_E")
        d_out = tensors.sizes("W_D")[1]
        W_enc, W_dec = tensors.take("W_E", d_in, d_sae), tensors.take("W_D", d_sae, d_out)
        names = "b_E", "b_D"
    else:
        d_sae, d_in = tensors.sizes("encoder.weight")
        d_out = tensors.sizes("decoder.weight")[0]
        W_enc = tensors.take("encoder.weight", d_sae, d_in).T.contiguous()
        W_dec = tensors.take("decoder.weight", d_out, d_sae).T.contiguous()
        names = "encoder.bias", "decoder.bias"
    b_dec = tensors.take(names[1], d_out) if with_bias else torch.zeros(d_out)
    return {"W_enc": W_enc, "b_enc": tensors.take(names[0], d_sae), "W_dec": W_dec, "b_dec": b_dec}


def _factors(cfg: dict[str, Any], tensors: Tensors, hooks: tuple[str, str], path: Path) -> tuple[float, float]:
    """(f_in, f_out), from the weights' file or from the settings (by hook or, older, by "in" and "out")."""
    d = whole(cfg, "d_model", path)
    told = cfg.get(_NORM)
    norms = told if isinstance(told, dict) else {}
    found = []
    for hook, side in zip(hooks, ("in", "out"), strict=True):
        name = f"{_NORM}.{hook}"
        norm = tensors.number(name) if name in tensors else norms.get(hook, norms.get(side))
        if norm is None:
            raise InputError(f"{path} has norm_activation dataset-wise without {_NORM} of {hook!r}: expected a number.")
        found.append(d**0.5 / positive(norm, f"{_NORM} of {hook!r}", path))
    return found[0], found[1]


def _threshold(cfg: dict[str, Any], tensors: Tensors, weights: dict[str, Tensor], f_in: float, path: Path) -> Tensor:
    """In units of the folded pre-activations."""
    W_dec = weights["W_dec"]
    norms = torch.ones(len(W_dec))
    if cfg.get("sparsity_include_decoder_norm", True):
        norms = W_dec.norm(dim=1).clamp(min=1e-30)
    names = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
    if any(name in tensors for name in names):
        # The row's norm before folding is meant, which of an SAE, where f_in / f_out = 1, is that after it.
        return tensors.take(tensors.first(*names), len(W_dec)).exp() / norms / f_in
    return positive(cfg.get("jump_relu_threshold"), "jump_relu_threshold", path) / norms
