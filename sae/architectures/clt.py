"""Cross-layer transcoder: the latents of each layer read its MLP's input and write to its and all later MLPs' outputs.

    z_l = TopK(ReLU(x_l W_enc_l + b_enc_l)), k over all layers together
    y_hat_m = sum_{l <= m} z_l W_dec_{l,m} + b_m

x and y are the rows of all layers side by side, and d_sae the latents of all, those of layer l at l d_sae / L. W_enc is
(d_in / L, d_sae); of W_dec (d_sae, d_out) the blocks of earlier layers stay 0. Loss: FVU of y + 1/32 AuxK.
Source: Ameisen et al. 2025, "Circuit Tracing", section "Architecture".
Differs: TopK in place of JumpReLU and a tanh penalty; products are dense.
"""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from sae import columns
from sae.base import SAE, ConfigError, Loss, State
from sae.ksparse import KSparseConfig, n_places
from sae.losses import fvu
from sae.parallel import ALONE, Mesh
from sae.select import topk, topk_dense
from sae.sparse import to_dense


@dataclass(frozen=True, kw_only=True)
class CLTConfig(KSparseConfig):
    layers: int
    d_out: int
    """Of all layers together, as d_in."""
    scales: tuple[float, ...] = ()
    """What each layer's output was multiplied by in training, where latents were chosen; () for 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1 or any(size < 1 or size % self.layers for size in (self.d_in, self.d_out, self.d_sae)):
            raise ConfigError(
                f"d_in={self.d_in}, d_out={self.d_out}, d_sae={self.d_sae}: expected multiples of layers={self.layers}."
            )


class CLT(SAE):
    architecture = "clt"
    joint = True
    target = "hook"
    centres = False
    cfg: CLTConfig

    def __init__(self, cfg: CLTConfig, mesh: Mesh = ALONE) -> None:
        if mesh.n_latents > 1:
            raise ConfigError("clt cannot share its latents among processes: use --data-parallel N.")
        super().__init__(cfg, mesh)
        self.W_enc = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in // cfg.layers).T)

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        if not self.cfg.scales:  # decoder rows have norm 1
            return topk(self._pre(x), self.cfg.k)
        norms = columns.norms_at_hooks(self.W_dec, (self.d_out // self.cfg.layers,) * self.cfg.layers)
        size = (norms * norms.new_tensor(self.cfg.scales)).norm(dim=1)  # as rows were scaled in training
        values, indices = topk(self._pre(x) * size, self.cfg.k)
        return values / size[indices], indices

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        pre = self._pre(x)
        values, indices = topk(pre.detach(), state.k or self.cfg.k)
        chosen = to_dense((values != 0).float(), indices, self.d_sae)
        error = self._decode(pre * chosen) + self.b_dec - target
        main = fvu(error, target, self.mesh)
        aux, dead = error.new_zeros(()), state.dead
        if dead is not None and self.cfg.auxk_weight:
            places = min(n_places(self), len(dead.latents))
            on = topk_dense(pre.detach(), places, False, dead.latents, dead.real) != 0
            z = torch.zeros_like(pre).index_add(1, dead.latents, pre.index_select(1, dead.latents) * on)
            left_over = error.detach()
            aux = torch.nan_to_num(fvu(left_over + self._decode(z), left_over, self.mesh), nan=0.0, posinf=0.0)
            aux = aux * (dead.n / n_places(self)).clamp(max=1.0)
        terms = {"fvu": main.detach(), "auxk": aux.detach(), "l0": self.mesh.mean_rows(chosen.sum(dim=1).mean())}
        return Loss(main + self.cfg.auxk_weight * aux, terms, chosen.any(dim=0))

    def _pre(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        pairs = zip(x.chunk(self.cfg.layers, dim=1), self.W_enc.chunk(self.cfg.layers, dim=1), strict=True)
        return torch.cat([rows @ W for rows, W in pairs], dim=1).float() + self.b_enc

    def _decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_out"]:
        """Each layer's output from the latents up to it; the other blocks of W_dec get no gradient."""
        latents, out = self.d_sae // self.cfg.layers, self.d_out // self.cfg.layers
        parts = []
        for layer in range(self.cfg.layers):
            n = (layer + 1) * latents
            parts.append(z[:, :n] @ self.W_dec[:n, layer * out : (layer + 1) * out])
        return torch.cat(parts, dim=1).float()

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        self.draw_encoder(seed)
        self.b_enc.copy_(-self._pre(x.mean(dim=0, keepdim=True))[0])

    @torch.no_grad()
    def initialise_output(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"]) -> None:
        """As `sae.columns.start_decoder`, at the layers that a latent writes to."""
        mean = target.mean(dim=0)
        self.W_dec.copy_(torch.relu(self._pre(x)).T @ (target - mean))
        latents, out = self.d_sae // self.cfg.layers, self.d_out // self.cfg.layers
        for layer in range(1, self.cfg.layers):
            self.W_dec[layer * latents : (layer + 1) * latents, : layer * out] = 0
        self.W_dec.copy_(normalize(self.W_dec, dim=1))
        self.b_dec.copy_(mean)

    @torch.no_grad()
    def unscale_columns(self, reads: Float[Tensor, " d_in"], writes: Float[Tensor, " d_out"]) -> None:
        layers = self.cfg.layers
        for scales, W in zip(reads.chunk(layers), self.W_enc.chunk(layers, dim=1), strict=True):
            W.mul_(scales[:, None])
        columns.unscale_columns(self, torch.ones_like(reads[: len(self.W_enc)]), writes)
        self.cfg = dataclasses.replace(self.cfg, scales=tuple(float(part[0]) for part in writes.chunk(layers)))
