"""Simulated cells whose observed counts are made by fewer hidden variables: what a representation superposes is known.

    x0 ~ Poisson(1 + i / 10)                    how active program i is
    x1 = x0 + N(j, 0.1)                         covariate j of the cell, one number for all of its programs
    x2 = x1 where the cell's type has program i, else 0
    y = x2 M                                    observed; M is 0 or 1, a program acts on a tenth of what is observed

Types and covariates are drawn evenly. A representation of y in fewer dimensions than there are programs has to lay them
over each other; a dictionary of the representation should take them apart again.

    world = Superposition(n_programs=100, n_observed=1000)
    cells = world.sample(20_000, seed=1)

Source: Schuster 2024, arXiv:2410.11468, the large simulation, as its code has it (there 20,000 observed).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Cells(NamedTuple):
    """A sample, a row a cell."""

    observed: Float[Tensor, "n n_observed"]
    program: Float[Tensor, "n n_programs"]
    """x2, what makes the observed."""
    activity: Float[Tensor, "n n_programs"]
    """x0, before the covariate and the type."""
    type: Int[Tensor, " n"]
    covariate: Int[Tensor, " n"]


@dataclass(frozen=True, kw_only=True)
class Superposition:
    """The wiring, drawn from the seed; `sample` draws cells."""

    n_programs: int = 100
    n_observed: int = 1000
    n_types: int = 40
    n_covariates: int = 3
    acts: float = 0.1
    """Share of the observed that a program acts on."""
    has: float = 0.3
    """Share of the programs that a type has."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.n_programs, self.n_observed, self.n_types, self.n_covariates) < 1:
            raise ValueError("A simulation needs at least one program, observed count, type and covariate.")
        if not (0 < self.acts <= 1 and 0 < self.has <= 1):
            raise ValueError(f"acts={self.acts}, has={self.has}: expected shares above 0, at most 1.")

    @cached_property
    def wiring(self) -> tuple[Float[Tensor, "n_programs n_observed"], Float[Tensor, "n_types n_programs"]]:
        """(M, which programs each type has)."""
        generator = torch.Generator().manual_seed(self.seed)
        acts = torch.rand(self.n_programs, self.n_observed, generator=generator) < self.acts
        has = torch.rand(self.n_types, self.n_programs, generator=generator) < self.has
        return acts.float(), has.float()

    def sample(self, n: int, seed: int) -> Cells:
        """n cells; the seed says them."""
        generator = torch.Generator().manual_seed(seed)
        acts, has = self.wiring
        rates = 1 + 0.1 * torch.arange(self.n_programs)
        activity = torch.poisson(rates.expand(n, -1).contiguous(), generator=generator)
        covariate = torch.randint(self.n_covariates, (n,), generator=generator)
        shift = covariate + 0.1 * torch.randn(n, generator=generator)
        kind = torch.randint(self.n_types, (n,), generator=generator)
        program = (activity + shift[:, None]) * has[kind]
        return Cells(program @ acts, program, activity, kind, covariate)
