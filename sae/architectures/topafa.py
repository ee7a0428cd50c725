"""Top-AFA: each row keeps as many of its largest latents as its norm asks for.

    a = ReLU((x - b_dec) W_enc + b_enc)        x_hat = z W_dec + b_dec
    z keeps the k(x) largest of a, k(x) = argmin over 1 <= j <= k of | |the j largest of a| - |x - b_dec| |

If the chosen decoder rows are nearly orthogonal, |z| = |x_hat - b_dec|, so the norm of x says when to stop: nothing has
to be tuned, and rows that need more latents have them. `k` is no target, only the most that a row may have, which
bounds memory and time: give several times the L0 that is expected, and see that `at_cap`, the share of rows that use
all, is small.
Loss: FVU of the batch + 1/32 AuxK + afa_weight * sum (|z| - |x - b_dec|)^2 / sum |x - b_dec|^2.
Source: arXiv:2503.24277. Differs: a cap; decoder rows have norm 1, so values need not be weighed by it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae import ksparse, sparse
from sae.base import SAE, ConfigError, Dead, Loss, State
from sae.ksparse import Codes, KSparseConfig
from sae.nested import ranked


@dataclass(frozen=True, kw_only=True)
class TopAFAConfig(KSparseConfig):
    """As TopK's, but k is the most latents that a token may have."""

    afa_weight: float = 1 / 32
    """Weight of the loss that brings the norm of z to that of x; 0 turns it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.afa_weight < 0:
            raise ConfigError(f"afa_weight={self.afa_weight} is out of range: expected 0 (off) or more.")


class TopAFASAE(SAE):
    architecture = "topafa"
    cfg: TopAFAConfig

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        codes = _choose(self, x, self.cfg.k, None, None)
        return codes.values, codes.indices

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        dead, mesh = state.dead if self.cfg.auxk_weight else None, self.mesh
        codes = _choose(self, x, state.k or self.cfg.k, dead, state.pre)
        centred = ksparse.centred(self, x)
        made = ksparse.loss_of(self, centred, target, codes, dead, self.cfg.auxk_weight)
        with torch.autocast(x.device.type, enabled=False):
            squares = _Squares.apply(codes, centred, self.W_enc, self.b_enc, mesh.into_latents(self.b_dec), self.low)
            # A row without latents has no direction to grow in.
            z_norm, x_norm = mesh.sum_latents(squares).clamp(min=1e-12).sqrt(), (x - self.b_dec).norm(dim=1)
            off = mesh.sum_rows((z_norm - x_norm).square().sum()) / mesh.sum_rows(x_norm.detach().square().sum())
            at_cap = mesh.mean_rows((mesh.sum_latents(codes.values)[:, -1] > 0).float().mean())
        terms = made.terms | {"afa": off.detach(), "at_cap": at_cap}
        return made._replace(total=made.total + self.cfg.afa_weight * off, terms=terms)


@torch.no_grad()
def _choose(
    sae: SAE, x: Float[Tensor, "n d_in"], cap: int, dead: Dead | None, made: Float[Tensor, "n d_sae"] | None
) -> Codes:
    """The latents of each row, the largest first."""
    codes = ksparse.choose(sae, ksparse.centred(sae, x), cap, dead, made, partial(ranked, signed=False))
    norms = sae.mesh.sum_latents(codes.values.square()).cumsum(dim=1).sqrt()
    last = (norms - (x - sae.b_dec).float().norm(dim=1, keepdim=True)).abs().argmin(dim=1, keepdim=True)
    keep = torch.arange(cap, device=x.device) <= last
    return codes._replace(values=codes.values * keep)


class _Squares(torch.autograd.Function):
    """|z|^2 of each row, of the latents held here; the gradient is that of the chosen entries of x W_enc + b_enc."""

    @staticmethod
    def forward(
        ctx: Any, codes: Codes, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, low: dict[str, Tensor]
    ) -> Tensor:
        del b_enc, b_dec  # here for their gradients
        ctx.save_for_backward(x, low.get("W_enc", W_enc))
        ctx.codes = codes
        return codes.values.square().sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc = ctx.saved_tensors
        values, indices = ctx.codes.values, ctx.codes.indices
        order, starts = sparse.by_latent(indices, W_enc.shape[1], values)
        grad_W_enc, grad_b_enc = sparse.rows(2 * grad[:, None] * values, order, starts, x.to(W_enc.dtype))
        grad_b_dec = -(W_enc @ grad_b_enc.to(W_enc.dtype)).float()  # as the centre of x
        return None, None, grad_W_enc.T, grad_b_enc, grad_b_dec, None
