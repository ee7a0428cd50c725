"""All settings of one training run, and the schedules that follow from them: pure functions of the step."""

import math
from dataclasses import dataclass
from typing import Any

from activations.errors import InputError
from sae.base import Config, ConfigError, FittedSAE
from sae.fields import checked
from sae.registry import REGISTRY

MATMUL = ("float32", "bfloat16", "float8")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Saved as train.json. A share is of the run's steps."""

    architecture: str
    hook: str
    sizes: dict[str, Any]
    """Fields of the architecture's config but d_in."""
    hooks: tuple[str, ...] = ()
    """All hooks that are read, where they are several, `hook` the first; () for `hook` alone."""
    target_hooks: tuple[str, ...] = ()
    """The hooks that are predicted, by dictionaries that do not give back what they read."""
    base: str | None = None
    """Of a boost: the ID, in the same run, of the frozen dictionary whose error it learns."""
    n_tokens: int
    """Rows visited; more than the cache holds means several epochs."""
    batch: int = 2048
    """Rows in a step, of all GPUs together."""
    seed: int = 0
    """Of the weights at the start, and of the order of the rows unless `order_seed` is given."""
    order: str = "shuffled"
    """Of the rows: "shuffled" over a complete cache, or "stream", as they come (`activations.shuffle`)."""
    order_seed: int | None = None
    """Of the rows' order; dictionaries of one sweep share it, whatever their seeds."""
    roles: tuple[str, ...] = ()
    """Of a chat: train on the tokens of these alone; () for all."""
    lr: float | None = None
    """Peak learning rate; None takes the registry's for the architecture and width."""
    warmup: float = 0.05
    """Share over which the learning rate rises."""
    decay: float = 0.2
    """Share over which it falls to 0 at the end."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    k_from: int | None = None
    """k-sparse dictionaries: k of the first step, k itself for none that falls; None: the registry's multiple of k."""
    k_anneal: float | None = None
    """Share over which k falls from `k_from` in a straight line; None: as the registry says."""
    sparsity_warmup: float | None = None
    """Share over which L0 falls to the target from the config's `start_l0` times as much; a fixed weight of the penalty
    rises from 0 instead. None: as the registry says, 0 with a fixed weight."""
    ema: float = 0.0
    """The dictionary saved is a running mean of the weights that keeps so much of itself each step; 0: the last."""
    dead_tokens: int | None = None
    """A latent that has not fired in so many tokens is dead; None: min(10 M, a tenth of the run)."""
    resample_every: int | None = None
    """Tokens between resamplings of dead latents, in the first half of the run; None: as the registry says, mostly
    never."""
    matmul: str | None = None
    """Precision of the wide products: "float32" or "bfloat16", None for the faster of them on this machine; "float8":
    bfloat16, and eight bits for the encoder's, which GPUs since Ada and Hopper make twice as fast."""

    def __post_init__(self) -> None:
        if self.architecture not in REGISTRY:
            raise InputError(f"Architecture {self.architecture!r} is unknown: expected one of {', '.join(REGISTRY)}.")
        if self.batch < 1 or self.n_tokens < self.batch:
            raise InputError(f"{self.n_tokens} tokens make no batch of {self.batch}: raise --tokens or lower --batch.")
        if self.matmul not in (None, *MATMUL):
            raise InputError(f"matmul={self.matmul!r} is unknown: expected one of {', '.join(MATMUL)}.")
        self._check_hooks()
        for name in ("warmup", "decay", "k_anneal", "sparsity_warmup"):
            if (share := getattr(self, name)) is not None and not 0 <= share <= 1:
                raise InputError(f"{name}={share} is no share of the run: expected 0 to 1.")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema={self.ema} is out of range: expected 0 (off) to below 1, such as 0.999.")
        if not self.clip > 0 or (self.lr is not None and not self.lr > 0):
            raise InputError(f"lr={self.lr}, clip={self.clip}: expected both above 0.")
        for name in ("dead_tokens", "resample_every"):
            if (tokens := getattr(self, name)) is not None and tokens < 1:
                raise InputError(f"{name}={tokens} is no number of tokens: expected at least 1.")
        if issubclass(REGISTRY[self.architecture].sae, FittedSAE):
            given = [name for name in ("lr", "k_from", "ema", "resample_every") if getattr(self, name)]
            if given:
                raise InputError(f"{self.architecture} is fitted in one pass, without gradient: leave out {given[0]}.")
        if self.k_from is not None and "k" not in self.sizes:
            raise InputError(f"k_from={self.k_from}: {self.architecture} has no k; use sparsity_warmup.")
        if self.sparsity_warmup and "k" in self.sizes and not REGISTRY[self.architecture].sae.penalised:
            raise InputError(f"sparsity_warmup={self.sparsity_warmup}: {self.architecture} has no penalty; use k_from.")

    def _check_hooks(self) -> None:
        kind, name = REGISTRY[self.architecture].sae, self.architecture
        if self.hooks and (self.hooks[0] != self.hook or len({*self.hooks}) < max(len(self.hooks), 2)):
            raise InputError(f"hooks={self.hooks}: expected several hooks, each once, and {self.hook} first.")
        if (kind.target == "hook") != bool(self.target_hooks):
            takes = "predicts other hooks: name them with" if kind.target == "hook" else "gives back what it reads: no"
            raise InputError(f"{name} {takes} --target-hook.")
        if (kind.target == "error") != (self.base is not None):
            takes = "learns what a dictionary left over: name it with" if kind.target == "error" else "has no"
            raise InputError(f"{name} {takes} --base.")
        if self.hooks and not kind.joint and (kind.target != "x" or issubclass(kind, FittedSAE)):
            raise InputError(f"{name} reads one hook, not {len(self.hooks)}.")
        if self.hooks and self.order == "stream":
            raise InputError("Several hooks are read from complete caches: leave out --live.")
        if self.resample_every is not None and not kind.centres:
            raise InputError(f"resample_every={self.resample_every}: {name} has none; its AuxK revives latents.")

    @property
    def reads(self) -> tuple[str, ...]:
        """The hooks that are read."""
        return self.hooks or (self.hook,)

    @property
    def rows(self) -> str:
        """What its training rows are made of; dictionaries with the same rows are trained in one pass."""
        kind = REGISTRY[self.architecture].sae
        reads = (" + " if kind.joint else " | ").join(self.reads)
        return " > ".join([reads, *self.target_hooks]) + (" gradient" if kind.weighs_gradient else "")

    @property
    def n_steps(self) -> int:
        return self.n_tokens // self.batch

    @property
    def rows_seed(self) -> int:
        """The seed that the order of the rows follows from."""
        return self.seed if self.order_seed is None else self.order_seed

    @property
    def dead_after(self) -> int:
        """Tokens without firing after which a latent is dead."""
        return self.dead_tokens or max(min(10_000_000, self.n_tokens // 10), self.batch)

    def config(self, d_in: int) -> Config:
        """The architecture's config. Raises InputError for sizes that cannot be: names, types or values."""
        kind = REGISTRY[self.architecture].config
        try:
            config = kind(d_in=d_in, **checked(kind, self.sizes))
        except (TypeError, ConfigError) as error:
            raise InputError(f"{self.architecture}: {error}") from None
        if self.k_from is not None and not self.sizes["k"] <= self.k_from <= config.d_sae:
            raise InputError(
                f"k_from={self.k_from} is out of range: expected k={self.sizes['k']} to d_sae={config.d_sae}."
            )
        return config

    def lr_at(self, step: int, d_sae: int) -> float:
        peak = self.lr or REGISTRY[self.architecture].lr * math.sqrt(4608 / d_sae)
        fall = (self.n_steps - step) / max(self.decay * self.n_steps, 1)
        return peak * min(self._rise(step, self.warmup), fall)

    def penalty_at(self, step: int) -> float:
        """How far a sparsity penalty has warmed up: from 0 up to 1."""
        share = self.sparsity_warmup
        if share is None:
            share = 0.0 if self.sizes.get("weight") is not None else REGISTRY[self.architecture].sparsity_warmup
        return self._rise(step, share)

    @property
    def first_k(self) -> int | None:
        """k of the first step while it is annealed; None where it is not, or there is no k."""
        times = REGISTRY[self.architecture].k_from
        if self.k_from is not None or times == 1:
            return self.k_from
        return min(round(times * self.sizes["k"]), self.sizes["d_sae"])

    @property
    def largest_k(self) -> float:
        """The largest k of all steps; 0 where there is no k."""
        return float(max(self.sizes.get("k", 0), self.first_k or 0))

    @property
    def mean_k(self) -> float:
        """The mean k of all steps; 0 where there is no k."""
        k = self.sizes.get("k", 0)
        return float(k if self.first_k is None else k + (self.first_k - k) * self._k_share / 2)

    @property
    def _k_share(self) -> float:
        return REGISTRY[self.architecture].k_anneal if self.k_anneal is None else self.k_anneal

    def k_at(self, step: int) -> int | None:
        """k of the step while it is annealed; None: the config's."""
        span, first = self._k_share * self.n_steps, self.first_k
        if first is None or step >= span:
            return None
        return round(first + (self.sizes["k"] - first) * step / max(math.ceil(span) - 1, 1))  # k at the last of them

    def resamples_at(self, step: int) -> bool:
        """Whether dead latents are resampled after this step."""
        times = REGISTRY[self.architecture].resamplings
        every = self.resample_every or (self.n_tokens // (2 * times) if times else None)
        if every is None or step + 1 > self.n_steps // 2:
            return False
        return (step + 1) % max(every // self.batch, 1) == 0

    def _rise(self, step: int, share: float) -> float:
        return min((step + 1) / max(share * self.n_steps, 1), 1.0)


def default_name(settings: Training) -> str:
    """HOOK-ARCH-dN-kK-sSEED, the name of a dictionary that is given none.

    HOOK+N stands for N hooks after the first, HOOK-to-TARGET for a prediction.
    """
    sparsity = settings.sizes[REGISTRY[settings.architecture].sparsity]
    more = f"+{len(settings.reads) - 1}" if settings.hooks else ""
    more += f"-to-{settings.target_hooks[0]}" if settings.target_hooks else ""
    return f"{settings.hook}{more}-{settings.architecture}-d{settings.sizes['d_sae']}-k{sparsity:g}-s{settings.seed}"
