"""The cached text as an index reads it: of each shard of the cache the tokens, and the latents that are not 0."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from activations.cache import CachedActivations
from sae import SAE

CELLS = 1 << 25
"""Latents that are encoded at once, zeros counted: rows times d_sae, but 256 rows at least."""


def shards_of(cache: CachedActivations, n_tokens: int | None) -> list[tuple[int, int]]:
    """(number of the first row, rows that are read) of each shard that an index of `n_tokens` rows reads; None: all."""
    found, first = [], 0
    for i in range(cache.n_shards):
        n = cache.rows_of(i) if n_tokens is None else min(cache.rows_of(i), n_tokens - first)
        if n <= 0:
            break
        found.append((first, n))
        first += n
    return found


def tokens_table(cache: CachedActivations, shard: int, first: int, n: int) -> pa.Table:
    """The first `n` rows of a shard, ordinary or not, as `build_store` takes them."""
    text = cache.tokens(shard)
    columns = {"id": text.ids, "doc": text.docs, "position": text.positions, "ordinary": cache.mask(shard)}
    numbers = np.arange(first, first + n, dtype=np.int64)
    return pa.table({"row": numbers, **{name: column[:n].numpy() for name, column in columns.items()}})


@torch.inference_mode()
def code_tables(
    sae: SAE,
    cache: CachedActivations,
    shard: int,
    first: int,
    n: int,
    *,
    batch: int,
    told: Callable[[int], object] = lambda _: None,
) -> Iterator[pa.Table]:
    """The latents that are not 0 on the ordinary ones of the first `n` rows of a shard, by row.

    batch: rows encoded at once, at most. told: of each number of rows that are done.
    """
    rows, mask = cache.rows(shard)[:n], cache.mask(shard)[:n]
    step = min(batch, max(CELLS // sae.d_sae, 256))
    for at in range(0, n, step):
        kept = mask[at : at + step].nonzero().flatten() + at
        x = rows[kept].to(sae.W_dec.device, torch.float32)
        yield _codes(sae, x, (first + kept).numpy())
        told(min(step, n - at))


def _codes(sae: SAE, x: Float[Tensor, "n d_in"], numbers: np.ndarray) -> pa.Table:
    """The non-zero latents of the rows `numbers` of the run."""
    values, indices = (part.cpu() for part in sae.encode_sparse(x))
    place, column = values.nonzero(as_tuple=True)
    return pa.table(
        {
            "row": numbers[place.numpy()],
            "feature": indices[place, column].to(torch.int32).numpy(),
            "value": values[place, column].float().numpy(),
        }
    )
