"""Who is trained by `sae bench quality`: dictionaries of our registry, SAELens', and controls that nobody trains."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from activations.errors import InputError
from activations.model import fast_dtype
from app.cli.options import field_of
from data.planted import World, WorldConfig
from sae.registry import REGISTRY
from sae.settings import Training
from sae.stack import Together
from sae.stepper import Stepper

COUNT_DEAD_EVERY = 20
"""Steps, as in `sae train`."""

Fields = dict[str, Any]


class Preset(NamedTuple):
    world: WorldConfig
    d_sae: int
    k: float
    batch: int
    lr: float
    """Of SAELens' dictionaries; batch is also ours, unless they say another."""
    widths: list[int]
    """Prefixes of SAELens' Matryoshka."""
    n_samples: int
    n_eval: int


class View(NamedTuple):
    """A way to encode with a dictionary, in the form that both judges ask for."""

    W_dec: Tensor
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]

    def eval(self) -> None: ...


class Group(Protocol):
    """Dictionaries that take their steps together."""

    batch: int
    facts: list[Fields]
    """What a reader has to know of each."""

    def step(self, x: Tensor) -> None: ...

    def views(self) -> Iterator[tuple[Fields, str, View]]:
        """After the last step."""


class Ours:
    """Dictionaries of our registry, all of one batch size. first: rows for the scale and the weights at the start."""

    def __init__(self, plans: Sequence[tuple[str, Training]], first: Tensor) -> None:
        self.batch = plans[0][1].batch
        self.facts: list[Fields] = []
        self.steppers: list[Stepper] = []
        scale = math.sqrt(first.shape[1]) / float(first.norm(dim=1).mean())
        for name, plan in plans:
            sae = REGISTRY[plan.architecture].sae(plan.config(first.shape[1]))
            sae.initialise(first.cpu() * scale, plan.seed)
            self.steppers.append(Stepper(sae.to(first.device), plan, scale))
            self.facts.append({"who": "ours", "name": name, "seed": plan.seed, "settings": dataclasses.asdict(plan)})
        self.together = Together(self.steppers)

    def step(self, x: Tensor) -> None:
        self.together.step(x)
        for stepper in self.steppers:
            if stepper.settings.resamples_at(stepper.n_steps_done - 1):
                stepper.resample(x)
            if stepper.n_steps_done % COUNT_DEAD_EVERY == 0:
                stepper.recount()

    def views(self) -> Iterator[tuple[Fields, str, View]]:
        for facts, stepper in zip(self.facts, self.steppers, strict=True):
            sae = stepper.finish().requires_grad_(False)
            yield facts, "saved", View(sae.W_dec, sae.encode, sae.decode)
            if hasattr(sae, "threshold") and hasattr(sae.cfg, "k"):
                yield facts, "batch", View(sae.W_dec, _without_threshold(sae), sae.decode)


def _without_threshold(sae: Any) -> Callable[[Tensor], Tensor]:
    """How a dictionary with thresholds and a k was trained: the k n largest of all latents of n rows."""

    def encode(x: Tensor) -> Tensor:
        threshold = sae.threshold.clone()
        sae.threshold.data.zero_()
        z = sae.encode(x)
        sae.threshold.data.copy_(threshold)
        return batch_topk(z, sae.cfg.k)

    return encode


def batch_topk(z: Tensor, k: float) -> Tensor:
    """The k n largest entries of z (n, d_sae), the others 0; none below 0."""
    flat = z.relu().flatten()
    kept = flat.topk(int(k * len(z)))
    return torch.zeros_like(flat).scatter_(0, kept.indices, kept.values).view_as(z)


def plan_of(text: str, preset: Preset, n_samples: int, seed: int, device: str) -> Training:
    """The training that `--ours ARCH:FIELD=VALUE,...` asks for. Raises InputError for what cannot be."""
    arch, fields = parsed(text)
    if arch not in REGISTRY:
        raise InputError(f"{arch!r} is no architecture: expected one of {', '.join(REGISTRY)}.")
    known = {field.name for field in dataclasses.fields(Training)} - {"architecture", "hook", "sizes", "n_tokens"}
    chosen = {name: fields.pop(name) for name in list(fields) if name in known}
    sparsity = REGISTRY[arch].sparsity
    if sparsity != "k" and "k" in fields:
        fields[sparsity] = fields.pop("k")
    matmul = str(fast_dtype(torch.device(device))).removeprefix("torch.") if device != "cpu" else "float32"
    chosen = {"batch": preset.batch, "matmul": matmul, "seed": seed, **chosen}
    sizes = {"d_sae": preset.d_sae, sparsity: _whole(preset.k), **fields}
    return Training(architecture=arch, hook="", sizes=sizes, n_tokens=n_samples, **chosen)


def _whole(k: float) -> float:
    """k, as an int where it is one: TopK takes no other."""
    return int(k) if k == int(k) else k


def parsed(text: str) -> tuple[str, Fields]:
    """ "arch:a=1,b=[2,3],c=word" as ("arch", {"a": 1, "b": [2, 3], "c": "word"})."""
    arch, _, options = text.partition(":")
    return arch, dict(map(field_of, filter(None, re.split(r",(?![^\[]*\])", options))))


class Theirs:
    """One of SAELens' dictionaries, by `--peers ARCH:FIELD=VALUE,...`."""

    def __init__(self, text: str, preset: Preset, n_samples: int, seed: int, device: str) -> None:
        from tests.benchmarks.synthetic.saelens import Peer

        self.arch, fields = parsed(text)
        self.batch = int(fields.pop("batch", preset.batch))
        lr = fields.pop("lr", preset.lr)
        sizes = {"d_in": preset.world.d_in, "d_sae": preset.d_sae, "device": device}
        sizes |= {**_peer_sizes(self.arch, preset), **fields}
        self.peer = Peer(self.arch, sizes, n_steps=n_samples // self.batch, batch=self.batch, lr=lr, seed=seed)
        settings = {**sizes, "lr": lr, "batch": self.batch}
        self.facts = [{"who": "saelens", "name": text, "seed": seed, "settings": settings}]

    def step(self, x: Tensor) -> None:
        self.peer.step(x)

    def views(self) -> Iterator[tuple[Fields, str, View]]:
        sae = self.peer.sae.requires_grad_(False)
        in_batch = self.arch in ("batchtopk", "matryoshka")
        yield self.facts[0], "batch" if in_batch else "saved", View(sae.W_dec, sae.encode, sae.decode)
        if in_batch:
            saved = self.peer.saved()
            yield self.facts[0], "saved", View(saved.W_dec, saved.encode, saved.decode)


def _peer_sizes(arch: str, preset: Preset) -> Fields:
    """What SAELens' dictionaries are built with, where its defaults are not for these worlds."""
    k = _whole(preset.k)
    if arch == "matryoshka":
        return {"k": k, "matryoshka_widths": list(preset.widths), "use_matryoshka_aux_loss": True}
    if arch == "jumprelu":
        return {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(k), "l0_coefficient": 1.0}
    return {"k": k} if "topk" in arch else {}


def controls(world: World, d_sae: int, k: float, first: Tensor, latest: list[Tensor]) -> Iterator[tuple[str, View]]:
    """Dictionaries that nobody trained. latest: where the true features of the judge's last rows are, for one that
    looks."""
    mean = first.mean(dim=0)

    def tied(W_dec: Tensor, b_dec: Tensor) -> View:
        return View(W_dec, lambda x: batch_topk((x - b_dec) @ W_dec.T, k), lambda z: z @ W_dec + b_dec)

    random = torch.randn(d_sae, world.d_in, generator=torch.Generator().manual_seed(0)).to(first.device)
    yield "random dictionary", tied(random / random.norm(dim=1, keepdim=True), mean)
    components = torch.linalg.eigh(torch.cov((first - mean).T)).eigenvectors.T.flip(0)
    yield "principal components", tied(torch.cat([components, -components])[:d_sae], mean)
    true = world.directions[:d_sae]
    yield "true dictionary, tied", tied(true, world.bias)
    yield "true codes", View(true, lambda _: latest[0][:, :d_sae], lambda z: z @ true + world.bias)
