"""The contract of a dictionary. Each architecture is one final class in `sae/architectures/` that implements it.

`encode` acts on each row alone (store, app and steering rely on it); `loss` is the training view and may couple rows.
Latents z may be negative (AbsTopK): nothing downstream may assume a sign.

Words: x (n, d_in) activations; z (n, d_sae) latents; x_hat the reconstruction; W_enc (d_in, d_sae), W_dec (d_sae,
d_in). A saved dictionary takes x as the model has it; during training x is multiplied by a scale that brings its mean
norm to sqrt(d_in), and `unscale` moves a trained dictionary from the one to the other.
"""

import abc
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from activations.errors import InputError
from sae.parallel import ALONE, Mesh
from sae.sparse import to_dense

INITIAL_ROWS = 4096
"""Decoder rows drawn at a time, so that a process with a part of the latents never holds them all."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every architecture's own config begins with."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise ConfigError(f"d_in={self.d_in}, d_sae={self.d_sae}: expected both to be at least 1.")


@dataclass(frozen=True, kw_only=True)
class KConfig(Config):
    """Of dictionaries that use at most k latents for each token."""

    k: int
    """Active latents for each token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(
                f"k={self.k} is out of range: expected 0 < k <= d_sae={self.d_sae}. Lower k or raise d_sae."
            )


class ConfigError(ValueError):
    """A combination of sizes or settings that cannot be."""


class Dead(NamedTuple):
    """Latents that have not fired for a while (the settings say how long)."""

    latents: Int[Tensor, " m"]
    """Their numbers; entries that are not `real` only fill the place up, so that its size seldom changes."""
    real: Bool[Tensor, " m"]
    n: Float[Tensor, ""]
    """How many are real."""


class State(NamedTuple):
    """What of the training's progress losses depend on."""

    dead: Dead | None = None
    """None when no latent is dead; counted now and then, so that no step waits for the device."""
    k: int | None = None
    """Active latents a token in this step while k is annealed; None: the config's."""
    penalty: Float[Tensor, ""] | float = 1.0
    """How far a sparsity penalty has warmed up, from 0 to 1 (`sae.controller`)."""
    progress: Float[Tensor, ""] | float = 1.0
    """Share of the run's steps that are done with this one."""
    pre: Float[Tensor, "n d_sae"] | None = None
    """Pre-activations of the batch, where they were made together with those of other dictionaries (`sae.stack`)."""
    gradient: Float[Tensor, "n d_in"] | None = None
    """Of the model's loss with respect to x, scaled to a mean norm of sqrt(d_in); for who `weighs_gradient`."""


class Loss(NamedTuple):
    """What `loss` returns; everything stays on the device."""

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]
    """Named parts of the total and figures worth logging, scalars."""
    fired: Bool[Tensor, " _held"]
    """Latents held here that were not 0 somewhere in the rows read here."""


class Statistics(NamedTuple):
    """What is known of a dictionary's latents on the cached tokens; saved beside the weights."""

    density: Float[Tensor, " d_sae"]
    """Share of ordinary tokens on which the latent is not 0."""
    max: Float[Tensor, " d_sae"]
    """Largest value, 0 if it was never positive; activation units."""
    min: Float[Tensor, " d_sae"]
    """Smallest value, 0 if it was never negative."""
    n_tokens: int
    median_norm: float
    """Median norm of the activations at the hook."""
    sink_threshold: float
    """Norm above which a token is a sink and is left alone."""


class SAE(nn.Module, abc.ABC):
    """A dictionary: encoder, decoder, and how they are trained. Final classes define `encode_sparse` and `loss`."""

    architecture: ClassVar[str]
    signed: ClassVar[bool] = False
    """True when latents may be negative."""
    tied: ClassVar[bool] = False
    """True when decoder rows are read from too: there is no W_enc."""
    penalised: ClassVar[bool] = False
    """True when the loss of a dictionary with a k depends on `State.penalty` all the same."""
    biases: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Parameters in units of the activations: they shrink with x, the weights do not."""
    unit_rows: tuple[str, ...] = ("W_dec",)
    """Parameters whose rows the optimiser keeps at norm 1."""
    by_latent: ClassVar[tuple[str, ...]] = ("W_enc", "W_dec", "b_enc")
    """Parameters with an entry or a row a latent: the processes of a mesh hold a part of them each. Of W_enc and b_enc
    those named here are made by `SAE`; an encoder of another form is the class' own."""
    saved: ClassVar[tuple[str, ...]] = ()
    """Buffers that belong to the finished dictionary as its parameters do: they are saved with them."""
    joint: ClassVar[bool] = False
    """True when x is the rows of several hooks side by side; others, given several hooks, pool their rows."""
    target: ClassVar[str] = "x"
    """What `loss` is given as the target: "x" itself, the rows of another "hook", or the "error" of a frozen base."""
    centres: ClassVar[bool] = True
    """True when pre-activations are (x - b_dec) W_enc + b_enc, which a stack can make for several at once."""
    weighs_gradient: ClassVar[bool] = False
    """True when `loss` takes `State.gradient`."""

    def __init__(self, cfg: Config, mesh: Mesh = ALONE) -> None:
        super().__init__()
        self.cfg, self.mesh = cfg, mesh
        held = mesh.part(cfg.d_sae)
        self.n_held = held.stop - held.start
        """Latents whose weights are here: all d_sae, unless the mesh has them in parts."""
        d_out = getattr(cfg, "d_out", cfg.d_in)
        if self.has_encoder_rows:
            # Laid out like the decoder in memory (a row a latent), so that both gradients are row sums.
            self.W_enc = nn.Parameter(torch.zeros(self.n_held, cfg.d_in).T)
        self.W_dec = nn.Parameter(torch.zeros(self.n_held, d_out))
        if "b_enc" in self.by_latent:
            self.b_enc = nn.Parameter(torch.zeros(self.n_held))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.low: dict[str, Tensor] = {}
        """Copies of wide parameters in the precision of the products, while an optimiser keeps them current; "W_enc8"
        is the encoder in eight bits (`sae.dense.product`)."""
        self.metadata: dict[str, Any] = {}
        self.statistics: Statistics | None = None
        self.folder: Path | None = None

    @property
    def has_encoder_rows(self) -> bool:
        """Whether W_enc has a row a latent, in memory, as W_dec has."""
        return "W_enc" in self.by_latent and not self.tied

    @property
    def d_in(self) -> int:
        return self.cfg.d_in

    @property
    def d_sae(self) -> int:
        return self.cfg.d_sae

    @property
    def d_out(self) -> int:
        """Width of what it gives back: d_in, but for dictionaries that predict other hooks."""
        return self.W_dec.shape[1]

    @property
    def saved_as(self) -> str:
        """The architecture that cfg.json names: another where SAELens loads what is saved as that."""
        return self.architecture

    @property
    def hook(self) -> str:
        """The hook it reads from, the first of several."""
        return str(self.metadata.get("hook_name", ""))

    @property
    def hooks(self) -> tuple[str, ...]:
        """All hooks it reads from: side by side if it is `joint`, else any one of them."""
        return tuple(self.metadata.get("hook_names") or (self.hook,))

    def only_hook(self, purpose: str) -> str:
        """The hook that it reads and gives back. Raises InputError, naming `purpose`, where those are not one."""
        if len(self.hooks) > 1 or self.target != "x":
            others = self.metadata.get("hook_names_out") or (("the error of a base",) if self.target == "error" else ())
            raise InputError(
                f"{purpose} takes a dictionary that reads and gives back one hook: this {self.architecture} reads "
                f"{', '.join(self.hooks)}" + (f" and predicts {', '.join(others)}." if others else ".")
            )
        return self.hook

    @property
    def model_name(self) -> str:
        return str(self.metadata.get("model_name", ""))

    @property
    def encoder(self) -> Tensor:
        """W_enc as the product for the pre-activations takes it, in the lowest precision that there is."""
        if self.tied:
            return self.low.get("W_dec", self.W_dec).T
        return self.low.get("W_enc8", self.low.get("W_enc", self.W_enc))

    @abc.abstractmethod
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Latents of each row as (values, indices); unused places have value 0. No gradient."""

    @abc.abstractmethod
    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        """The training loss of a batch; target is x itself unless the dictionary is a transcoder."""

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """Latents of each row, dense."""
        return to_dense(*self.encode_sparse(x), self.d_sae)

    def decode(self, z: Float[Tensor, "n d_sae"], x: Float[Tensor, "n d_in"] | None = None) -> Float[Tensor, "n d_out"]:
        """Activations from latents. x is the row that z came from; only dictionaries with an `offset` of it use it."""
        return z @ self.W_dec + self.offset(x)

    def offset(self, x: Float[Tensor, "n d_in"] | None) -> Float[Tensor, "*_n d_out"]:
        """What x_hat is without any latent: b_dec, and of some architectures what goes past the latents."""
        del x
        return self.b_dec

    def reconstruct(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """x_hat of each row, through the sparse form."""
        values, indices = self.encode_sparse(x)
        part = nn.functional.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return self.mesh.sum_latents(part) + self.offset(x)

    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        """Random unit decoder rows, the encoder their transpose, b_dec the mean of x, a (scaled) sample.

        The seed says the whole dictionary, whatever part of it is here.
        """
        with torch.no_grad():
            self._draw(self.W_dec, seed)
            if self.has_encoder_rows:
                self.W_enc.copy_(self.W_dec.T)
            self.b_dec.copy_(x.mean(dim=0))

    @torch.no_grad()
    def restart(
        self, latents: Int[Tensor, " _m"], directions: Float[Tensor, "_m d_in"], norm: Float[Tensor, ""]
    ) -> None:
        """Start these latents anew along unit directions, with encoder rows of this norm (`sae.resample`)."""
        self.W_dec[latents] = directions
        if self.has_encoder_rows:
            self.W_enc[:, latents] = (directions * norm).T
        if "b_enc" in self.by_latent:
            self.b_enc[latents] = 0

    def initialise_output(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"]) -> None:
        """After `initialise`, where the target is not x: what of the weights follows from a sample of both."""

    def draw_encoder(self, seed: int) -> None:
        """W_enc of random columns of norm 1."""
        self._draw(self.W_enc.T, seed)

    @torch.no_grad()
    def _draw(self, held_rows: Tensor, seed: int) -> None:
        """Random rows of norm 1, a row a latent, of which those held here are written."""
        generator = torch.Generator().manual_seed(seed)
        held = self.mesh.part(self.d_sae)
        for first in range(0, self.d_sae, INITIAL_ROWS):
            rows = torch.randn(min(INITIAL_ROWS, self.d_sae - first), held_rows.shape[1], generator=generator)
            begin, end = max(held.start, first), min(held.stop, first + len(rows))
            if begin < end:
                rows = rows[begin - first : end - first]
                held_rows[begin - held.start : end - held.start] = rows / rows.norm(dim=1, keepdim=True)

    def after_step(self, state: State) -> None:
        """After the optimiser's step: what else an architecture adjusts. Without gradient, without waiting."""

    def after_training(self) -> None:
        """Once, before the dictionary is unscaled and saved: what an architecture puts in order. Without gradient."""

    @torch.no_grad()
    def unscale(self, scale: float) -> None:
        """Turn a dictionary of scale * x into the same dictionary of x.

        Weights stay, so latents come out in units of x (decoder rows of norm 1): encode(x) afterwards is encode(scale
        * x) before, divided by scale.
        """
        for name in self.biases:
            getattr(self, name).div_(scale)

    def unscale_columns(self, reads: Float[Tensor, " d_in"], writes: Float[Tensor, " d_out"]) -> None:
        """As `unscale`, where columns of x and of the target were multiplied by scales of their own."""
        raise NotImplementedError(f"{self.architecture} has one scale")

    def at(self, hook: str) -> "SAE":
        """A dictionary that was trained on pooled hooks, as one of the activations at `hook`; else itself.

        Raises InputError for a hook that it was not trained on.
        """
        if hook not in self.hooks:
            raise InputError(f"This dictionary does not read {hook!r}: expected one of {', '.join(self.hooks)}.")
        factor = dict(zip(self.hooks, self.metadata.get("hook_factors", ()), strict=False)).get(hook, 1.0)
        if factor == 1.0:
            return self
        own = copy.deepcopy(self)
        own.unscale(factor)
        return own


def fields_from(read: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a frozen dataclass as JSON gives them back: its lists were tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}


class FittedSAE(SAE):
    """A dictionary that is filled from rows, each seen once and in their order, and has no gradient (`sae.fit`)."""

    @abc.abstractmethod
    def is_full(self) -> bool:
        """Whether further rows would change nothing."""

    @abc.abstractmethod
    def fit_batch(self, x: Float[Tensor, "n d_in"], labels: Int[Tensor, "n 2"]) -> dict[str, Tensor]:
        """Learn from rows, scaled as in training; labels: document and row number of each. Returns figures to log."""

    @abc.abstractmethod
    def fitted(self) -> "FittedSAE":
        """The dictionary once all rows were seen. Raises InputError when it came to nothing."""

    def save_beside(self, folder: Path) -> None:
        """Write what else is known of it into `folder`, before the weights are."""


def rows_of(name: str, tensor: Tensor) -> Tensor:
    """A parameter, or what goes with it, with a row a latent where it has latents: W_enc is laid out so in memory."""
    return tensor.T if name == "W_enc" else tensor
