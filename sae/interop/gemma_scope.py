"""Gemma Scope (params.npz) and Gemma Scope 2 (params.safetensors with config.json): JumpReLU. Read only.

    p = x W_enc + b_enc        z = ReLU(p) * 1[p > threshold]        x_hat = z W_dec + b_dec

x is not centred: b_dec W_enc is folded into b_enc. The files do not say which model and hook they are of; the path
does, where it is that of the release. Transcoders and embedding dictionaries are refused.
Source: Lieberum et al. 2024, arXiv:2408.05147, and its tutorial.
"""

import re
from pathlib import Path
from typing import Any

from activations.errors import InputError
from sae.base import SAE
from sae.interop.made import centred, make
from sae.interop.tensors import Tensors, read_npz, read_safetensors

NPZ, SAFETENSORS = "params.npz", "params.safetensors"
_HOOKS = {
    r"-res\b|resid_post": "hook_resid_post",
    r"-mlp\b|mlp_out": "hook_mlp_out",
    r"-att\b|attn_out": "attn.hook_z",
}


def read(path: Path) -> SAE:
    """The dictionary in params.npz or params.safetensors, or in a folder with one of them. Raises InputError."""
    if path.is_dir():
        path = path / NPZ if (path / NPZ).exists() else path / SAFETENSORS
    tensors = read_npz(path) if path.suffix == ".npz" else read_safetensors(path)
    where = str(path.absolute())
    if re.search(r"transcoder|\bclt\b", where) or "affine_skip_connection" in tensors:
        raise InputError(f"{path} is a JumpReLU transcoder's: ours are TopK, so that none can be made of it.")
    if "embedding" in where:
        raise InputError(f"{path} is of token embeddings before they are scaled, where there is no hook: take a layer.")
    return _made(tensors, _about(where))


def _made(tensors: Tensors, about: dict[str, Any]) -> SAE:
    W_enc, W_dec = (tensors.first(name, name.lower()) for name in ("W_enc", "W_dec"))
    d_in, d_sae = tensors.sizes(W_enc)
    weights = {
        "W_enc": tensors.take(W_enc, d_in, d_sae),
        "b_enc": tensors.take("b_enc", d_sae),
        "W_dec": tensors.take(W_dec, d_sae, d_in),
        "b_dec": tensors.take("b_dec", d_in),
        "threshold": tensors.take("threshold", d_sae).clamp(min=0.0),  # below 0 its ReLU decides
    }
    tensors.finish()
    weights["b_enc"] = centred(weights["W_enc"], weights["b_enc"], weights["b_dec"])
    return make("jumprelu", {}, weights, about)


def _about(where: str) -> dict[str, Any]:
    """Model and hook, from a path such as .../gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82/params.npz."""
    layer = re.search(r"layer_(\d+)", where)
    kind = next((hook for pattern, hook in _HOOKS.items() if re.search(pattern, where)), None)
    about = {"hook_name": f"blocks.{int(layer[1])}.{kind}"} if layer and kind else {}
    if newer := re.search(r"gemma-scope-2-(\d+[mb])-(pt|it)", where):
        about["model_name"] = f"google/gemma-3-{newer[1]}-{newer[2]}"
    elif older := re.search(r"gemma-scope-(\d+b)-(pt|it)", where):
        about["model_name"] = f"google/gemma-2-{older[1]}" + ("-it" if older[2] == "it" else "")
    return about
