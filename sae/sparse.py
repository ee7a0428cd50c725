"""Sparse codes: (values, indices) of a few latents a row, and the three products of training that touch only those.

With k of d_sae latents active, decoding and both weight gradients cost k / d_sae of their dense form; only the
encoder's forward product stays dense. Decoding sums a few rows of W_dec for each row of the batch; a weight gradient
sums a few rows of the batch for each latent, once the entries are sorted by latent. Both are the same sum, `row_sums`.
Names: n rows, k places a row. An unused place holds value 0 and any index. `Ragged` codes have no unused places; what
the products call a flat table is the same in their form: one place a row, and `starts` of the rows that are meant.
"""

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from sae import kernels

# Torch says once a process that sparse CSR tensors are in beta; what we use of them is tested against the dense form.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")


class Ragged(NamedTuple):
    """Entries of a sparse matrix (n, columns), row after row: those of row r lie at starts[r] to starts[r + 1]."""

    values: Float[Tensor, " entries"]
    columns: Int[Tensor, " entries"]
    starts: Int[Tensor, " n_and_1"]


def to_dense(values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], d_sae: int) -> Float[Tensor, "n d_sae"]:
    """The dense form of sparse codes."""
    return values.new_zeros(values.shape[0], d_sae).scatter_add(1, indices, values)


def to_sparse(z: Float[Tensor, "n d_sae"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The sparse form of dense codes, indices ascending; k is the largest L0 of the rows, at least 1."""
    places = nonzero(z != 0)
    return to_table(at_places(places, z.flatten()[places], z.shape), z.shape[1])


def fired(values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], d_sae: int) -> Bool[Tensor, " d_sae"]:
    """Latents with a value other than 0 anywhere in the batch."""
    count = torch.zeros(d_sae, device=values.device)
    return count.index_add_(0, indices.flatten(), (values != 0).flatten().to(count.dtype)) > 0


def decode(
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
    W: Float[Tensor, "d_sae d"],
    starts: Int[Tensor, " _rows_and_1"] | None = None,
) -> Float[Tensor, "_rows d"]:
    """sum_j values[:, j] * W[indices[:, j]], in float32. No gradient.

    starts: of a flat table (k = 1), whose entries starts[r] to starts[r + 1] are those of row r.
    """
    if kernels.available(W):
        from sae.kernels import codes

        return codes.decode(values, indices, W, starts)
    return row_sums(ragged(values, indices, starts), W)


def dots(
    g: Float[Tensor, "_rows d"],
    W: Float[Tensor, "d_sae d"],
    indices: Int[Tensor, "n k"],
    values: Float[Tensor, "n k"],
    starts: Int[Tensor, " _rows_and_1"] | None = None,
) -> Float[Tensor, "n k"]:
    """g[row] . W[index] for each place, 0 where `values` is 0, without the dense product. starts: as in `decode`."""
    if kernels.available(W):
        from sae.kernels import codes

        return codes.dots(g, W, indices, values, starts)
    return dots_at(g, W, ragged(values, indices, starts)).view(values.shape) * (values != 0)


def by_latent(
    indices: Int[Tensor, "n k"], d_sae: int, values: Float[Tensor, "n k"]
) -> tuple[Int[Tensor, " n_times_k"], Int[Tensor, " d_sae_plus_1"]]:
    """(order, starts): entries order[starts[i] : starts[i + 1]] of the flat codes are those of latent i, ascending.

    Entries of value 0 may be anywhere: they add nothing.
    """
    if kernels.available(indices):
        from sae.kernels import codes

        return codes.by_latent(indices, d_sae, values)
    # Half the bytes to sort: torch sorts integers digit by digit.
    latents, order = indices.flatten().int().sort(stable=True)
    return order, starts_of(latents, d_sae)


def rows(
    coefficients: Float[Tensor, "n k"],
    order: Int[Tensor, " n_times_k"],
    starts: Int[Tensor, " d_sae_plus_1"],
    y: Float[Tensor, "_rows d"],
    row_of: Int[Tensor, " n_times_k"] | None = None,
) -> tuple[Float[Tensor, "d_sae d"], Float[Tensor, " d_sae"]]:
    """For each latent the sum over its entries of coefficient * y[row of the entry], and of coefficient.

    order, starts: of `by_latent`. row_of: the row of y that an entry stands for, if not its own. In float32.
    """
    if kernels.available(y):
        from sae.kernels import codes

        return codes.rows(coefficients, order, starts, y, row_of)
    sorted_values = coefficients.flatten()[order]
    places = order.div(coefficients.shape[1], rounding_mode="floor") if row_of is None else row_of[order]
    sums = row_sums(Ragged(sorted_values, places, starts), y)
    latents = torch.repeat_interleave(starts.diff(), output_size=len(order))
    totals = sums.new_zeros(len(starts) - 1).index_add_(0, latents, sorted_values)
    return sums, totals


def ragged(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], starts: Int[Tensor, " _rows_and_1"] | None = None
) -> Ragged:
    n, k = values.shape
    if starts is None:
        starts = torch.arange(0, n * k + 1, k, device=values.device)
    return Ragged(values.flatten(), indices.flatten(), starts)


def row_sums(codes: Ragged, W: Float[Tensor, "columns d"]) -> Float[Tensor, "n d"]:
    """The product of the sparse matrix with W."""
    return embedding_bag(
        codes.columns, W, codes.starts, per_sample_weights=codes.values, mode="sum", include_last_offset=True
    )


def transposed(codes: Ragged, n_columns: int) -> Ragged:
    """The transpose of the sparse matrix, its entries sorted by column, then by row."""
    # Half the bytes to sort: torch sorts integers digit by digit.
    columns, order = codes.columns.int().sort(stable=True)
    rows = torch.repeat_interleave(codes.starts.diff(), output_size=len(columns))[order]
    return Ragged(codes.values[order], rows, starts_of(columns, n_columns))


def dots_at(a: Float[Tensor, "n d"], b: Float[Tensor, "columns d"], places: Ragged) -> Float[Tensor, " entries"]:
    """a[r] . b[c] for each entry (r, c), without the dense a @ b.T."""
    pattern = torch.sparse_csr_tensor(
        places.starts, places.columns, torch.zeros_like(places.values), (len(a), len(b)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()


def nonzero(mask: Bool[Tensor, "n m"]) -> Int[Tensor, " places"]:
    """Places of the mask's true entries in its flat form, ascending."""
    return mask.flatten().nonzero().squeeze(1)


def starts_of(rows: Int[Tensor, " entries"], n: int) -> Int[Tensor, " n_and_1"]:
    """Where each of n rows starts among entries that are sorted by row."""
    starts = torch.zeros(n + 1, dtype=torch.long, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=n), 0, out=starts[1:])
    return starts


def at_places(places: Int[Tensor, " entries"], values: Float[Tensor, " entries"], shape: tuple[int, ...]) -> Ragged:
    """Codes from the places of their entries, ascending, in the flat form of a matrix of this shape."""
    n, m = shape
    firsts = torch.arange(0, n * m + 1, m, device=places.device)
    starts = torch.searchsorted(places, firsts)
    return Ragged(values, places - firsts[:-1].repeat_interleave(starts.diff(), output_size=len(places)), starts)


def to_table(codes: Ragged, n_columns: int, at_least: int = 1) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Ragged codes as (values, indices); k is the longest row, or `at_least`. Unused places come last in their row."""
    lengths = codes.starts.diff()
    width = max(int(lengths.max()), at_least) if len(lengths) else at_least
    used = torch.arange(width, device=lengths.device) < lengths[:, None]
    values = codes.values.new_zeros(used.shape).masked_scatter_(used, codes.values)
    return values, codes.columns.new_full(used.shape, n_columns - 1).masked_scatter_(used, codes.columns)


def encoder_gradients(
    grad: Ragged, x: Float[Tensor, "n d"], W_enc: Float[Tensor, "d d_sae"]
) -> tuple[Float[Tensor, "d d_sae"], Float[Tensor, " d_sae"], Float[Tensor, " d"]]:
    """Of W_enc, b_enc and b_dec, from the gradient of entries of x @ W_enc + b_enc; x has b_dec taken out."""
    grad_b = W_enc.new_zeros(W_enc.shape[1]).index_add_(0, grad.columns, grad.values)
    return row_sums(transposed(grad, W_enc.shape[1]), x).T, grad_b, -(W_enc @ grad_b)
