"""Samples of a synthetic world: SAELens' SyntheticModel, or a world of ours of the same recipe."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from data.planted import World, WorldConfig, build_world

EVAL_SEED = 777


class Samples:
    """saelens: the world is SAELens'. sampler: "saelens" or "ours", which draws from either world, faster."""

    def __init__(self, config: WorldConfig, device: str, *, saelens: bool, sampler: str) -> None:
        self.device, self.by_saelens = device, saelens and sampler == "saelens"
        self.model: Any = None
        if saelens:
            from tests.benchmarks.synthetic.saelens import as_world, synthetic_model

            self.model = synthetic_model(config, device)
            self.world: World = as_world(self.model, config)
        else:
            self.world = build_world(config).to(device)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def draw(self, n: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """n samples as (x, z), in whole batches; the same for the same seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        state = generator.get_state()
        for _ in range(n // batch):
            if self.by_saelens:
                with self._global_generator(state) as state:
                    samples = self.model.sample_with_features(batch)
                    state.copy_(self._state())
                yield samples
            else:
                yield self.world.sample(batch, generator)

    def rows(self, n: int, batch: int, pool: int | None, seed: int) -> Iterator[Tensor]:
        """n rows to train on. pool: so many are drawn, and read again and again in new orders; None: each once."""
        if pool is None:
            yield from (x for x, _ in self.draw(n, batch, seed))
            return
        drawn = torch.cat([x for x, _ in self.draw(pool, min(pool, 8192), seed)])
        if len(drawn) < batch:
            raise SystemExit(f"A pool of {len(drawn)} makes no batch of {batch}: raise --pool.")
        generator = torch.Generator().manual_seed(seed)
        left = n // batch
        while left:
            order = torch.randperm(len(drawn), generator=generator)[: len(drawn) // batch * batch].to(self.device)
            for places in order.split(batch)[:left]:
                yield drawn[places]
                left -= 1

    def judged_on(self, n: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """n samples as (x, z), the same for all dictionaries; drawn at the first call."""
        if not self.kept:
            self.kept = [(x, z.to_sparse()) for x, z in self.draw(n, batch, EVAL_SEED)]
        yield from ((x, z.to_dense()) for x, z in self.kept)

    @contextlib.contextmanager
    def _global_generator(self, state: Tensor) -> Iterator[Tensor]:
        """Let the global generator, which SAELens draws from, be in `state`; afterwards it is as it was."""
        before = self._state()
        self._set(state)
        try:
            yield state
        finally:
            self._set(before)

    def _state(self) -> Tensor:
        return torch.get_rng_state() if self.device == "cpu" else torch.cuda.get_rng_state()

    def _set(self, state: Tensor) -> None:
        torch.set_rng_state(state) if self.device == "cpu" else torch.cuda.set_rng_state(state)
