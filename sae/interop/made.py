"""Dictionaries from weights of elsewhere: what is folded, and how one of ours is made of the result.

Ours reads (x - b_dec) W_enc + b_enc. Foldings are done in float64, so that they add no error of their own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from activations.errors import InputError
from activations.files import read_json
from sae.base import SAE, ConfigError
from sae.registry import REGISTRY

NO_TARGET = 1.0
"""`target_l0` of a dictionary whose training is over."""


def make(architecture: str, fields: Mapping[str, Any], weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> SAE:
    """A finished dictionary of ours. about: its metadata (model_name, hook_name ...); what is empty is left out.

    Raises InputError for sizes that cannot be.
    """
    entry = REGISTRY[architecture]
    d_sae, d_out = weights["W_dec"].shape
    d_in = weights["W_enc"].shape[0]
    goal = {"target_l0": NO_TARGET} if entry.sparsity == "target_l0" else {}
    out = {"d_out": d_out} if entry.sae.target == "hook" else {}
    try:
        sae = entry.sae(entry.config(d_in=d_in, d_sae=d_sae, **goal, **out, **fields))
    except ConfigError as error:
        raise InputError(f"The sizes of this {architecture} dictionary cannot be: {error}") from None
    missing, unexpected = sae.load_state_dict(dict(weights), strict=False)
    assert not unexpected, unexpected
    assert not {*dict(sae.named_parameters()), *sae.saved} & set(missing), missing
    sae.metadata = {name: value for name, value in about.items() if value not in (None, "", {})}
    return sae


def centred(W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, " d_sae"], b: Float[Tensor, " d_in"]) -> Tensor:
    """b_enc of a dictionary that reads x - b, where it read x."""
    return (b_enc.double() + b.double() @ W_enc.double()).float()


def uncentred(W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, " d_sae"], b: Float[Tensor, " d_in"]) -> Tensor:
    """b_enc of a dictionary that reads x, where it read x - b."""
    return centred(W_enc, b_enc, -b)


def with_unit_rows(weights: Mapping[str, Tensor], *biases: str) -> dict[str, Tensor]:
    """The same dictionary with decoder rows of norm 1: latents come out multiplied by what the norm was.

    biases: names of what is in units of the latents, beside W_enc. A row of zeros stays as it is.
    """
    norms = weights["W_dec"].double().norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    folded = {
        "W_enc": (weights["W_enc"].double() * norms).float(),
        "W_dec": (weights["W_dec"].double() / norms[:, None]).float(),
        **{name: (weights[name].double() * norms).float() for name in biases},
    }
    return {**weights, **folded}


def settings(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises InputError for anything else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object: expected a dictionary's settings.")
    return found


def whole(cfg: Mapping[str, Any], key: str, path: Path) -> int:
    """A whole number of at least 1 in settings. Raises InputError."""
    value = cfg.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{path} has {key}={value!r}: expected a whole number of at least 1.")
    return value


def positive(value: object, key: str, path: Path) -> float:
    """A finite number above 0. Raises InputError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{path} has {key}={value!r}: expected a number above 0.")
    return float(value)


def one_of(value: object, key: str, known: Mapping[str, Any] | tuple[str, ...], path: Path) -> str:
    """A name that must be known. Raises InputError with the choices."""
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{path} has {key}={value!r}: expected one of {', '.join(known)}.")
    return value


def text(value: object) -> str:
    """A name from a file, cut to a reasonable length; '' where there is none."""
    return value[:500] if isinstance(value, str) else ""


def refuse(sae: SAE, tool: str, has: str) -> InputError:
    """What to raise for a dictionary that a format cannot hold."""
    return InputError(f"{tool} has no form for this {sae.architecture} dictionary: expected one of {has}.")


def standardised(weights: Mapping[str, Tensor], k: int, eps: float, about: Mapping[str, Any]) -> SAE:
    """A TopK of u = (x - mean(x)) / (std(x) + eps), std with one degree of freedom less than values, as an `mlsae`.

    weights: of u, not centred; the peer gives back std(x) (p W_dec + b_dec) + mean(x). Ours takes std with all degrees
    of freedom, and its latents are std(x) p: what they add to the activations.
    """
    d_in = len(weights["W_enc"])
    if d_in < 2:
        raise InputError(f"d_in={d_in}: a row of one value cannot be standardised.")
    ratio = (d_in / (d_in - 1)) ** 0.5
    scaled = {
        "W_enc": weights["W_enc"] / ratio,
        "b_enc": weights["b_enc"],
        "W_dec": weights["W_dec"] * ratio,
        "b_dec": weights["b_dec"] * ratio,
    }
    return make("mlsae", {"k": k, "eps": eps / ratio}, scaled, about)
