"""Which latents fire on the same tokens: of each, those of largest Jaccard index and of largest phi.

    jaccard = n_ij / (n_i + n_j - n_ij)                             by chance: with n_i n_j / n for n_ij
    phi = (n n_ij - n_i n_j) / sqrt(n_i n_j (n - n_i) (n - n_j))    by chance: 0

n: ordinary tokens; n_i: those on which latent i is not 0, whatever its sign; n_ij: on which i and j are not.

The surprise: the counts are exact, but of evenly spread tokens when there are more than `FIRINGS` and `PRODUCTS` allow,
so that neither memory nor time grows with the text. Pairs that meet on fewer than `FEWEST` tokens are left out: two
latents that fire once, together, would have an index of 1.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix
from tqdm import tqdm

from autointerp.scratch import batches
from sae.coactivation import together

N_COACTIVE = 10
FEWEST = 5
FIRINGS = 1 << 23
PRODUCTS = 1 << 29
"""Firings that are kept, 16 bytes each, and pairs of firings that are counted in all: seconds."""
BLOCK = 1 << 20
"""Pairs of firings that are counted at once."""


class Pairs(NamedTuple):
    """Latents i, each with some j."""

    row: Int[np.ndarray, " pairs"]
    """Place of i among the latents that are looked at."""
    feature: Int[np.ndarray, " pairs"]
    n: Int[np.ndarray, " pairs"]
    jaccard: Float[np.ndarray, " pairs"]
    chance: Float[np.ndarray, " pairs"]
    phi: Float[np.ndarray, " pairs"]

    def at(self, place: np.ndarray) -> "Pairs":
        """The pairs at these places."""
        return Pairs(*(column[place] for column in self))


def coactive_tables(fires: csr_matrix) -> Iterator[pa.Table]:
    """by_jaccard and by_phi of every latent, as `build_store` takes them, some latents at a time.

    fires: `sampled_firings`.
    """
    n, each = fires.shape[0], fires.getnnz(axis=0).astype(np.int64)
    with tqdm(total=fires.shape[1], desc="co-activation", unit="latent", disable=None) as bar:
        for first, both in together(fires, BLOCK):
            pairs = pairs_of(both, first, each, n)
            columns = {"feature": pa.array(np.arange(first, first + both.shape[0], dtype=np.int32))}
            for name, score in (("by_jaccard", pairs.jaccard), ("by_phi", pairs.phi)):
                columns[name] = _lists(pairs.at(best(pairs, score, both.shape[0])), both.shape[0])
            yield pa.table(columns)
            bar.update(both.shape[0])


def sampled_firings(codes: Sequence[Path], tokens: Sequence[Path], d_sae: int) -> csr_matrix:
    """Ordinary tokens by latents, 1 where the latent is not 0; all of them, or as many as the bounds allow.

    codes, tokens: Parquet as `build_store` takes them, each by row.
    """
    n_tokens, n_codes = sum(map(len, _ordinary(tokens))), sum(pq.read_metadata(part).num_rows for part in codes)
    share = min(1.0, FIRINGS / max(n_codes, 1), PRODUCTS * n_tokens / max(n_codes, 1) ** 2)
    rows = np.concatenate([part[sampled(part, share)] for part in _ordinary(tokens)])
    counts, columns = np.zeros(len(rows), np.int64), [np.zeros(0, np.int32)]
    for table in batches(codes, ["row", "feature"]):
        row, feature = table["row"].to_numpy(), table["feature"].to_numpy()
        kept = sampled(row, share)
        np.add.at(counts, np.searchsorted(rows, row[kept]), 1)
        columns.append(feature[kept])
    where = np.concatenate(columns)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)  # as wide as `where`, or SciPy widens that
    return csr_matrix((np.ones(len(where), np.int32), where, starts), shape=(len(rows), d_sae))


def sampled(rows: Int[np.ndarray, " n"], share: float) -> Bool[np.ndarray, " n"]:
    """Whether each row is of the sample: its number times the golden ratio, modulo 1, is below the share."""
    with np.errstate(over="ignore"):
        turned = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)
    return turned < round(share * 2**32)


def pairs_of(both: csr_matrix, first: int, each: Int[np.ndarray, " d_sae"], n: int) -> Pairs:
    """The pairs (i, j) of a block of the table of n_ij that meet often enough, by i and j.

    first: number of the first i. each: n_i; n: the tokens.
    """
    row = np.repeat(np.arange(both.shape[0]), both.getnnz(axis=1))
    kept = (both.data >= FEWEST) & (both.indices != row + first)
    row, j, n_ij = row[kept], both.indices[kept], both.data[kept].astype(np.int64)
    n_i, n_j = each[row + first], each[j]
    chance = n_i * (n_j / n)
    spread = np.sqrt((n_i * (n - n_i)).astype(np.float64)) * np.sqrt((n_j * (n - n_j)).astype(np.float64))
    phi = (n * n_ij - n_i * n_j) / np.where(spread > 0, spread, 1.0)  # one that always fires goes with none
    return Pairs(row, j, n_ij, n_ij / (n_i + n_j - n_ij), chance / (n_i + n_j - chance), phi)


def best(pairs: Pairs, score: Float[np.ndarray, " pairs"], n_rows: int) -> Int[np.ndarray, " kept"]:
    """Places of the `N_COACTIVE` pairs of largest score of each row, by row, best first, ties by number."""
    ends = np.cumsum(np.bincount(pairs.row, minlength=n_rows))
    edges = [
        np.partition(part, -N_COACTIVE)[-N_COACTIVE] if len(part) > N_COACTIVE else -np.inf
        for part in np.split(score, ends[:-1])
    ]
    place = np.flatnonzero(score >= np.array(edges)[pairs.row])
    place = place[np.lexsort((pairs.feature[place], -score[place], pairs.row[place]))]
    row = pairs.row[place]
    return place[np.arange(len(row)) - np.searchsorted(row, row) < N_COACTIVE]


def _lists(pairs: Pairs, n_rows: int) -> pa.Array:
    """The pairs as one list of structs for each row."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(pairs.row, minlength=n_rows))])
    columns = {
        "feature": pairs.feature.astype(np.int32),
        "n": pairs.n,
        **{name: getattr(pairs, name).astype(np.float32) for name in ("jaccard", "chance", "phi")},
    }
    items = pa.StructArray.from_arrays([pa.array(column) for column in columns.values()], list(columns))
    return pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), items)


def _ordinary(tokens: Sequence[Path]) -> Iterator[Int[np.ndarray, " n"]]:
    """Numbers of the ordinary rows, some at a time."""
    for table in batches(tokens, ["row", "ordinary"]):
        yield table["row"].to_numpy()[table["ordinary"].to_numpy(zero_copy_only=False)]
