"""Matryoshka: BatchTopK whose first latents alone must reconstruct too, at each of several prefixes.

    z: as BatchTopK's        x_hat_j = z[:m_j] W_dec[:m_j] + b_dec        m_1 < ... < m_J = d_sae

Loss: mean of the FVU of all x_hat_j, those of the inner prefixes weighed by `inner_weight`, + 1/32 AuxK on what the
whole leaves over. Early latents learn general features, which later ones then have no reason to absorb.
`detach_inner`: in inner prefix j gradient reaches only the block m_j-1 to m_j (in the first, b_dec too); that of the
whole reaches all. `sort_by_frequency`: prefixes are of the latents that fire most, by a running mean; when training
ends the latents are put in that order.
Source: Bussmann, Nabeshima, Karvonen and Nanda 2025, arXiv:2503.17547; both options: Chanin 2026, "Letting Claude do
autonomous research to improve SAEs", found on planted features. Differs: both are on, and k starts three times as high
(docs/benchmarks.md says what that is worth); the loss is a mean, so that AuxK weighs the same whatever the number of
prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae import ksparse
from sae.base import ConfigError, Loss, State, rows_of
from sae.batchwise import BatchwiseConfig, BatchwiseSAE, choose
from sae.ksparse import Bags, Codes, auxk, l0_of
from sae.losses import fvu, tilted
from sae.parallel import ALONE, Mesh

FREQUENCY_KEEPS = 0.99
"""Share of itself that the running mean of how often a latent fires keeps at each step."""


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig(BatchwiseConfig):
    prefixes: Sequence[int] = ()
    """Latents in each inner prefix, ascending; (): d_sae / 32, / 16, / 8, / 4 and / 2. The whole is always the last;
    what is not smaller is the whole too."""
    inner_weight: float = 1.0
    """Weight of each inner prefix' FVU; the whole's has 1."""
    detach_inner: bool = True
    """Whether an inner prefix trains only the block of latents that it adds to the one before."""
    sort_by_frequency: bool = True
    """Whether prefixes are of the latents that fire most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "prefixes", tuple(self.prefixes))  # of JSON's list
        if any(not low < high for low, high in zip((0, *self.prefixes), self.prefixes, strict=False)):
            raise ConfigError(f"prefixes={list(self.prefixes)}: expected whole numbers that rise, from 1.")
        if self.inner_weight < 0:
            raise ConfigError(f"inner_weight={self.inner_weight}: expected 0 or more.")

    @property
    def levels(self) -> tuple[int, ...]:
        """m_1 < ... < m_J = d_sae."""
        inner = self.prefixes or [self.d_sae // part for part in (32, 16, 8, 4, 2)]
        return (*sorted({m for m in inner if 0 < m < self.d_sae}), self.d_sae)


class MatryoshkaSAE(BatchwiseSAE):
    architecture = "matryoshka"
    cfg: MatryoshkaConfig
    ends: Tensor
    """(J) where each prefix ends."""
    frequency: Tensor
    """(d_sae) running mean of the share of rows in which each latent fires; with `sort_by_frequency`."""

    def __init__(self, cfg: MatryoshkaConfig, mesh: Mesh = ALONE) -> None:
        if mesh.n_latents > 1:
            raise ConfigError("Matryoshka cannot share its latents among processes: use --data-parallel N.")
        super().__init__(cfg, mesh)
        self.register_buffer("ends", torch.tensor(cfg.levels), persistent=False)
        if cfg.sort_by_frequency:
            self.register_buffer("frequency", torch.zeros(cfg.d_sae))

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        cfg, mesh, n_levels = self.cfg, self.mesh, len(self.ends)
        u, codes, dead, at_cap = choose(self, x, state)
        fired = self._count(codes, len(x))
        with torch.autocast(x.device.type, enabled=False):
            decoded, of_dead = ksparse.decode(self, u, self._by_level(codes, len(x)), dead)
            *inner, last = decoded.view(len(x), n_levels, -1).unbind(dim=1)
            x_hat: Tensor = self.b_dec
            inner_fvus: list[Tensor] = []
            for part in inner:
                below = x_hat.detach() if cfg.detach_inner and inner_fvus else x_hat
                inner_fvus.append(fvu(tilted(below + part - target, cfg.tilt, mesh), target, mesh))
                x_hat = x_hat + part
            error = x_hat + last - target
            whole, aux = fvu(tilted(error, cfg.tilt, mesh), target, mesh), auxk(self, error, of_dead, dead)
            total = whole + cfg.inner_weight * sum(inner_fvus)
            total = total / (1 + cfg.inner_weight * len(inner)) + cfg.auxk_weight * aux
        terms = {"fvu": fvu(error.detach(), target, mesh), "auxk": aux.detach(), "l0": l0_of(self, codes, len(x))}
        prefixes = {f"fvu_{m}": each.detach() for m, each in zip(cfg.levels, inner_fvus, strict=False)}
        return Loss(total, {**terms, "at_cap": at_cap, **prefixes}, fired)

    @torch.no_grad()
    def _count(self, codes: Codes, n: int) -> Bool[Tensor, " d_sae"]:
        """Which latents fired; how often they do moves on."""
        counts = torch.zeros(self.d_sae, device=codes.values.device)
        counts.index_add_(0, codes.indices.flatten(), (codes.values != 0).flatten().to(counts.dtype))
        if self.cfg.sort_by_frequency:
            self.frequency.lerp_(self.mesh.mean_rows(counts / n), 1 - FREQUENCY_KEEPS)
        return counts > 0

    def _order(self) -> Int[Tensor, " d_sae"]:
        """The latents, those that fire most first."""
        return self.frequency.argsort(descending=True, stable=True)

    def _by_level(self, codes: Codes, n: int) -> Codes:
        """The same codes, with a bag for each row and level."""
        assert codes.bags is not None
        rank = place = torch.arange(self.d_sae, device=self.ends.device)
        if self.cfg.sort_by_frequency:
            rank = torch.empty_like(place).scatter_(0, self._order(), place)
        level = torch.searchsorted(self.ends, rank, right=True)
        bag, n_bags = codes.bags.row * len(self.ends) + level[codes.indices.flatten()], n * len(self.ends)
        real = torch.arange(len(bag), device=bag.device) < codes.bags.starts[-1]
        bag, order = torch.where(real, bag, n_bags).int().sort(stable=True)
        starts = torch.searchsorted(bag, torch.arange(n_bags + 1, dtype=bag.dtype, device=bag.device))
        bags = Bags(starts, bag.long().clamp(max=n_bags - 1), codes.bags.row[order])
        return Codes(codes.values[order], codes.indices[order], codes.dead_z, bags)

    @torch.no_grad()
    def after_training(self) -> None:
        if self.cfg.sort_by_frequency:
            order = self._order()
            for name in self.by_latent:
                tensor = rows_of(name, getattr(self, name))
                tensor.copy_(tensor[order])
            self.frequency.copy_(self.frequency[order])
