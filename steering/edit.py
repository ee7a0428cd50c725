"""Edits: what may be done to the activations x (..., d) at one hook. Values, free of models and hooks.

All are in delta form: an edit says what to add to x, so whatever a dictionary does not explain (its error) stays as it
was. Which rows are edited is not theirs to say: `steering.apply` leaves out position 0, padding and sinks.

| edit       | delta                                      | what strength multiplies                      |
|------------|--------------------------------------------|-----------------------------------------------|
| Add        | v                                          | the coefficient of v; 0 is no edit            |
| Clamp      | (c - z_i) d_i, with z = encode(x)          | c, in max units; 0 is ablation, not "no edit" |
| ProjectOut | -share (x . u) u, u = v / norm(v)          | the share; 0 is no edit                       |

Clamping equals "encode, set z_i = c, decode, add back the error", without the decoding.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from activations.errors import InputError
from sae.base import SAE
from steering.vector import IN_MEMORY, SteeringVector, address, check_latent, latent_size

Delta = Callable[[Float[Tensor, "*batch d"]], Tensor]
"""x in float32 -> what to add to it; may be one row (d,) for all."""


@runtime_checkable
class Edit(Protocol):
    """What `steer` needs of an edit."""

    @property
    def hook(self) -> str: ...

    @property
    def d(self) -> int:
        """Width of the activations it edits."""

    @property
    def sink_threshold(self) -> float | None:
        """Norm above which a row is a sink at the hook, where known."""

    @property
    def is_nothing(self) -> bool:
        """True when it changes no row at all, and can be left out."""

    def scaled(self, strength: float) -> "Edit":
        """The same edit at `strength`."""

    def on(self, device: torch.device) -> Delta:
        """The delta, with its tensors on `device`."""

    def to_json(self) -> dict[str, Any]:
        """A description that `steering.files` makes the edit from again.

        Raises InputError when it rests on something that was never saved.
        """


@dataclass(frozen=True, eq=False)
class Add:
    """x + v."""

    vector: SteeringVector

    @property
    def hook(self) -> str:
        return self.vector.hook

    @property
    def d(self) -> int:
        return len(self.vector.direction)

    @property
    def sink_threshold(self) -> float | None:
        return self.vector.sink_threshold

    @property
    def is_nothing(self) -> bool:
        return self.vector.coefficient == 0

    def scaled(self, strength: float) -> "Add":
        return Add(self.vector.scaled(strength))

    def on(self, device: torch.device) -> Delta:
        raw = self.vector.raw.to(device)
        return lambda _x: raw

    def to_json(self) -> dict[str, Any]:
        coefficient = self.vector.coefficient
        return {"op": "add", **_source(self.vector), "unit": self.vector.unit, "coefficient": coefficient}


@dataclass(frozen=True, eq=False)
class ProjectOut:
    """x - share (x . u) u: takes the direction of a vector out of x. Its length and coefficient do not matter.

    Source: Arditi et al. 2024, arXiv:2406.11717 (directional ablation). Differs: at one hook, not at all layers.
    """

    vector: SteeringVector
    share: float = 1.0

    @property
    def hook(self) -> str:
        return self.vector.hook

    @property
    def d(self) -> int:
        return len(self.vector.direction)

    @property
    def sink_threshold(self) -> float | None:
        return self.vector.sink_threshold

    @property
    def is_nothing(self) -> bool:
        return self.share == 0

    def scaled(self, strength: float) -> "ProjectOut":
        return replace(self, share=self.share * strength)

    def on(self, device: torch.device) -> Delta:
        unit = (self.vector.direction / self.vector.direction.norm()).to(device)
        scaled = -self.share * unit
        return lambda x: (x @ unit)[..., None] * scaled

    def to_json(self) -> dict[str, Any]:
        return {"op": "project_out", **_source(self.vector), "unit": self.vector.unit, "share": self.share}


@dataclass(frozen=True, eq=False)
class Clamp:
    """Set one latent to `value` on every edited row, whatever it was there.

    value: in units of the latent's max; below 0, for a signed dictionary, of its negative pole's magnitude. 0 needs no
    statistics. Two limits: other latents keep their values only as far as their encoder rows are orthogonal to the
    decoder row; and where a one-sided latent was silent, its pre-activation may lie below 0, so that the edited row
    encodes to that much less than `value`.
    Raises InputError for a latent that is not there, or one whose max is unknown.
    """

    sae: SAE
    feature: int
    value: float

    def __post_init__(self) -> None:
        check_latent(self.sae, self.feature)
        if not math.isfinite(self.target):
            raise InputError(f"The value of a clamp is {self.value}: expected a finite number of max units.")

    @property
    def target(self) -> float:
        """What the latent is set to, in its own units."""
        return self.value * latent_size(self.sae, self.feature, self.value) if self.value else 0.0

    @property
    def hook(self) -> str:
        return self.sae.hook

    @property
    def d(self) -> int:
        return self.sae.d_in

    @property
    def sink_threshold(self) -> float | None:
        return self.sae.statistics.sink_threshold if self.sae.statistics else None

    @property
    def is_nothing(self) -> bool:
        return False

    def scaled(self, strength: float) -> "Clamp":
        return replace(self, value=self.value * strength)

    def on(self, device: torch.device) -> Delta:
        # A copy when the model is elsewhere: the dictionary is the caller's and stays where it is.
        sae = self.sae if self.sae.W_dec.device == device else deepcopy(self.sae).to(device)
        row = sae.W_dec[self.feature].detach().float()
        target = self.target

        def delta(x: Float[Tensor, "*batch d"]) -> Tensor:
            values, indices = sae.encode_sparse(x.flatten(0, -2).float())
            z = (values * (indices == self.feature)).sum(dim=1)
            return (target - z).view(*x.shape[:-1], 1) * row

        return delta

    def to_json(self) -> dict[str, Any]:
        return {"op": "clamp", "dictionary": saved_address(self.sae), "feature": self.feature, "value": self.value}


def ablate(sae: SAE, feature: int) -> Clamp:
    """Take a latent out: clamp it to 0, at any strength."""
    return Clamp(sae, feature, 0.0)


def saved_address(sae: SAE) -> str:
    """The address of a dictionary. Raises InputError when it lies in no folder."""
    if (found := address(sae)) == IN_MEMORY:
        raise InputError("An edit of a dictionary in memory cannot be written down: save the dictionary first.")
    return found


def _source(vector: SteeringVector) -> dict[str, Any]:
    """Where a vector can be had again: a latent of a dictionary on disk, or a file."""
    about = vector.provenance
    if "file" in about:
        return {"file": about["file"]}
    if about.get("maker") == "latent" and about["dictionary"] != IN_MEMORY:
        return {key: about[key] for key in ("dictionary", "feature", "sign")}
    raise InputError(
        "This vector is in no file: SteeringVector.save it, SteeringVector.load it again, then write the edit."
    )
