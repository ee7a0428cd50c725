"""Which latents fire on the same rows: as sparse as the firings are, never a table of all latents with all others.

    share_ij = n_ij / (min(n_i, n_j) + 1)        n_ij: rows on which both fire; n_i: on which i does

So a share is that of the rarer latent's firings on which the denser one fires too, and near 1 for a latent that only
fires together with another. Of two independent latents it is about the density of the denser one, and anything for
rare ones; so it is also asked how often a pair would fire together so often by chance.

Source: O'Neill et al. 2024, arXiv:2408.00657, and its code (saerch). Differs: there a share is over n + 1 of the latent
that happens to have the larger number, and nothing is asked about chance.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from scipy.sparse import coo_matrix, csr_matrix, triu
from scipy.stats import poisson
from tqdm import tqdm

from activations.cache import Activations
from sae.base import SAE
from sae.evals.reconstruction import rows_of

PRODUCTS = 1 << 25
"""Pairs of firings that are counted at once; what is kept of them is far less."""


class Edges(NamedTuple):
    """Pairs of latents, each once, a the denser one."""

    a: Int[np.ndarray, " edges"]
    b: Int[np.ndarray, " edges"]
    share: np.ndarray
    """Of b's firings on which a fires too."""


@torch.no_grad()
def firings(sae: SAE, cache: Activations, part: str, *, n_rows: int = 500_000, batch: int = 4096) -> csr_matrix:
    """Rows by latents, 1 where the latent is not 0: the first `n_rows` ordinary rows of a part of the documents.

    part: "held-out", else of all documents. Takes 8 bytes a firing.
    """
    columns, counts, seen = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)], 0
    with tqdm(desc="encoding", unit="row", unit_scale=True, disable=None) as bar:
        for rows in rows_of(cache, part, batch):
            x = rows.x[: n_rows - seen].to(sae.W_dec.device, torch.float32)
            values, indices = sae.encode_sparse(x)
            fires = values != 0
            columns.append(indices[fires].cpu().numpy().astype(np.int32))
            counts.append(fires.sum(dim=1).cpu().numpy())
            seen += len(x)
            bar.update(len(x))
            if seen == n_rows:
                break
    where = np.concatenate(columns)
    starts = np.cumsum(np.concatenate(counts))
    return csr_matrix((np.ones(len(where), np.int32), where, starts), shape=(seen, sae.d_sae))


def edges(fires: csr_matrix, latents: Int[np.ndarray, " m"], threshold: float, chance: float) -> Edges:
    """The pairs of these latents whose share is at least `threshold`, sorted by a and b.

    chance: of pairs that fire together at least so often, as many would be expected among all the pairs if latents were
    independent (Poisson); pairs with a higher number are left out.
    Of two that fire equally often, a is the one with the smaller number.
    """
    n, m = fires.shape[0], len(latents)
    each = fires.getnnz(axis=0)[latents]
    order = np.lexsort((latents, -each))  # from the densest to the rarest: then i < j says that i is the denser
    latents, each = latents[order], each[order]
    parts = [np.zeros((3, 0))]
    for first, both in tqdm(counted(fires[:, latents].tocsr()), desc="counting pairs", unit="block", disable=None):
        share = both.data / (each[both.col] + 1)
        expected = each[both.row + first] * (each[both.col] / n)
        kept = (share >= threshold) & (poisson.sf(both.data - 1, expected) * (m * (m - 1) / 2) <= chance)
        parts.append(np.stack([both.row[kept] + first, both.col[kept], share[kept]]))
    a, b, share = np.concatenate(parts, axis=1)
    a, b = latents[a.astype(np.int64)], latents[b.astype(np.int64)]
    by_number = np.lexsort((b, a))
    return Edges(a[by_number], b[by_number], share[by_number])


def independent(fires: csr_matrix, rng: np.random.Generator) -> csr_matrix:
    """As many firings of each latent, on rows drawn anew for each: what co-activation is by chance."""
    n, d_sae = fires.shape
    each = fires.getnnz(axis=0)
    rows = np.concatenate([rng.choice(n, count, replace=False, shuffle=False) for count in each])
    return csr_matrix((np.ones(len(rows), np.int32), (rows, np.repeat(np.arange(d_sae), each))), shape=(n, d_sae))


def counted(fires: csr_matrix) -> Iterator[tuple[int, coo_matrix]]:
    """n_ij for i < j, as (number of the first i, their rows of the table), a few latents i at a time.

    Memory: about `PRODUCTS` entries, however many latents fire together.
    """
    for first, both in together(fires, PRODUCTS):
        yield first, triu(both, k=first + 1).tocoo()


def together(fires: csr_matrix, products: int) -> Iterator[tuple[int, csr_matrix]]:
    """n_ij for all j, as (number of the first i, their rows of the table), a few latents i at a time; n_ii is n_i.

    products: pairs of firings that are counted at once, unless one latent has more.
    """
    by_latent = fires.T.tocsr()
    work = np.cumsum(by_latent @ fires.getnnz(axis=1))
    first = 0
    while first < len(work):
        done = work[first - 1] if first else 0
        last = max(int(np.searchsorted(work, done + products, side="right")), first + 1)
        yield first, (by_latent[first:last] @ fires).tocsr()
        first = last
