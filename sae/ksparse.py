"""What TopK and AbsTopK share: k latents a row, chosen without gradient, trained through the sparse form.

Only the encoder's product is dense. Decoding, and both weight gradients, touch the k chosen latents of each row; what
revives dead latents (AuxK) touches the dead ones.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae import sparse
from sae.base import SAE, Config, ConfigError, Dead, Loss, State
from sae.dense import pieces, precision, product
from sae.losses import fvu
from sae.select import topk, topk_dense


@dataclass(frozen=True, kw_only=True)
class KSparseConfig(Config):
    k: int
    """Active latents for each token."""
    auxk_weight: float = 1 / 32
    """Weight of the loss that revives dead latents; 0 turns it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(
                f"k={self.k} is out of range: expected 0 < k <= d_sae={self.d_sae}. Lower k or raise d_sae."
            )


class Codes(NamedTuple):
    """What a batch is made of: chosen latents of each row, and dead ones that would have been next."""

    values: Float[Tensor, "n k"]
    indices: Int[Tensor, "n k"]
    dead_z: Float[Tensor, "n m"] | None
    """Of the dead latents, dense; 0 where not chosen."""


def encode(
    sae: SAE, x: Float[Tensor, "n d_in"], k: int, weights: Float[Tensor, "_rows d_sae"] | None = None
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k latents of each row. No gradient. weights: as `choose`."""
    codes = choose(sae, centred(sae, x), k, None, weights=weights)
    return codes.values, codes.indices


@torch.no_grad()
def centred(sae: SAE, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    """x - b_dec (x itself, of a dictionary that does not centre it), in the precision of the wide products."""
    if not sae.centres:
        return x.to(precision(x))
    return torch.sub(x, sae.b_dec, out=torch.empty_like(x, dtype=precision(x)))


@torch.no_grad()
def choose(
    sae: SAE,
    x: Float[Tensor, "n d_in"],
    k: int,
    dead: Dead | None,
    made: Float[Tensor, "n d_sae"] | None = None,
    weights: Float[Tensor, "_rows d_sae"] | None = None,
) -> Codes:
    """The k largest latents of each row of `centred` x (of a signed dictionary: by magnitude), and the k_aux largest
    among `dead`. made: the pre-activations, where they are there already. weights: above 0, what latents are multiplied
    by for the choice alone, (1, d_sae) or a row each."""
    parts, select, mesh, first = [], partial(topk, signed=sae.signed), sae.mesh, 0
    for pre in [made] if made is not None else pieces(x, sae.low.get("W_enc", sae.W_enc).T, sae.b_enc):
        if weights is not None:
            pre = pre * (weights if len(weights) == 1 else weights[first : first + len(pre)])
            first += len(pre)
        dead_z = None
        if dead is not None:
            dead_z = topk_dense(pre, min(n_places(sae), len(dead.latents)), sae.signed, dead.latents, dead.real)
        parts.append(Codes(*select(pre, k), dead_z))
    values, indices = _joined([part.values for part in parts]), _joined([part.indices for part in parts])
    # One exchange for the whole batch: processes wait for each other at each.
    values, indices = mesh.winners(select, values, indices, sae.n_held)
    dead_zs = [part.dead_z for part in parts if part.dead_z is not None]
    dead_z = mesh.among_all(_joined(dead_zs), n_places(sae)) if dead_zs else None
    if weights is not None:
        weights = weights.expand(len(x), -1)
        values = values / weights.gather(1, indices)
        if dead is not None and dead_z is not None:
            dead_z = dead_z / weights.index_select(1, dead.latents)
    return Codes(values, indices, dead_z)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def n_places(sae: SAE) -> int:
    """Dead latents a row that AuxK decodes: a power of two near d_in / 2."""
    return 1 << round(math.log2(max(sae.d_in / 2, 1)))


def loss(
    sae: SAE,
    x: Float[Tensor, "n d_in"],
    target: Float[Tensor, "n d_out"],
    state: State,
    k: int,
    auxk_weight: float,
    weights: Float[Tensor, "_rows d_sae"] | None = None,
) -> Loss:
    """FVU of the batch + auxk_weight * AuxK, with gradient only where latents were chosen. weights: as `choose`.

    AuxK: dead latents learn to reconstruct what the living ones left over. The k_aux strongest dead latents of each row
    (all that equal the last of them too) are decoded without b_dec; the squared error is relative to the variance of
    what was left over, and weighed by the share of the k_aux places that dead latents can fill. Their encoder rows get
    gradient too. A result that is not finite counts as 0.
    Source: Gao et al. 2024, arXiv:2406.04093, section 2.3 and A.2.
    """
    dead = state.dead if auxk_weight else None
    rows, x, mesh = x, centred(sae, x), sae.mesh
    codes = choose(sae, x, state.k or k, dead, state.pre, weights)
    b_dec = mesh.into_latents(sae.b_dec) if sae.centres else None
    with torch.autocast(x.device.type, enabled=False):
        decoded, of_dead = _Reconstruct.apply(
            codes, dead, x, sae.W_enc, sae.b_enc, sae.W_dec, b_dec, sae.low, sae.signed
        )
        error = mesh.sum_latents(decoded) + sae.offset(rows) - target
        main = fvu(error, target, mesh)
        aux = error.new_zeros(())
        if dead is not None:
            left_over = error.detach()  # with the other sign: what is missing, e_hat should take away
            aux = torch.nan_to_num(fvu(left_over + mesh.sum_latents(of_dead), left_over, mesh), nan=0.0, posinf=0.0)
            aux = aux * (dead.n / n_places(sae)).clamp(max=1.0)
        l0 = mesh.mean_rows(mesh.sum_latents((codes.values != 0).sum() / len(x)))
    terms = {"fvu": main.detach(), "auxk": aux.detach(), "l0": l0}
    return Loss(main + auxk_weight * aux, terms, sparse.fired(codes.values, codes.indices, sae.n_held))


class _Reconstruct(torch.autograd.Function):
    """The batch from its chosen latents, without its offset, and what dead ones add (None without): the latents' part.

    The dense product was made without gradient; chosen entries get the gradient that they would have had, entries that
    are 0 (a ReLU's) get none. Products are in the precision of `low`, the copies of the wide matrices.
    """

    @staticmethod
    def forward(
        ctx: Any,
        codes: Codes,
        dead: Dead | None,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        low: dict[str, Tensor],
        signed: bool,
    ) -> tuple[Tensor, Tensor | None]:
        del b_enc, b_dec  # here for their gradients
        W = low.get("W_dec", W_dec)
        decoded = sparse.decode(codes.values, codes.indices, W)
        of_dead = None
        if dead is not None and codes.dead_z is not None:
            of_dead = product(codes.dead_z, W[dead.latents].T)
        ctx.save_for_backward(x, low.get("W_enc", W_enc), W)
        ctx.codes, ctx.dead, ctx.signed = codes, dead, signed
        return decoded, of_dead

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_dead: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W_enc, W_dec = ctx.saved_tensors
        (values, indices, z), dead = ctx.codes, ctx.dead
        low = grad.to(W_dec.dtype)
        order, starts = sparse.by_latent(indices, len(W_dec), values)
        grad_W_dec, _ = sparse.rows(values, order, starts, low)
        grad_values = sparse.dots(low, W_dec, indices, values)
        grad_W_enc, grad_b_enc = sparse.rows(grad_values, order, starts, x.to(W_dec.dtype))
        if dead is not None and grad_dead is not None:
            low = grad_dead.to(z.dtype)
            # In place of grad_z * (z != 0), in one pass.
            grad_z = torch.ops.aten.threshold_backward(
                product(low, W_dec[dead.latents]), z.abs() if ctx.signed else z, 0
            )
            grad_W_dec.index_add_(0, dead.latents, product(z.T, low.T, out=torch.float32))
            grad_W_enc.index_add_(0, dead.latents, product(grad_z.T, x.T, out=torch.float32))
            grad_b_enc.index_add_(0, dead.latents, grad_z.sum(dim=0, dtype=torch.float32))
        grad_b_dec = None
        if ctx.needs_input_grad[6]:  # as the centre of x alone
            grad_b_dec = -(W_enc @ grad_b_enc.to(W_enc.dtype)).float()
        return None, None, None, grad_W_enc.T, grad_b_enc, grad_W_dec, grad_b_dec, None, None
