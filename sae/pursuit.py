"""Sparse codes of rows over a fixed dictionary, found greedily: what matching pursuit SAEs and ITDA encode with, and an
encoder for any other dictionary whose decoder is kept.

    matching     r <- r - (r . w) w for the row w of W that fits the residual r best, k times
    orthogonal   after each pick, all coefficients anew by least squares
    gradient     after each pick, one exact line search along the gradient on the support, and a ReLU

W (d_sae, d) has rows of norm 1, and b_dec was taken out of x (n, d). No gradient passes but through `Matching`.
Source: Mallat and Zhang 1993 (matching), Pati et al. 1993 (orthogonal), Blumensath and Davies 2008 (gradient).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae import sparse
from sae.dense import AT_ONCE, product

ROWS = 256
"""Rows whose products with W a CPU makes at a time: it finds them in its cache at the next pick."""
CHOSEN = 1 << 24
"""Numbers of chosen rows of W (rows, k, d) that are held at a time."""
NOTHING = 1e-6
"""Norm of a residual, in units of its row's, at which least squares has nothing left to fit."""


class Codes(NamedTuple):
    values: Float[Tensor, "n k"]
    indices: Int[Tensor, "n k"]
    """In the order of the picks; `merged` gives a latent that was picked twice one place."""
    residual: Float[Tensor, "n d"]
    """What the codes leave of x."""


@torch.no_grad()
def matching(
    x: Float[Tensor, "n d"],
    W: Float[Tensor, "d_sae d"],
    k: int,
    *,
    signed: bool = False,
    threshold: float = 0.0,
    once: bool = False,
    low: Float[Tensor, "d_sae d"] | None = None,
) -> Codes:
    """Matching pursuit in k steps, of which fewer are a prefix.

    A row stops when a step left it a residual of norm below `threshold`, when no latent fits with a positive
    coefficient (signed: with either sign), and, with `once`, when it picked a latent again. low: W in the precision
    that latents are chosen in; coefficients are always of W.
    """
    # Products of the residual with W follow from the last ones by W W^T: that pays where it is small beside the batch.
    gram = product(W, W) if low is None and 4 * len(W) <= len(x) * k and len(W) ** 2 <= AT_ONCE else None
    chooser, parts = W if low is None else low, []
    for r in x.split(ROWS if x.device.type == "cpu" else max(AT_ONCE // len(W), ROWS)):
        values, indices = r.new_zeros(len(r), k), torch.zeros(len(r), k, dtype=torch.long, device=r.device)
        going = torch.ones(len(r), dtype=torch.bool, device=r.device)
        fit = product(r.to(chooser.dtype), chooser)
        for t in range(k):
            i = (fit.abs() if signed else fit).argmax(dim=1)
            w = W[i]
            a = (r * w).sum(dim=1) * going
            a = a if signed else a.relu()
            if once:
                going = going & ~((indices[:, :t] == i[:, None]) & (values[:, :t] != 0)).any(dim=1)
            values[:, t], indices[:, t] = a, i
            r = torch.addcmul(r, a[:, None], w, value=-1)
            if threshold > 0:
                going = going & (r.norm(dim=1) >= threshold)
            if gram is not None:
                fit.addcmul_(gram.index_select(0, i), a[:, None], value=-1)
            elif t + 1 < k:
                fit = product(r.to(chooser.dtype), chooser)
        parts.append(Codes(values, indices, r))
    return Codes(*map(torch.cat, zip(*parts, strict=True)))


class Matching(torch.autograd.Function):
    """(residual, values, indices) of codes that `matching` found; the residual's gradient goes to x and W, through all
    steps, with the picks as they are.

    With g the gradient of r_t and a = r_{t-1} . w: that of r_{t-1} is g - (g . w) w, that of w -a g - (g . w) r_{t-1}
    (where a is 0, g and nothing). Residuals are made again from the last one, so only that is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, codes: Codes) -> Tensor:
        del x  # here for its gradient
        ctx.save_for_backward(W, *codes)
        return codes.residual.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        W, values, indices, r = ctx.saved_tensors
        n, k = values.shape
        grads = r.new_empty(n, k, r.shape[1])
        for t in reversed(range(k)):
            a, w = values[:, t, None], W[indices[:, t]]
            along = (g * w).sum(dim=1, keepdim=True) * (a != 0)
            r = torch.addcmul(r, a, w)
            torch.addcmul(a * -g, along, r, value=-1, out=grads[:, t])
            g = torch.addcmul(g, along, w, value=-1)
        picks, ones = indices.view(-1, 1), values.new_ones(n * k, 1)
        order, starts = sparse.by_latent(picks, len(W), ones)
        return g, sparse.rows(ones, order, starts, grads.view(n * k, -1))[0], None


def merged(values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]) -> tuple[Tensor, Tensor]:
    """The same codes, indices ascending, in which a latent that has several places has all its value in the first."""
    indices, order = indices.sort(dim=1)
    first = torch.ones_like(indices, dtype=torch.bool)
    first[:, 1:] = indices[:, 1:] != indices[:, :-1]
    place = (first * torch.arange(indices.shape[1], device=indices.device)).cummax(dim=1).values
    return torch.zeros_like(values).scatter_add_(1, place, values.gather(1, order)), indices


@torch.no_grad()
def orthogonal(x: Float[Tensor, "n d"], W: Float[Tensor, "d_sae d"], k: int) -> Codes:
    """Orthogonal matching pursuit in k steps, of either sign. A row stops where nothing is left of it (`NOTHING`).

    k at most min(d, d_sae), and no more picks than directions that W has.
    """
    parts = []
    for rows in x.split(max(CHOSEN // (k * x.shape[1]), 1)):
        n, r, least = len(rows), rows, NOTHING * rows.norm(dim=1)
        indices = torch.zeros(n, k, dtype=torch.long, device=x.device)
        # Unused places keep the identity here and 0 there, so that their coefficients are 0.
        gram, against = torch.eye(k, device=x.device).repeat(n, 1, 1), x.new_zeros(n, k, 1)
        S, values = x.new_zeros(n, k, x.shape[1]), x.new_zeros(n, k)
        taken = torch.zeros(n, len(W), dtype=torch.bool, device=x.device)
        for t in range(k):
            going = (r.norm(dim=1) > least)[:, None]
            i = product(r, W).abs().masked_fill_(taken, -1.0).argmax(dim=1, keepdim=True)
            taken.scatter_(1, i, True)
            w = W[i.squeeze(1)] * going
            indices[:, t : t + 1] = i
            gram[:, t, :t] = gram[:, :t, t] = (S[:, :t] @ w[:, :, None]).squeeze(2)
            S[:, t], against[:, t, 0] = w, (rows * w).sum(dim=1)
            factor = torch.linalg.cholesky_ex(gram[:, : t + 1, : t + 1]).L
            values[:, : t + 1] = torch.cholesky_solve(against[:, : t + 1], factor).squeeze(2)
            r = rows - (values[:, None] @ S).squeeze(1)
        parts.append(Codes(values, indices, r))
    return Codes(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def gradient(x: Float[Tensor, "n d"], W: Float[Tensor, "d_sae d"], k: int) -> Codes:
    """Gradient pursuit in k steps: non-negative codes near those of orthogonal matching pursuit, without its solves.

    Each step adds the latent that fits best to the support, moves all coefficients along their gradient by the step
    that lessens the squared error most, and sets negative ones to 0. A row stops where no latent fits.
    """
    parts = []
    for rows in x.split(max(CHOSEN // (k * x.shape[1]), 1)):
        n, r = len(rows), rows
        values, S = x.new_zeros(n, k), x.new_zeros(n, k, x.shape[1])
        indices = torch.zeros(n, k, dtype=torch.long, device=x.device)
        for t in range(k):
            best, i = product(r, W).max(dim=1)
            new = (best > 0) & ~(indices[:, :t] == i[:, None]).any(dim=1)  # else its place stays empty
            indices[:, t], S[:, t] = i, W[i] * new[:, None]
            slope = (S @ r[:, :, None]).squeeze(2)
            change = (slope[:, None] @ S).squeeze(1)
            step = (change * r).sum(dim=1) / change.square().sum(dim=1).clamp(min=1e-30)
            values = torch.addcmul(values, slope, step[:, None]).relu_()
            r = rows - (values[:, None] @ S).squeeze(1)
        parts.append(Codes(values, indices, r))
    return Codes(*map(torch.cat, zip(*parts, strict=True)))
