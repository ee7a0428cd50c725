"""Pre-activations with gradient, for latents that are on where a pre-activation passes a floor of their own.

Between encoder and decoder such an architecture only does things entry by entry, and writes them once, for two forms:
all entries, a matrix, as a GPU has them; or on a CPU, while they are few, those alone that are above the floor. Entries
below it must be 0 in z, and get no gradient.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae.base import INITIAL_ROWS, SAE
from sae.dense import product
from sae.select import above
from sae.sparse import Ragged, dots_at, encoder_gradients, row_sums, transposed

FEW, LOOK = 1 / 4, 64
"""Share of the entries up to which a CPU is faster with those alone, and rows from which it tells that share."""

SPARSE_ON = ("cpu",)
"""Devices that work on the entries above the floor alone."""


class Entries(NamedTuple):
    """Pre-activations of n rows, and where they are: values is (n, d_sae), or has the entries alone."""

    values: Float[Tensor, "..."]
    sparse: bool
    columns: Int[Tensor, " _entries"]
    starts: Int[Tensor, " _n_and_1"]
    """As `Ragged`'s; empty where all entries are there."""

    def at(self, per_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " _at"]:
        """What each entry's latent has, in a form that goes with `values`."""
        return per_latent.index_select(0, self.columns) if self.sparse else per_latent

    def decode(self, z: Float[Tensor, "..."], sae: SAE, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "_n d_in"]:
        """z W_dec in float32, for z at these entries. W_dec: the dictionary's own, or that without gradient."""
        if self.sparse:
            return _SparseDecode.apply(z, self.columns, self.starts, W_dec)
        return _DenseDecode.apply(z.to(self.values.dtype), W_dec, sae.low.get("W_dec", W_dec))

    def fired(self, z: Float[Tensor, "..."], n_latents: int) -> Bool[Tensor, " _held"]:
        """Latents for which z is not 0 in some row."""
        if self.sparse:
            return torch.bincount(self.columns.masked_select(z != 0), minlength=n_latents) > 0
        return (z != 0).any(dim=0)


def encode(
    sae: SAE,
    x: Float[Tensor, "n d_in"],
    bias: Float[Tensor, " d_sae"],
    floor: Float[Tensor, " d_sae"] | float = 0.0,
) -> Entries:
    """x W_enc + bias, of x from `sae.ksparse.centred`, with gradient to W_enc (tied: W_dec), bias and b_dec."""
    centre = sae.mesh.into_latents(sae.b_dec)
    W_enc, low = (sae.W_dec.T, sae.encoder) if sae.tied else (sae.W_enc, sae.low.get("W_enc", sae.W_enc))
    if x.device.type in SPARSE_ON and _are_few(x, W_enc, bias, floor):
        values, columns, starts = _SparseEncode.apply(x, W_enc, bias, centre, floor)
        return Entries(values, True, columns, starts)
    nowhere = torch.empty(0, dtype=torch.long, device=x.device)
    values = _DenseEncode.apply(x, W_enc, bias, centre, low, sae.encoder)
    return Entries(values, False, nowhere, nowhere)


@torch.no_grad()
def _are_few(x: Tensor, W_enc: Tensor, bias: Tensor, floor: Tensor | float) -> bool:
    """Whether few entries are above the floor, by the first rows: the same of the same batch, killed and resumed."""
    return bool((product(x[:LOOK], W_enc.T, bias) > floor).float().mean() <= FEW)


@torch.no_grad()
def quantile(W: Float[Tensor, "m d_in"], x: Float[Tensor, "n d_in"], share: float) -> Float[Tensor, " m"]:
    """For each row of W the value that x . W is above in this share of the rows of x; at least 0."""
    rank = max(round((1 - share) * len(x)), 1)
    few = W.split(INITIAL_ROWS)
    return torch.cat([product(x, rows).float().kthvalue(rank, dim=0).values for rows in few]).clamp(min=0.0)


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, bias: Tensor, b_dec: Tensor, floor: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor]:
        del b_dec  # here for its gradient, as the centre of x
        values, columns, starts = above(x, W_enc, bias, floor)
        ctx.save_for_backward(x, W_enc, columns, starts)
        ctx.mark_non_differentiable(columns, starts)
        return values, columns, starts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, columns, starts = ctx.saved_tensors
        return None, *encoder_gradients(Ragged(grad, columns, starts), x.float(), W_enc), None


class _DenseEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, bias: Tensor, b_dec: Tensor, low: Tensor, encoder: Tensor
    ) -> Tensor:
        del W_enc, b_dec  # here for their gradients
        ctx.save_for_backward(x, low)
        return product(x, encoder.T, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        grad_bias = grad.sum(dim=0, dtype=torch.float32)
        grad_b_dec = -(W @ grad_bias.to(W.dtype)).float()
        return None, product(grad.T, x.T, out=torch.float32).T, grad_bias, grad_b_dec, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, columns: Tensor, starts: Tensor, W_dec: Tensor) -> Tensor:
        kept = _kept(Ragged(z, columns, starts), z != 0)
        ctx.save_for_backward(z, columns, starts, W_dec, *kept)
        return row_sums(kept, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *places, W_dec, values, columns, starts = ctx.saved_tensors
        grad, grad_W_dec = grad.contiguous(), None
        if ctx.needs_input_grad[3]:
            grad_W_dec = row_sums(transposed(Ragged(values, columns, starts), len(W_dec)), grad)
        return dots_at(grad, W_dec, Ragged(*places)), None, None, grad_W_dec


class _DenseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, W_dec: Tensor, low: Tensor) -> Tensor:
        del W_dec  # here for its gradient
        W = low.to(z.dtype)
        ctx.save_for_backward(z, W)
        return product(z, W.T).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (z, W), low = ctx.saved_tensors, grad.to(ctx.saved_tensors[0].dtype)
        grad_W_dec = product(z.T, low.T, out=torch.float32) if ctx.needs_input_grad[1] else None
        return product(low, W), grad_W_dec, None


def _kept(entries: Ragged, keep: Tensor) -> Ragged:
    """Those entries alone for which `keep`."""
    before = torch.zeros(len(keep) + 1, dtype=torch.long, device=keep.device)
    torch.cumsum(keep, 0, out=before[1:])
    return Ragged(entries.values.masked_select(keep), entries.columns.masked_select(keep), before[entries.starts])
