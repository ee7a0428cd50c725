"""Kron: latents are pairs. Each head has m + n encoder rows, and a latent for every pair of one of m and one of n.

    u = ReLU((x - b_dec) P + b)    v = ReLU((x - b_dec) Q + b')    W_enc = [P of all heads, Q of all heads]
    z = TopK(sqrt(u_i v_j) of each head and pair, k)               x_hat = z W_dec + b_dec

d_sae = h m n latents, h (m + n) encoder rows. A pair is on only where both its rows are (a soft AND). Latent number:
((head m) + i) n + j.
Loss: FVU of the batch + 1/32 AuxK.
Source: Kurochkin et al. 2025, arXiv:2505.22255. Differs: b_dec is subtracted before the encoder; a pair that is off is
0 exactly (the paper's listing has sqrt(1e-5) there, which TopK may choose); encoder rows start at norm 1, as the
decoder's; the root's slope is bounded near 0 (`FLAT`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sae import sparse
from sae.base import SAE, ConfigError, Loss, State
from sae.decode import decode
from sae.dense import AT_ONCE, CACHED
from sae.ksparse import KSparseConfig, auxk, n_places
from sae.losses import fvu
from sae.parallel import ALONE, Mesh
from sae.select import topk, topk_dense

FLAT = 1e-3
"""Value of a pair's row below which the root's slope, which has no bound at 0, falls instead of rising."""


@dataclass(frozen=True, kw_only=True)
class KronConfig(KSparseConfig):
    m: int = 2
    """Rows on one side of each head."""
    n: int = 4
    """Rows on the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m < 1 or self.n < 1 or self.d_sae % (self.m * self.n):
            raise ConfigError(
                f"d_sae={self.d_sae} makes no whole heads of m={self.m} x n={self.n} latents: take a multiple of m n."
            )

    @property
    def n_heads(self) -> int:
        return self.d_sae // (self.m * self.n)


class KronSAE(SAE):
    architecture = "kron"
    by_latent = ("W_dec",)
    cfg: KronConfig

    def __init__(self, cfg: KronConfig, mesh: Mesh = ALONE) -> None:
        if mesh.n_latents > 1:
            raise ConfigError("kron cannot share its latents among processes: use --data-parallel N.")
        super().__init__(cfg, mesh)
        n_rows = cfg.n_heads * (cfg.m + cfg.n)
        self.W_enc = nn.Parameter(torch.zeros(n_rows, cfg.d_in).T)
        self.b_enc = nn.Parameter(torch.zeros(n_rows))

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return self._choose(*self._sides(x), self.cfg.k)

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        u, v = self._sides(x)
        with torch.autocast(x.device.type, enabled=False):
            _, indices = self._choose(u.detach(), v.detach(), state.k or self.cfg.k)
            values = self._pairs(u, v, indices)
            error = decode(values, indices, self.W_dec) + self.b_dec - target
            main, aux = fvu(error, target, self.mesh), error.new_zeros(())
            if state.dead is not None and self.cfg.auxk_weight:
                latents = state.dead.latents
                z = self._pairs(u, v, latents.expand(len(x), -1))
                all_of_them = torch.arange(len(latents), device=x.device)
                kept = topk_dense(z.detach(), min(n_places(self), len(latents)), False, all_of_them, state.dead.real)
                aux = auxk(self, error, (z * (kept > 0)) @ self.W_dec[latents], state.dead)
            l0 = self.mesh.mean_rows((values != 0).sum() / len(x))
        terms = {"fvu": main.detach(), "auxk": aux.detach(), "l0": l0}
        return Loss(main + self.cfg.auxk_weight * aux, terms, sparse.fired(values.detach(), indices, self.d_sae))

    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        """Random unit encoder rows; a latent's decoder row is the direction between its pair's."""
        super().initialise(x, seed)
        generator, (h, m, n) = torch.Generator().manual_seed(seed), (self.cfg.n_heads, self.cfg.m, self.cfg.n)
        with torch.no_grad():
            rows = nn.functional.normalize(torch.randn(h * (m + n), self.d_in, generator=generator), dim=1)
            self.W_enc.copy_(rows.T)
            P, Q = rows[: h * m].view(h, m, 1, -1), rows[h * m :].view(h, 1, n, -1)
            self.W_dec.copy_(nn.functional.normalize(P + Q, dim=3).flatten(0, 2))

    def _sides(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n hm"], Float[Tensor, "n hn"]]:
        """(u, v), of all heads one after the other."""
        both = nn.functional.linear(x - self.b_dec, self.W_enc.T, self.b_enc).relu().float()
        width = self.cfg.n_heads * self.cfg.m
        return both[:, :width], both[:, width:]

    def _choose(
        self, u: Float[Tensor, "n hm"], v: Float[Tensor, "n hn"], k: int
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """The k strongest pairs of each row. A root changes no order, so it is taken of the chosen alone."""
        h, parts = self.cfg.n_heads, []
        at_once = max((CACHED if u.device.type == "cpu" else AT_ONCE) // self.d_sae, 256)
        for some_u, some_v in zip(u.split(at_once), v.split(at_once), strict=True):
            products = some_u.unflatten(1, (h, -1, 1)) * some_v.unflatten(1, (h, 1, -1))
            parts.append(topk(products.flatten(1), k))
        values, indices = map(torch.cat, zip(*parts, strict=True))
        return values.sqrt(), indices

    def _pairs(
        self, u: Float[Tensor, "n hm"], v: Float[Tensor, "n hn"], latents: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n k"]:
        """The values of latents, with gradient to u and v."""
        m, n = self.cfg.m, self.cfg.n
        pairs: Tensor = _And.apply(u.gather(1, latents // n), v.gather(1, latents // (m * n) * n + latents % n))
        return pairs


class _And(torch.autograd.Function):
    """sqrt(u v) of u, v >= 0, with the slope sqrt(u v) / 2 max(u, FLAT) in u, and so in v."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        z = (u * v).sqrt()
        ctx.save_for_backward(u, v, z)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        u, v, z = ctx.saved_tensors
        half = grad * z / 2
        return half / u.clamp(min=FLAT), half / v.clamp(min=FLAT)
