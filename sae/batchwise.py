"""What BatchTopK, BatchAbsTopK and Matryoshka share: the n * k largest latents of a batch of n rows, and thresholds.

A row has as many latents as it needs, and the batch k a row. Outside training a row is alone: there a latent is on
above a threshold, the running mean of the smallest value that was chosen in a batch.

First each row's `cap` largest are chosen, then the batch's largest among those: a row with more than `cap` of them is
cut off, which the term `at_cap`, the share of rows that may have been, shows to be rare.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sae import ksparse, sparse
from sae.base import SAE, Config, ConfigError, Dead, State
from sae.dense import precision
from sae.ksparse import Bags, Codes
from sae.parallel import ALONE, Mesh
from sae.refine import refined
from sae.select import above, largest_of_batch
from sae.sparse import Ragged, nonzero, to_table

CAP = 4
"""Latents that a row may have in training, in units of k."""
KEEPS = 0.95
"""Share of itself that a threshold keeps at each step."""


@dataclass(frozen=True, kw_only=True)
class BatchwiseConfig(Config):
    k: float
    """Mean active latents a token; need not be whole."""
    auxk_weight: float = 1 / 32
    """Weight of the loss that revives dead latents; 0 turns it off."""
    refine: int = 0
    """Times that the encoder looks again (`sae.refine`). SAELens has no such encoder: it cannot load the dictionary."""
    refine_step: float = 0.25
    """How much of what was left over the encoder then adds to its input."""
    tilt: float = 0.0
    """How much more badly reconstructed rows count (`sae.losses.tilted`); 0: all rows alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(
                f"k={self.k} is out of range: expected 0 < k <= d_sae={self.d_sae}. Lower k or raise d_sae."
            )
        if self.refine < 0 or not 0 < self.refine_step <= 1 or self.tilt < 0:
            raise ConfigError(
                f"refine={self.refine}, refine_step={self.refine_step}, tilt={self.tilt}: expected 0 or more steps, "
                "a step above 0 and at most 1, and a tilt of 0 or more."
            )


class BatchwiseSAE(SAE):
    """A dictionary whose rows share their latents in training and have a threshold outside; finals define `loss`."""

    biases = ("b_enc", "b_dec", "threshold")
    by_latent = (*SAE.by_latent, "threshold")
    saved = ("threshold",)
    cfg: BatchwiseConfig
    threshold: Tensor
    """(held) as JumpReLU's, all alike and 0 before the first batch; with `refine` (held, times + 1)."""

    def __init__(self, cfg: BatchwiseConfig, mesh: Mesh = ALONE) -> None:
        super().__init__(cfg, mesh)
        self.register_buffer("threshold", torch.zeros((self.n_held, cfg.refine + 1) if cfg.refine else self.n_held))

    @property
    def saved_as(self) -> str:
        return self.architecture if self.signed or self.cfg.refine else "jumprelu"

    def threshold_at(self, time: int) -> Float[Tensor, " held"]:
        """That of one of the encoder's looks, 0 to `refine`."""
        return self.threshold.view(self.n_held, -1)[:, time]

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        dtype, u = precision(x), ksparse.centred(self, x)

        def on(u: Tensor, time: int) -> Ragged:
            return above(u.to(dtype), self.encoder, self.b_enc, self.threshold_at(time), self.signed)

        def decode(u: Tensor, time: int) -> Tensor:
            z = on(u, time)
            return self.mesh.sum_latents(sparse.decode(z.values[:, None], z.columns[:, None], self.W_dec, z.starts))

        if self.cfg.refine:
            u = refined(u.float(), decode, self.cfg.refine, self.cfg.refine_step)
        return to_table(on(u, self.cfg.refine), self.n_held)


class Chosen(NamedTuple):
    """What a batch is made of."""

    x: Float[Tensor, "n d_in"]
    """What the encoder reads: x centred, with a gradient where it was refined."""
    codes: Codes
    """In a flat table."""
    dead: Dead | None
    at_cap: Float[Tensor, ""]


def choose(sae: BatchwiseSAE, x: Float[Tensor, "n d_in"], state: State) -> Chosen:
    """The n * k largest latents of the batch. Moves the thresholds."""
    cfg, mesh, dtype = sae.cfg, sae.mesh, precision(x)
    k, dead = state.k or cfg.k, state.dead if cfg.auxk_weight else None
    u = ksparse.centred(sae, x)
    with torch.autocast(x.device.type, enabled=False):

        def encoder_input(u: Tensor) -> Tensor:
            return mesh.into_latents(u).to(dtype)

        def decode(u: Tensor, time: int) -> Tensor:
            u = encoder_input(u)
            return ksparse.decode(sae, u, _of_batch(sae, u.detach(), k, None, time)[0])[0]

        if cfg.refine:
            u = encoder_input(refined(x - sae.b_dec, decode, cfg.refine, cfg.refine_step))
        codes, at_cap = _of_batch(sae, u.detach(), k, dead, cfg.refine)
    return Chosen(u, codes, dead, at_cap)


@torch.no_grad()
def _of_batch(
    sae: BatchwiseSAE, u: Float[Tensor, "n d_in"], k: float, dead: Dead | None, time: int
) -> tuple[Codes, Float[Tensor, ""]]:
    """(the n * k largest latents, the share of rows that reach the cap) of encoder inputs."""
    mesh, width = sae.mesh, min(math.ceil(CAP * k), sae.n_held)
    table = ksparse.choose(sae, u, width, dead)
    # Where parts of the latents are elsewhere, the values that others chose are 0 here.
    sizes = mesh.all_rows(mesh.sum_latents(table.values.abs()))
    m = min(max(round(k * len(sizes)), 1), sizes.numel())
    kept, least = largest_of_batch(sizes, m)
    threshold = sae.threshold_at(time)
    moved = torch.where(threshold == 0, least, threshold.lerp(least, 1 - KEEPS))
    threshold.copy_(torch.where(least.isfinite(), moved, threshold))
    own = kept[mesh.row :: mesh.n_rows] & (table.values != 0)
    return flat(table, own, min(m, own.numel()), static=own.is_cuda), kept.all(dim=1).float().mean()


def flat(table: Codes, kept: Bool[Tensor, "n k"], most: int, *, static: bool) -> Codes:
    """The kept entries, at most so many, as a flat table. static: of `most` places, so that a GPU waits for nothing."""
    if static:
        # Those that are too many are in the last place, and count for nothing.
        places = torch.nonzero_static(kept.flatten(), size=most, fill_value=kept.numel() - 1).squeeze(1)
        real = torch.arange(most, device=kept.device) < kept.sum()
    else:
        places = nonzero(kept)
        real = torch.ones_like(places, dtype=torch.bool)
    rows = places // kept.shape[1]
    bags = Bags(pad(kept.sum(dim=1).cumsum(dim=0), (1, 0)), rows, rows)
    values = table.values.flatten()[places] * real
    return Codes(values[:, None], table.indices.flatten()[places][:, None], table.dead_z, bags)
