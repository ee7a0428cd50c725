"""EleutherAI's sparsify: a folder a hook with cfg.json and sae.safetensors. Read and written.

    z = TopK(ReLU(u E^T + b), k), or of each of k groups the largest        x_hat = z W_dec + b_dec (+ x W_skip^T)

u is x - b_dec, but x itself where `transcode`. W_dec lies as ours does (SAELens' reader turns it round); `num_latents`
0 means `expansion_factor` times d_in. Nothing is folded but the encoder turned round.
Source: sparsify/sparse_coder.py and config.py, 1.3.
"""

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from activations.errors import InputError
from activations.files import write_aside, write_json
from sae.base import SAE
from sae.interop.made import make, one_of, refuse, settings, text, whole
from sae.interop.tensors import read_safetensors

CFG, WEIGHTS = "cfg.json", "sae.safetensors"
_TOPK = ("topk", "msae", "gsae", "structured")
WRITES = (*_TOPK, "groupmax", "transcoder", "skip_transcoder")
_MODULES = {"": "hook_resid_post", "mlp": "hook_mlp_out", "attention": "hook_attn_out", "self_attn": "hook_attn_out"}


def read(path: Path) -> SAE:
    """The dictionary in a folder with cfg.json and sae.safetensors. Raises InputError."""
    folder = path if path.is_dir() else path.parent
    cfg, about = settings(folder / CFG), folder / CFG
    tensors = read_safetensors(folder / WEIGHTS)
    d_in, k = whole(cfg, "d_in", about), whole(cfg, "k", about)
    n_latents = cfg.get("num_latents") or d_in * whole(cfg, "expansion_factor", about)
    if cfg.get("signed"):
        raise InputError(f"{about} has signed latents, which sparsify has no more: expected signed=false.")
    activation = one_of(cfg.get("activation", "topk"), "activation", ("topk", "groupmax"), about)
    transcodes, skips = bool(cfg.get("transcode")), bool(cfg.get("skip_connection"))
    if (activation == "groupmax" and transcodes) or (skips and not transcodes):
        what = "a groupmax transcoder" if transcodes else "a skip connection without transcode"
        raise InputError(f"{about} is of {what}: expected topk or groupmax, or a topk transcoder with or without skip.")
    weights = {
        "W_enc": tensors.take("encoder.weight", n_latents, d_in).T,
        "b_enc": tensors.take("encoder.bias", n_latents),
        "W_dec": tensors.take("W_dec", n_latents, d_in),
        "b_dec": tensors.take("b_dec", d_in),
        **({"W_skip": tensors.take("W_skip", d_in, d_in)} if skips else {}),
    }
    tensors.finish()
    kind = ("skip_transcoder" if skips else "transcoder") if transcodes else activation
    return make(kind, {"k": k}, weights, _about(folder, transcodes))


def write(sae: SAE, folder: Path) -> None:
    """Write a dictionary for `SparseCoder.load_from_disk`. Raises InputError for one that sparsify has no form for."""
    kind = sae.architecture
    if kind not in WRITES:
        raise refuse(sae, "sparsify", ", ".join(WRITES))
    if sae.d_out != sae.d_in:
        raise InputError(f"sparsify gives back as many values as it reads: expected d_out={sae.d_in}, not {sae.d_out}.")
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if kind == "skip_transcoder":
        tensors["W_skip"] = sae.get_parameter("W_skip")
    with write_aside(folder / WEIGHTS) as aside:
        save_file({name: each.detach().cpu().contiguous() for name, each in tensors.items()}, aside)
    write_json(
        folder / CFG,
        {
            "activation": "groupmax" if kind == "groupmax" else "topk",
            "expansion_factor": max(sae.d_sae // sae.d_in, 1),
            "normalize_decoder": True,
            "num_latents": sae.d_sae,
            "k": sae.cfg.k,  # type: ignore[attr-defined]
            "multi_topk": False,
            "skip_connection": kind == "skip_transcoder",
            "transcode": kind in ("transcoder", "skip_transcoder"),
            "d_in": sae.d_in,
        },
    )


def _about(folder: Path, transcodes: bool) -> dict[str, Any]:
    """The hook, which the folder's name says (layers.5.mlp), and the model, which the run's config.json may."""
    found = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.([a-z_]+))?", folder.name)
    hook = f"blocks.{int(found[1])}.{_MODULES[found[2] or '']}" if found and (found[2] or "") in _MODULES else ""
    run = folder.parent / "config.json"
    about: dict[str, Any] = {"model_name": text(settings(run).get("model")) if run.is_file() else ""}
    if not transcodes:
        return {**about, "hook_name": hook}
    if not hook.endswith("hook_mlp_out"):
        return about
    return {**about, "hook_name": hook.replace("_out", "_in"), "hook_name_out": hook, "hook_names_out": [hook]}
