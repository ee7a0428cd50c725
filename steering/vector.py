"""A steering vector: a direction at a hook, how long one unit of it is, and where it came from.

What is added to the activations is `raw` = direction * coefficient * unit_size. The unit is what makes strengths of
different vectors comparable: `max` is the largest value that a latent took on real text, `norm` the median norm of the
hook's activations, `raw` is 1.

Source of the difference of means: Rimsky et al. 2024, arXiv:2312.06681 (CAA). Differs: the mean is over all ordinary
tokens, not over one answer letter, and the vector is normalised.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from activations.errors import InputError
from activations.files import write_aside
from activations.model import Model
from sae.base import SAE
from steering.rows import median_norm, sink_threshold, text_rows

Unit = Literal["max", "norm", "raw"]
FORMAT = 1
_HEADER = "steering_vector"


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeringVector:
    """A direction at one hook. Immutable: `scaled` and `dataclasses.replace` give new ones."""

    direction: Float[Tensor, " d"]
    """float32, on the CPU."""
    hook: str
    unit: Unit
    unit_size: float
    """What one unit multiplies the direction by."""
    coefficient: float = 1.0
    """How many units; `steer`'s strength multiplies it."""
    median_norm: float | None = None
    """Median norm of the hook's activations, where known."""
    sink_threshold: float | None = None
    """Rows of a larger norm are sinks and are left alone; None where unknown."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from, as JSON holds it: maker, model, revision, dictionary, feature ..."""

    def __post_init__(self) -> None:
        if not torch.isfinite(self.direction).all() or not self.direction.any():
            raise InputError("The vector is zero or not finite: expected a direction. Make it again from other data.")
        if not (math.isfinite(self.unit_size) and self.unit_size > 0 and math.isfinite(self.coefficient)):
            raise InputError(
                f"unit_size={self.unit_size}, coefficient={self.coefficient}: expected finite, unit_size above 0."
            )

    @property
    def raw(self) -> Float[Tensor, " d"]:
        """What is added to the activations at strength 1."""
        return self.direction * (self.coefficient * self.unit_size)

    def scaled(self, factor: float) -> "SteeringVector":
        """The same vector with `factor` times the coefficient."""
        return replace(self, coefficient=self.coefficient * factor)

    @classmethod
    def from_latent(cls, sae: SAE, feature: int, *, sign: int = 1, unit: Unit = "max") -> "SteeringVector":
        """The decoder row of a latent.

        sign: -1 takes the negative pole of a signed dictionary (AbsTopK): the row turned round, its unit the pole's own
        largest magnitude. unit: "max" is the latent's largest value in the statistics, so that strength 1 adds what the
        latent adds there; "norm" makes the row's norm the median norm of the hook; "raw" is one unit of the latent.
        Raises InputError for a latent that is not there, one that never fired (unit "max"), or missing statistics.
        """
        known = sae.statistics
        check_latent(sae, feature)
        if sign not in (1, -1) or (sign == -1 and not sae.signed):
            raise InputError(
                f"sign={sign}: expected 1, or -1 for a signed dictionary (this one, {sae.architecture}, is "
                f"{'signed' if sae.signed else 'not'}). A negative strength pushes the other way."
            )
        row = sae.W_dec[feature].detach().to("cpu", torch.float32, copy=True) * sign
        if unit == "max":
            size = latent_size(sae, feature, sign)
        elif unit == "norm":
            size = _statistics(sae).median_norm
            row = row / row.norm()
        else:
            size = 1.0
        return cls(
            direction=row,
            hook=sae.hook,
            unit=unit,
            unit_size=size,
            median_norm=known.median_norm if known else None,
            sink_threshold=known.sink_threshold if known else None,
            provenance={
                "maker": "latent",
                "model": sae.model_name,
                "revision": str(sae.metadata.get("model_revision", "")),
                "dictionary": address(sae),
                "architecture": sae.architecture,
                "feature": feature,
                "sign": sign,
            },
        )

    @classmethod
    def from_pairs(
        cls, model: Model, positive: Sequence[str], negative: Sequence[str], *, hook: str
    ) -> "SteeringVector":
        """The difference of means: mean row of the `positive` texts minus that of the `negative`; unit "norm".

        Means are over all tokens of the texts but position 0 and sinks (5 times the median norm of these texts' rows);
        each token weighs the same. The two lists need not pair up, nor the texts be of one length. The provenance keeps
        `difference_norm`, the norm before normalising: strength difference_norm / median_norm adds the bare difference.
        Raises InputError for a hook that the model lacks, texts without a second token, or means that are equal.
        """
        sides = [text_rows(model, texts, hook) for texts in (positive, negative)]
        median = median_norm(sides)
        threshold = sink_threshold(median)
        ordinary = [side.without_sinks(threshold).rows for side in sides]
        plus, minus = (rows.double().mean(dim=0) for rows in ordinary)
        difference = (plus - minus).float()
        norm = float(difference.norm())
        if not norm > 0:
            raise InputError("The positive and the negative texts have equal means: expected texts that differ.")
        return cls(
            direction=difference / norm,
            hook=hook,
            unit="norm",
            unit_size=median,
            median_norm=median,
            sink_threshold=threshold,
            provenance={
                "maker": "difference of means",
                "model": model.name,
                "revision": model.revision,
                "model_dtype": str(model.dtype).removeprefix("torch."),
                "n_positive": len(positive),
                "n_negative": len(negative),
                "n_tokens": [len(rows) for rows in ordinary],
                "difference_norm": norm,
            },
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the direction, and all else as JSON in its header. Written aside and renamed."""
        about = {
            "format": FORMAT,
            "hook": self.hook,
            "unit": self.unit,
            "unit_size": self.unit_size,
            "coefficient": self.coefficient,
            "median_norm": self.median_norm,
            "sink_threshold": self.sink_threshold,
            "provenance": {key: value for key, value in self.provenance.items() if key != "file"},
        }
        with write_aside(Path(path)) as aside:
            save_file({"direction": self.direction.contiguous()}, aside, metadata={_HEADER: json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read what `save` wrote; its provenance gains `file`, the path.

        Raises InputError for a file that is missing, damaged, or no steering vector.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})[_HEADER])
                direction = file.get_tensor("direction")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"{path} is no steering vector or is damaged ({type(error).__name__}: {error}): "
                "expected a .safetensors file written by SteeringVector.save."
            ) from None
        if reason := _wrong(about, direction):
            raise InputError(f"{path} is no steering vector that this version reads ({reason}): save it again.")
        numbers = {key: about[key] for key in ("unit_size", "coefficient", "median_norm", "sink_threshold")}
        return cls(
            direction=direction,
            hook=about["hook"],
            unit=about["unit"],
            provenance={**about["provenance"], "file": str(path)},
            **numbers,
        )


def check_latent(sae: SAE, feature: int) -> None:
    """Raise InputError when the dictionary has no such latent, or does not give back the one hook it reads."""
    sae.only_hook("Steering")
    if not 0 <= feature < sae.d_sae:
        raise InputError(f"There is no latent {feature}: expected 0 to {sae.d_sae - 1}, the latents of {address(sae)}.")


def latent_size(sae: SAE, feature: int, sign: float) -> float:
    """One `max` unit of a latent: its largest value on the cached tokens, or for a negative sign its pole's magnitude.

    The negative pole of an unsigned dictionary has none; its unit is the positive one's.
    Raises InputError when the statistics are missing or the pole never fired.
    """
    known = _statistics(sae)
    negative = sign < 0 and sae.signed
    size = float(-known.min[feature] if negative else known.max[feature])
    if size <= 0:
        pole = "its negative pole never fired" if negative else "it never fired"
        raise InputError(
            f"Latent {feature} has no max ({pole} in {known.n_tokens:,} tokens): "
            "take another latent, or unit 'norm' or 'raw'."
        )
    return size


def address(sae: SAE) -> str:
    """RUN/ID of a dictionary that lies in a run, else its folder; "a dictionary in memory" when it was never saved."""
    if sae.folder is None:
        return IN_MEMORY
    in_run = sae.folder.parent.name == "dictionaries"
    return str(sae.folder.parent.parent / sae.folder.name if in_run else sae.folder)


IN_MEMORY = "a dictionary in memory"


def _statistics(sae: SAE) -> Any:
    if sae.statistics is None:
        raise InputError(
            f"{address(sae)} has no statistics (statistics.safetensors), so its units max and norm are unknown: "
            f"run `sae eval {address(sae)}`, which takes them on cached activations, or use unit 'raw'."
        )
    return sae.statistics


def _wrong(about: Any, direction: Tensor) -> str | None:
    """What is wrong with the contents of a vector's file, or None."""
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        return f"its format is not {FORMAT}"
    if direction.dtype != torch.float32 or direction.dim() != 1:
        return f"direction is {direction.dtype} of shape {tuple(direction.shape)}, expected one row of float32"
    if not isinstance(about.get("hook"), str) or about.get("unit") not in get_args(Unit):
        return "hook or unit is missing"
    if not isinstance(about.get("provenance"), dict):
        return "provenance is missing"
    optional = ("median_norm", "sink_threshold")
    if not all(_number(about.get(key)) or (key in optional and about.get(key) is None) for key in _NUMBERS):
        return "a number is missing"
    return None


_NUMBERS = ("unit_size", "coefficient", "median_norm", "sink_threshold")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
