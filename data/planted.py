"""Planted worlds: rows that are sums of known features, so that what a dictionary found can be compared with the truth.

    z_i = size_i where a Gaussian of the row passes feature i's threshold, else 0        x = z D + bias + noise

Frequencies fall with the feature's number (Zipf). The Gaussians of a row share `rank` factors, so features are
correlated. The first features are roots of trees: a child fires only with its parent, at most one child at a time where
they exclude each other, and with a size in proportion to its parent's. Features outside the trees have no parent.

    world = build_world(WorldConfig(n_features=2048, d_in=256, seed=0))
    x, z = world.sample(1024, torch.Generator().manual_seed(0))          # (1024, 256), (1024, 2048)
    plant("worlds/small", world, n=1_000_000)                            # sae collect RUN --vectors worlds/small

Source: the recipe of SynthSAEBench as SAELens' SyntheticModel has it. Differs: a world is the same on every device;
only children of parents that fire are drawn, which makes no difference to what comes out; signs and noise.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

CONFIG, ROWS = "world.json", "rows.npy"
BLOCK = 8192
"""Rows drawn at a time where many are wanted."""


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What a world is drawn from. The defaults are SynthSAEBench's recipe, scaled to 2,048 features."""

    n_features: int = 2048
    d_in: int = 256
    max_prob: float = 0.4
    """Share of rows in which feature 0 fires; with `min_prob` equal to it, all fire as often."""
    min_prob: float = 2e-3
    """Of the last feature."""
    exponent: float = 0.5
    """Of Zipf's law between them."""
    n_trees: int = 16
    """Features that are roots of trees; 0: no feature has a parent."""
    n_children: int = 4
    depth: int = 3
    """Generations below a root."""
    exclusive: bool = True
    """Of a parent's children at most one fires in a row."""
    scale_by_parent: bool = True
    """A child's size is multiplied by its parent's over the parent's mean."""
    rank: int = 8
    """Factors that the features of a row share; 0: they fire independently."""
    correlation: float = 0.1
    """Standard deviation of a feature's weight on each factor."""
    signed: bool = False
    """Each firing is + or - with equal chances."""
    sizes: tuple[float, float] = (5.0, 4.0)
    """Mean size of the first and of the last feature; in a straight line between."""
    spread: float = 0.5
    """A feature's sizes have the standard deviation |N(spread, spread)|."""
    orthogonal_steps: int = 100
    """Steps in which random directions are made more orthogonal; 0 leaves them random."""
    bias: float = 0.5
    """Norm of the vector added to all rows."""
    noise: float = 0.0
    """Standard deviation of the noise in each dimension."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.n_features, self.d_in) < 1 or not 0 <= self.n_trees <= self.n_features:
            raise ValueError(
                f"n_features={self.n_features}, d_in={self.d_in}, n_trees={self.n_trees}: expected at least one "
                "feature and one dimension, and no more trees than features."
            )
        if not 0 < self.min_prob <= self.max_prob <= 1:
            raise ValueError(
                f"min_prob={self.min_prob}, max_prob={self.max_prob}: expected 0 < min_prob <= max_prob <= 1."
            )
        if self.n_children < 1 or self.depth < 0 or self.exponent <= 0:
            raise ValueError(
                f"n_children={self.n_children}, depth={self.depth}, exponent={self.exponent}: expected at least one "
                "child, no negative depth and an exponent above 0."
            )
        if self.rank * self.correlation**2 >= 0.5:
            raise ValueError(
                f"rank={self.rank}, correlation={self.correlation}: expected rank * correlation^2 below 0.5, since a "
                "feature needs variance of its own. Lower one of them."
            )


@dataclass(frozen=True, kw_only=True)
class World:
    """A world, drawn: `sample` gives rows of it. All tensors are on one device."""

    directions: Float[Tensor, "n_features d_in"]
    """Of norm 1."""
    bias: Float[Tensor, " d_in"]
    chance: Float[Tensor, " n_features"]
    """Probability of a feature to be drawn; of a child: in rows where its parent fires, before siblings exclude it."""
    size: Float[Tensor, " n_features"]
    spread: Float[Tensor, " n_features"]
    """Mean and standard deviation of a feature's size, as it is drawn."""
    factors: Float[Tensor, "n_features rank"]
    """Weights on the factors that all features of a row share."""
    parent: Int[Tensor, " n_features"]
    """-1: none."""
    exclusive: bool = True
    scale_by_parent: bool = True
    signed: bool = False
    noise: float = 0.0
    config: WorldConfig | None = None
    """What it was drawn from, if it was by `build_world`."""

    @property
    def n_features(self) -> int:
        return len(self.directions)

    @property
    def d_in(self) -> int:
        return self.directions.shape[1]

    def to(self, device: torch.device | str) -> "World":
        """The same world on another device. There, a generator of the same seed gives other rows."""
        each = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in each.items()}
        return World(**moved)

    @torch.no_grad()
    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n n_features"]]:
        """(x, z): n rows and their true features. generator: on the world's device; its state says the rows."""
        device = self.directions.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def size_of(features: Tensor) -> Tensor:
            return self.size[features] + self.spread[features] * normal(*features.shape)

        shared, roots = normal(n, self.factors.shape[1]), self._roots
        drawn = normal(n, len(roots)).mul_(self._own[roots]).addmm_(shared, self.factors[roots].T)
        rows, at = (drawn > self._threshold[roots]).nonzero(as_tuple=True)
        features = roots[at]
        sizes = size_of(features)
        found = [(rows, features, sizes, sizes > 0)]
        while self._children.numel() and len(found[-1][0]):
            rows, parents, sizes, on = (part[found[-1][3]] for part in found[-1])
            features = self._children[parents]  # (m, children of a parent)
            drawn = normal(*features.shape) * self._own[features]
            drawn += torch.einsum("mr,mcr->mc", shared[rows], self.factors[features])
            child_sizes = size_of(features)
            on = (drawn > self._threshold[features]) & (child_sizes > 0) & (features >= 0)
            if self.exclusive:
                lots = torch.rand(features.shape, generator=generator, device=device).masked_fill_(~on, -1.0)
                on &= torch.zeros_like(on).scatter_(1, lots.argmax(dim=1, keepdim=True), True)
            if self.scale_by_parent:
                child_sizes *= (sizes / self.size[parents])[:, None]
            found.append((rows[:, None].expand_as(features)[on], features[on], child_sizes[on], on[on]))
        rows, features, sizes, on = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = rows[on].argsort(stable=True)
        rows, features, sizes = (part[on][order] for part in (rows, features, sizes))
        if self.signed:
            sizes = sizes * (1 - 2 * torch.randint(2, sizes.shape, generator=generator, device=device))
        z = torch.zeros(n, self.n_features, device=device)
        z[rows, features] = sizes
        starts = torch.searchsorted(rows, torch.arange(n, device=device))
        x = torch.nn.functional.embedding_bag(
            features, self.directions, starts, mode="sum", per_sample_weights=sizes.to(self.directions.dtype)
        )
        x += self.bias
        if self.noise:
            x += self.noise * normal(n, self.d_in)
        return x, z

    def batches(self, n: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """n rows as (x, z), 8,192 at a time; the seed says them, on one kind of device."""
        generator = torch.Generator(self.directions.device).manual_seed(seed)
        for first in range(0, n, BLOCK):
            yield self.sample(min(BLOCK, n - first), generator)

    @cached_property
    def _roots(self) -> Tensor:
        return (self.parent < 0).nonzero().squeeze(1)

    @cached_property
    def _children(self) -> Tensor:
        """The children of each feature (n_features, most that one has), -1 where there are fewer."""
        children = (self.parent >= 0).nonzero().squeeze(1)
        parents, order = self.parent[children].sort(stable=True)
        place = torch.arange(len(parents), device=parents.device) - torch.searchsorted(parents, parents)
        most = int(place.max()) + 1 if len(place) else 0
        table = torch.full((self.n_features, most), -1, dtype=torch.long, device=parents.device)
        table[parents, place] = children[order]
        return table

    @cached_property
    def _threshold(self) -> Tensor:
        return math.sqrt(2) * torch.erfinv(1 - 2 * self.chance)

    @cached_property
    def _own(self) -> Tensor:
        """Weight of a feature's own Gaussian: with the shared ones its variance is 1."""
        return (1 - self.factors.square().sum(dim=1)).sqrt()


def build_world(config: WorldConfig) -> World:
    """The world of a config, on the CPU: the same for the same config."""
    n = config.n_features
    generator = torch.Generator().manual_seed(config.seed)
    directions = torch.randn(n, config.d_in, generator=generator)
    bias = torch.randn(config.d_in, generator=generator)
    factors = config.correlation * torch.randn(n, config.rank, generator=generator)
    longest = factors.square().sum(dim=1, keepdim=True).clamp(min=0.99)
    parent = _parents(config)
    return World(
        directions=orthogonalised(_unit(directions), config.orthogonal_steps),
        bias=config.bias * bias / bias.norm(),
        chance=_chances(frequencies(config), parent, config.exclusive),
        size=torch.linspace(*config.sizes, n),
        spread=(config.spread + config.spread * torch.randn(n, generator=generator)).abs(),
        factors=factors * (0.99 / longest).sqrt(),
        parent=parent,
        exclusive=config.exclusive,
        scale_by_parent=config.scale_by_parent,
        signed=config.signed,
        noise=config.noise,
        config=config,
    )


def frequencies(config: WorldConfig) -> Float[Tensor, " n_features"]:
    """Share of rows in which each feature is meant to fire: Zipf's law, brought to [min_prob, max_prob].

    Features without a parent fire so often; children at most so often, and less where siblings that exclude each other
    would together need more rows than their parent has.
    """
    zipf = torch.arange(1, config.n_features + 1).double() ** -config.exponent
    share = (zipf - zipf[-1]) / max(float(zipf[0] - zipf[-1]), 1e-12)
    return (config.min_prob + (config.max_prob - config.min_prob) * share).float()


def orthogonalised(directions: Float[Tensor, "n d"], steps: int, lr: float = 3e-4) -> Float[Tensor, "n d"]:
    """Unit directions moved by Adam down the sum of their squared cosines; as many as fit stay apart.

    The gradient of sum_{i != j} (d_i . d_j)^2 goes through D^T D (d, d), so that no (n, n) matrix is made.
    """
    directions = directions.clone()
    optimizer = torch.optim.Adam([directions], lr=lr)
    for _ in range(steps):
        squares = directions.square().sum(dim=1, keepdim=True)
        overlap = directions @ (directions.T @ directions) - squares * directions
        directions.grad = 4 * (overlap + len(directions) * (squares - 1) * directions)
        optimizer.step()
    return _unit(directions)


def plant(folder: str | Path, world: World, n: int, seed: int = 0) -> Path:
    """Write n rows of the world into `folder` as rows.npy, which `sae collect RUN --vectors folder` reads, and the
    world's config beside them. Raises ValueError when it was not made by `build_world`.
    """
    if world.config is None:
        raise ValueError("This world has no config, so it could not be found again: make it with build_world.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{ROWS}"
    rows = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=(n, world.d_in))
    at = 0
    for x, _ in world.batches(n, seed):
        rows[at : at + len(x)] = x.cpu().numpy()
        at += len(x)
    rows.flush()
    (folder / CONFIG).write_text(json.dumps(asdict(world.config), indent=2), encoding="utf-8")
    aside.rename(folder / ROWS)
    return folder


def load_world(folder: str | Path) -> World:
    """The world whose rows `plant` wrote there."""
    values = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    return build_world(WorldConfig(**{**values, "sizes": tuple(values["sizes"])}))


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def _parents(config: WorldConfig) -> Tensor:
    """The trees are numbered generation by generation, so that the more frequent features are above."""
    in_trees = config.n_trees * sum(config.n_children**level for level in range(config.depth + 1))
    features = torch.arange(config.n_features)
    parent = (features - config.n_trees) // config.n_children
    return torch.where((features >= config.n_trees) & (features < in_trees), parent, -1)


def _chances(wanted: Tensor, parent: Tensor, exclusive: bool) -> Tensor:
    """What children have to be drawn with, so that they fire as often as wanted where there is room for them all."""
    child = parent >= 0
    above = torch.where(child, wanted[parent], 1.0)
    of_all = torch.zeros_like(wanted).index_add_(0, parent[child], wanted[child])[parent]
    rivals = torch.where(child & exclusive, (of_all - wanted) / above, 0.0)
    return (wanted / above * (1 + rivals)).clamp(max=1.0)
