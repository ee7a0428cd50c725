"""A dictionary on disk: cfg.json + sae_weights.safetensors, which SAELens loads as they are if it has the class.

Those of other tools are read by `sae.interop`.

cfg.json is written last: a folder that has it is whole. `statistics.safetensors` beside them is ours.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from activations.errors import InputError
from activations.files import read_json, write_aside, write_json
from sae.base import SAE, ConfigError, Statistics, fields_from, rows_of
from sae.registry import REGISTRY

WEIGHTS, CFG, STATISTICS = "sae_weights.safetensors", "cfg.json", "statistics.safetensors"
_TRAINED = "trained_architecture"  # beside "architecture", where SAELens knows the finished dictionary by another name
_SAELENS = "6.54.12"  # whose form this is; without a version SAELens takes cfg.json for an older one and drops metadata
# What SAELens writes for a dictionary that takes activations as the model has them; anything else is refused.
_PLAIN = {"apply_b_dec_to_input": True, "normalize_activations": "none"}
FLOATS = ("BF16", "F16", "F32", "F64")
"""Types that weights may have, as safetensors calls them."""
_RESHAPES = ("none", "hook_z")  # of hook_z, SAELens takes rows with the heads apart, and joins them as ours are


def save_sae(sae: SAE, folder: Path) -> None:
    """Save a dictionary into `folder`, each file aside and renamed.

    On a mesh all processes call this together; the leader collects the parts on its CPU, and writes.
    """
    weights = {}
    for name, p in _tensors(sae).items():
        whole = rows_of(name, sae.mesh.whole(rows_of(name, p))) if name in sae.by_latent else p.detach().cpu()
        weights[name] = whole.contiguous()
    if not sae.mesh.leads:
        return
    with write_aside(folder / WEIGHTS) as aside:
        save_file(weights, aside)
    if sae.statistics is not None:
        save_statistics(sae.statistics, folder)
    fields = dataclasses.asdict(sae.cfg)
    fields |= {theirs: fields[ours] for ours, theirs in REGISTRY[sae.architecture].renamed.items()}
    trained = {_TRAINED: sae.architecture} if sae.saved_as != sae.architecture else {}
    write_json(
        folder / CFG,
        {
            "architecture": sae.saved_as,
            **trained,
            **fields,
            "dtype": "float32",
            "device": "cpu",
            **_PLAIN,
            "reshape_activations": "hook_z" if sae.hook.endswith("hook_z") else "none",
            "metadata": {"sae_lens_version": _SAELENS, **sae.metadata},
        },
    )


def save_statistics(statistics: Statistics, folder: Path) -> None:
    """Save what is known of a dictionary's latents beside it."""
    tensors = {name: torch.as_tensor(value).cpu() for name, value in statistics._asdict().items()}
    with write_aside(folder / STATISTICS) as aside:
        save_file(tensors, aside)


def load_sae(address: str | Path, *, device: str = "cpu") -> SAE:
    """Load a dictionary from RUN (its only one), RUN/ID, or a folder with cfg.json and sae_weights.safetensors.

    So do the folders and files of other tools, and names on the hub (`sae.interop.detect` tells them apart).
    Raises InputError for anything else; sizes are checked before memory is taken.
    """
    from sae.interop import detect  # whose formats are saved by this module

    return detect.read(detect.find(address)).to(device).requires_grad_(False).eval()


def load_own(folder: Path) -> SAE:
    """Load a folder that `save_sae` made, or SAELens where nothing has to be folded. Raises InputError."""
    cfg = read_json(folder / CFG)
    sae = _build(folder, cfg)
    try:
        sae.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        sae.statistics = _load_statistics(folder / STATISTICS, sae.d_sae)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder} is damaged ({error}): train or copy the dictionary again.") from None
    sae.metadata = dict(cfg.get("metadata") or {})
    sae.folder = folder
    return sae


def _build(folder: Path, cfg: Any) -> SAE:
    """An empty dictionary of the class and sizes that cfg.json says, after comparing them with the weights' header."""
    name = cfg.get(_TRAINED, cfg.get("architecture")) if isinstance(cfg, dict) else None
    if name not in REGISTRY:
        raise InputError(f"{folder / CFG} names architecture {name!r}: expected one of {', '.join(REGISTRY)}.")
    for key, plain in _PLAIN.items():
        if cfg.get(key, plain) != plain:
            raise InputError(
                f"{folder / CFG} has {key}={json.dumps(cfg[key])}: expected {json.dumps(plain)}; fold it in first."
            )
    if cfg.get("reshape_activations", "none") not in _RESHAPES:
        shown = json.dumps(cfg["reshape_activations"])
        raise InputError(f"{folder / CFG} has reshape_activations={shown}: expected one of {', '.join(_RESHAPES)}.")
    entry = REGISTRY[name]
    if entry.sparsity == "target_l0":
        cfg = {"target_l0": 1.0, **cfg}  # SAELens keeps no target in the saved form
    cfg = {**{ours: cfg[theirs] for ours, theirs in entry.renamed.items() if theirs in cfg}, **cfg}
    try:
        fields = {f.name: cfg[f.name] for f in dataclasses.fields(entry.config) if f.name in cfg}
        config = entry.config(**fields_from(fields))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            headers = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(each.get_shape()) for key, each in headers.items()}
            if odd := next((key for key, each in headers.items() if each.get_dtype() not in FLOATS), None):
                raise ConfigError(f"{odd} is of type {headers[odd].get_dtype()}, expected one of {', '.join(FLOATS)}")
    except (TypeError, ConfigError) as error:
        raise InputError(f"{folder / CFG} is not a {name} dictionary's ({error}).") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS} is missing or damaged ({error}).") from None
    with torch.device("meta"):
        expected = {key: tuple(p.shape) for key, p in _tensors(entry.sae(config)).items()}
    if shapes != expected:
        wrong = next(key for key in [*expected, *shapes] if shapes.get(key) != expected.get(key))
        raise InputError(
            f"{folder / WEIGHTS} has {wrong} of shape {shapes.get(wrong)}: cfg.json says {expected.get(wrong)}."
        )
    return entry.sae(config)


def _tensors(sae: SAE) -> dict[str, Tensor]:
    """What is saved of a dictionary: its parameters and its `saved` buffers."""
    return {**dict(sae.named_parameters()), **{name: getattr(sae, name) for name in sae.saved}}


def _load_statistics(path: Path, d_sae: int) -> Statistics | None:
    if not path.exists():
        return None
    saved = load_file(path)
    if set(saved) != set(Statistics._fields) or any(len(saved[name]) != d_sae for name in ("density", "max", "min")):
        raise InputError(f"{path} does not fit the dictionary beside it: run `sae eval` to make it again.")
    return Statistics(
        density=saved["density"],
        max=saved["max"],
        min=saved["min"],
        n_tokens=int(saved["n_tokens"]),
        median_norm=float(saved["median_norm"]),
        sink_threshold=float(saved["sink_threshold"]),
    )
