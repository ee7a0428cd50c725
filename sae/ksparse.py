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
from sae.base import SAE, Dead, KConfig, Loss, State
from sae.dense import pieces, precision, product
from sae.losses import fvu, tilted
from sae.parallel import Selection
from sae.select import topk, topk_dense


@dataclass(frozen=True, kw_only=True)
class KSparseConfig(KConfig):
    auxk_weight: float = 1 / 32
    """Weight of the loss that revives dead latents; 0 turns it off."""


class Codes(NamedTuple):
    """What a batch is made of: chosen latents of each row, and dead ones that would have been next."""

    values: Float[Tensor, "n k"]
    indices: Int[Tensor, "n k"]
    dead_z: Float[Tensor, "rows m"] | None
    """Of the dead latents, dense; 0 where not chosen."""
    bags: "Bags | None" = None
    """Of codes in a flat table (k = 1), where rows have different numbers of chosen latents."""


class Bags(NamedTuple):
    """What the entries of a flat table stand for. The entries of a row lie in one or several bags, side by side; each
    bag is decoded by itself. Entries behind the last bag have value 0."""

    starts: Int[Tensor, " n_bags_and_1"]
    """Where in the table each bag starts; those of row r are bags r * n to (r + 1) * n of n bags a row."""
    bag: Int[Tensor, " entries"]
    """The bag of each entry."""
    row: Int[Tensor, " entries"]
    """The row of each entry."""


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
    select: Selection | None = None,
    weights: Float[Tensor, "_rows d_sae"] | None = None,
) -> Codes:
    """The k largest latents of each row of `centred` x (of a signed dictionary: by magnitude), and the k_aux largest
    among `dead`. made: the pre-activations, where they are there already. select: another choice of k. weights: above
    0, what latents are multiplied by for the choice alone, (1, d_sae) or a row each."""
    select = select or partial(topk, signed=sae.signed)
    parts, mesh, first = [], sae.mesh, 0
    for pre in [made] if made is not None else pieces(x, sae.encoder.T, sae.b_enc):
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
    """`loss_of` the k largest latents of each row. weights: as `choose`."""
    dead = state.dead if auxk_weight else None
    u = centred(sae, x)
    codes = choose(sae, u, state.k or k, dead, state.pre, weights=weights)
    return loss_of(sae, u, target, codes, dead, auxk_weight, rows=x)


def loss_of(
    sae: SAE,
    x: Float[Tensor, "n d_in"],
    target: Float[Tensor, "n d_out"],
    codes: Codes,
    dead: Dead | None,
    auxk_weight: float,
    tilt: float = 0.0,
    rows: Float[Tensor, "n d_in"] | None = None,
) -> Loss:
    """FVU of the batch + auxk_weight * AuxK, with gradient only where latents were chosen.

    x: `centred`. tilt: as in `sae.losses.tilted`; the FVU among the terms is without it. rows: as `reconstruct`.
    """
    with torch.autocast(x.device.type, enabled=False):
        x_hat, of_dead = reconstruct(sae, x, codes, dead, rows)
        error = x_hat - target
        main, aux = fvu(tilted(error, tilt, sae.mesh), target, sae.mesh), auxk(sae, error, of_dead, dead)
    plain = fvu(error.detach(), target, sae.mesh) if tilt else main.detach()
    terms = {"fvu": plain, "auxk": aux.detach(), "l0": l0_of(sae, codes, len(x))}
    return Loss(main + auxk_weight * aux, terms, sparse.fired(codes.values, codes.indices, sae.n_held))


def reconstruct(
    sae: SAE,
    x: Float[Tensor, "n d_in"],
    codes: Codes,
    dead: Dead | None,
    rows: Float[Tensor, "n d_in"] | None = None,
) -> tuple[Float[Tensor, "_bags d_out"], Float[Tensor, "n d_out"] | None]:
    """(x_hat, what the dead latents chosen for AuxK add up to), as `decode`. rows: x before it was `centred`, of a
    dictionary with an `offset` of it."""
    decoded, of_dead = decode(sae, x, codes, dead)
    return decoded + sae.offset(rows), of_dead


def decode(
    sae: SAE, x: Float[Tensor, "n d_in"], codes: Codes, dead: Dead | None = None
) -> tuple[Float[Tensor, "_bags d_out"], Float[Tensor, "n d_out"] | None]:
    """(z W_dec of each row, or of each bag; the same of the dead latents chosen for AuxK) from codes that were chosen
    without gradient.

    The gradient is that of codes which are x W_enc + b_enc at the chosen places and 0 elsewhere. x: `centred`; b_dec
    gets the gradient of a centre from here, unless x was made with a gradient of its own.
    """
    mesh = sae.mesh
    b_dec = mesh.into_latents(sae.b_dec) if sae.centres else None
    decoded, of_dead = _Reconstruct.apply(codes, dead, x, sae.W_enc, sae.b_enc, sae.W_dec, b_dec, sae.low, sae.signed)
    return mesh.sum_latents(decoded), None if of_dead is None else mesh.sum_latents(of_dead)


def l0_of(sae: SAE, codes: Codes, n: int) -> Float[Tensor, ""]:
    """Mean number of latents that are not 0 in the n rows here and those of the other processes."""
    return sae.mesh.mean_rows(sae.mesh.sum_latents((codes.values != 0).sum() / n))


def auxk(
    sae: SAE, error: Float[Tensor, "n d_out"], of_dead: Float[Tensor, "n d_out"] | None, dead: Dead | None
) -> Float[Tensor, ""]:
    """How badly dead latents reconstruct what the living ones left over, error = x_hat - target; 0 if none is dead.

    The k_aux strongest dead latents of each row (all that equal the last of them too) are decoded without b_dec; the
    squared error is relative to the variance of what was left over, and weighed by the share of the k_aux places that
    dead latents can fill. Their encoder rows get gradient too. A result that is not finite counts as 0.
    Source: Gao et al. 2024, arXiv:2406.04093, section 2.3 and A.2.
    """
    if dead is None or of_dead is None:
        return error.new_zeros(())
    left_over = error.detach()  # with the other sign: what is missing, e_hat should take away
    aux = torch.nan_to_num(fvu(left_over + of_dead, left_over, sae.mesh), nan=0.0, posinf=0.0)
    return aux * (dead.n / n_places(sae)).clamp(max=1.0)


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
        decoded = sparse.decode(codes.values, codes.indices, W, codes.bags and codes.bags.starts)
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
        (values, indices, z, bags), dead = ctx.codes, ctx.dead
        starts, bag_of, row_of = bags or (None, None, None)
        low = grad.to(W_dec.dtype)
        order, firsts = sparse.by_latent(indices, len(W_dec), values)
        grad_W_dec, _ = sparse.rows(values, order, firsts, low, bag_of)
        grad_values = sparse.dots(low, W_dec, indices, values, starts)
        grad_W_enc, grad_b_enc = sparse.rows(grad_values, order, firsts, x.to(W_dec.dtype), row_of)
        grad_x = None
        if ctx.needs_input_grad[2]:
            row_starts = None if starts is None else starts[:: (len(starts) - 1) // len(x)].contiguous()
            grad_x = sparse.decode(grad_values, indices, W_enc.T, row_starts)
        if dead is not None and grad_dead is not None:
            low = grad_dead.to(z.dtype)
            # In place of grad_z * (z != 0), in one pass.
            grad_z = torch.ops.aten.threshold_backward(
                product(low, W_dec[dead.latents]), z.abs() if ctx.signed else z, 0
            )
            grad_W_dec.index_add_(0, dead.latents, product(z.T, low.T, out=torch.float32))
            grad_W_enc.index_add_(0, dead.latents, product(grad_z.T, x.T, out=torch.float32))
            grad_b_enc.index_add_(0, dead.latents, grad_z.sum(dim=0, dtype=torch.float32))
            if grad_x is not None:
                grad_x += product(grad_z, W_enc[:, dead.latents])
        if grad_x is not None:
            return None, None, grad_x.to(x.dtype), grad_W_enc.T, grad_b_enc, grad_W_dec, None, None, None
        grad_b_dec = None
        if ctx.needs_input_grad[6]:  # as the centre of x alone
            grad_b_dec = -(W_enc @ grad_b_enc.to(W_enc.dtype)).float()
        return None, None, None, grad_W_enc.T, grad_b_enc, grad_W_dec, grad_b_dec, None, None
