"""Builds `features.duckdb` from Parquet files of codes and tokens: every statistic and example by SQL.

The surprise is that memory does not grow with the text: DuckDB sorts the codes by feature on disk, and then a few
thousand features at a time are summed up and sampled under a memory limit. The file is written aside and renamed, so
readers never meet half of it and a kill at any moment leaves the old store; what a killed build left goes when the next
one starts.

Examples, for each feature and pole, from a fixed grid of windows (32 tokens of one context):
- `top`: the windows with the largest peak, one a document while documents last. The first `top` ranks are the true
  tops; behind them stand as many more as it takes for each split to have its own best `top // 2`.
- `interval`: `per_band` random windows from each of `bands` equal value intervals of the peak.
- `quantile`: the same, from `bands` groups of equally many windows by the size of their peak; equal peaks in one group.
- `random`: `random` windows of all those in which the feature fires.
The last three take turns between the splits, so both get half while they have enough. Each kind is a sample of its own:
a window may stand in two kinds, never twice in one. "Random" is a hash of (feature, window, seed): always the same.

The split is by document and by a hash of its number alone, so that a rebuilt store never scores an explanation on
documents which its explainer has read. A window whose tokens come from documents of both splits is left out.
Source: the scheme of Paulo et al. 2024, arXiv:2410.13928, and of SAEDashboard. Differs: split by document, value
intervals of the window's peak, both poles.
"""

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data.store.errors import StoreError
from data.store.files import sync
from data.store.schema import QUANTILES, SCHEMA_VERSION, TABLES, create_tables, now
from data.store.statements import (
    BY_RANK,
    EXAMPLES,
    FAVOURITES,
    FEATURES,
    HISTOGRAMS,
    INTERVALS,
    MOMENTS,
    PEAKS,
    PROFILES,
    RANDOMS,
    TOPS,
)

GIVEN = {
    "features": ("top_logits", "bottom_logits", "logit_edges", "logit_counts", "neighbours"),
    "profiles": ("by_jaccard", "by_phi", "x", "y", "cluster", "loss"),
}
"""Columns that the caller of `build_store` may give, by table."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How much of the text a store keeps, and what building it may use."""

    window: int = 32
    """Tokens in a window."""
    top: int = 12
    """True top windows for each feature and pole."""
    bands: int = 4
    """Equal value intervals between 0 and the largest value."""
    per_band: int = 4
    random: int = 12
    background: int = 1024
    """Windows of the random sample that off-windows come from."""
    bins: int = 40
    """Bars of a feature's histogram."""
    top_tokens: int = 10
    position_bins: int = 16
    """Pieces of a context whose firings are counted apart; fewer when a context has fewer positions."""
    seed: int = 0
    memory: str = "2GiB"
    """What DuckDB may hold in memory; the rest is on disk beside the store."""
    threads: int | None = None
    """None: all that this process may use."""
    chunk_codes: int = 8_000_000
    chunk_features: int = 8_192
    """Features are worked on in groups of at most this many codes (but at least one feature) and features."""

    def __post_init__(self) -> None:
        sizes = ("window", "top", "bands", "per_band", "random", "bins", "top_tokens", "position_bins")
        for name in (*sizes, "chunk_codes", "chunk_features"):
            if getattr(self, name) < 1:
                raise StoreError(f"{name}={getattr(self, name)} is too small: expected at least 1")
        if self.background < 0:
            raise StoreError(f"background={self.background} is too small: expected 0 or more windows")


def build_store(
    target: Path,
    *,
    codes: Sequence[Path],
    tokens: Sequence[Path],
    n_features: int,
    vocab: Sequence[bytes],
    meta: Mapping[str, str],
    per_feature: pa.Table | Sequence[Sequence[Path]] | None = None,
    options: BuildOptions | None = None,
    resume: str = "",
) -> Path:
    """Write the feature store `target` (a path that ends in features.duckdb) and return it.

    codes: Parquet (row BIGINT, feature INTEGER, value FLOAT), ordinary tokens only; zeros are ignored.
    tokens: Parquet (row BIGINT, id INTEGER, doc INTEGER, position INTEGER, ordinary BOOLEAN); the rows of a context are
    consecutive and its positions count from 0.
    vocab: the bytes of token id 0, 1, ...
    per_feature: what is not computed here, as a table or as groups of Parquet files of the same columns: feature and
    any of the columns `GIVEN` (types as in `schema.TABLES`), each in one group; features that are not in it get empty
    lists, and NULL for the rest.
    resume: names what the store is made of. A killed build is gone on with by the next one of the same name, as far as
    the last whole step; "" always begins anew.
    meta: free text beside what is added here (schema, n_tokens, n_rows, n_documents, d_sae, window, seed, created).

    One builder for a folder at a time (the caller holds the lock). Needs disk beside the target: about 30 bytes a code.
    Raises StoreError for codes that do not fit the tokens or the number of features, and when the disk is full.
    """
    options = options or BuildOptions()
    scratch = target.with_name(f".{target.name}.building")
    named = scratch / "of.txt"
    if not (resume and named.exists() and named.read_text(encoding="utf-8") == resume):
        named.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        if resume:
            named.write_text(resume, encoding="utf-8")
    done = False
    try:
        with _connect(scratch, options) as connection:
            build = _Build(connection, options, n_features)
            if not build.finished:
                build.read_tokens(tokens)
                build.read_codes(codes)
                build.read_given(per_feature)
                build.chunks()
                build.finish(vocab, meta)
        sync(scratch / "store.duckdb")
        os.replace(scratch / "store.duckdb", target)
        sync(target.parent)
        done = True
    except duckdb.Error as error:
        raise StoreError(
            f"{target} could not be built: {str(error).splitlines()[0]} "
            "(is the disk full, or an input file damaged? the store that was there is untouched)"
        ) from error
    finally:
        if done or not resume:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _nothing(kind: str) -> str:
    """What stands for a value of this type that was not given."""
    return "[]" if kind.endswith("[]") else "NULL"


@contextmanager
def _connect(scratch: Path, options: BuildOptions) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the new store attached as `store` and a scratch database as `work`, both closed at the end."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shutil.rmtree(scratch / "spill", ignore_errors=True)
    connection = duckdb.connect(":memory:")
    try:
        connection.execute("SET enable_progress_bar = false")  # it would write into what a command prints
        connection.execute("SET memory_limit = ?", [options.memory])
        connection.execute("SET threads = ?", [options.threads or usable or 1])
        connection.execute("SET temp_directory = ?", [str(scratch / "spill")])
        for name in ("store", "work"):
            path = str(scratch / f"{name}.duckdb").replace("'", "''")
            connection.execute(f"ATTACH '{path}' AS {name}")
        create_tables(connection, "store")
        yield connection
    finally:
        connection.close()


class _Build:
    """The steps of one build, in order. `work` holds what they hand to each other."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, options: BuildOptions, n_features: int) -> None:
        self.sql = connection
        self.options = options
        self.n_features = n_features
        self.n_ordinary = 0
        self.unit = 1.0
        self.position_bins = 0
        self.given: list[tuple[str, list[str]]] = []
        """Of each group of columns the caller gives, the relation (which takes $given0 and so on) and their names."""
        self.files: dict[str, list[str]] = {}

    @property
    def finished(self) -> bool:
        """Whether everything is in the store: its last step, whole or not done, writes the meta rows."""
        return bool(self._one("SELECT count(*) FROM store.meta")[0])

    def read_tokens(self, paths: Sequence[Path]) -> None:
        """Tokens, how often each id occurs, the split of each document, and the grid of windows.

        Like all that fill `work`: what an earlier build of the same has made is there, whole, and is not made anew.
        """
        files = [str(path) for path in paths]
        (context,) = self._one(
            "SELECT coalesce(max(position), 0)::BIGINT + 1 FROM read_parquet($files)", {"files": files}
        )
        self.position_bins = min(self.options.position_bins, context)
        self.sql.execute(
            """CREATE TABLE IF NOT EXISTS work.tokens AS
            SELECT row::BIGINT AS row, id::INTEGER AS id, doc::INTEGER AS doc, ordinary::BOOLEAN AS ordinary,
                   (position % $window)::INTEGER AS place, row - position % $window AS start,
                   position::INTEGER AS position, (position::BIGINT * $bins // $context)::INTEGER AS bin
            FROM read_parquet($files)""",
            {"files": files, "window": self.options.window, "bins": self.position_bins, "context": context},
        )
        self.sql.execute(
            """CREATE TABLE IF NOT EXISTS work.occurrences AS
            SELECT id, count(*) AS n FROM work.tokens WHERE ordinary GROUP BY id"""
        )
        self.sql.execute(
            """CREATE TABLE IF NOT EXISTS work.documents AS
            SELECT doc, if(md5_number_lower('split ' || doc) % 2 = 0, 'explain', 'score') AS split
            FROM (SELECT DISTINCT doc FROM work.tokens)"""
        )
        self.sql.execute(
            """CREATE TABLE IF NOT EXISTS work.windows AS
            SELECT start, arg_min(doc, row) AS doc, min(split) AS split, list(id ORDER BY row) AS token_ids
            FROM work.tokens JOIN work.documents USING (doc)
            GROUP BY start HAVING min(split) = max(split) ORDER BY start"""
        )
        (self.n_ordinary,) = self._one("SELECT count(*) FILTER (ordinary) FROM work.tokens")
        if self.n_ordinary == 0:
            raise StoreError("there are no ordinary tokens to index: expected at least one cached context")

    def read_codes(self, paths: Sequence[Path]) -> None:
        """The codes with their token and window, sorted by feature: from here on a feature is one stretch of rows."""
        files = [str(path) for path in paths]
        (given,) = self._one("SELECT count(*) FROM read_parquet($files) WHERE value <> 0", {"files": files})
        self.sql.execute(
            """CREATE TABLE IF NOT EXISTS work.fired AS
            SELECT codes.feature::INTEGER AS feature, codes.value::FLOAT AS value, id, start, place, bin
            FROM read_parquet($files) AS codes JOIN work.tokens AS tokens ON codes.row = tokens.row AND tokens.ordinary
            WHERE codes.value <> 0 ORDER BY codes.feature, codes.row""",
            {"files": files},
        )
        found, low, high, bad, largest = self._one(
            """SELECT count(*), min(feature), max(feature), count(*) FILTER (NOT isfinite(value)), max(abs(value))
            FROM work.fired"""
        )
        if found != given:
            raise StoreError(f"{given - found} of {given} codes are of rows that are no ordinary token")
        if found and (low < 0 or high >= self.n_features):
            raise StoreError(f"codes name features {low} to {high}, expected 0 to {self.n_features - 1}")
        if bad:
            raise StoreError(f"{bad} of {found} codes are not finite: is the dictionary damaged?")
        if found:
            self.unit = 2.0 ** (math.frexp(largest)[1] - 40)

    def read_given(self, per_feature: pa.Table | Sequence[Sequence[Path]] | None) -> None:
        """Where what the caller computed is read from, a chunk of features at a time."""
        if per_feature is None:
            return
        if isinstance(per_feature, pa.Table):
            self.sql.register("given_table", per_feature)
            self.given = [("given_table", per_feature.column_names)]
            return
        for number, paths in enumerate(per_feature):
            self.files[f"given{number}"] = [str(path) for path in paths]
            self.given.append((f"read_parquet($given{number})", pq.read_schema(paths[0]).names))

    def chunks(self) -> None:
        """All features that an earlier build has not done, some at a time."""
        (done,) = self._one("SELECT coalesce(max(feature) + 1, 0) FROM store.features")
        ranges = [each for each in self.ranges() if each[0] >= done]
        for low, high in tqdm(ranges, desc="features", unit="chunk", disable=None):
            with self._whole():
                self.features(low, high)
                self.examples(low, high)

    def ranges(self) -> list[tuple[int, int]]:
        """Ranges [low, high) of features that cover all of them, each within the options' sizes."""
        found = self.sql.execute("SELECT feature, count(*) AS n FROM work.fired GROUP BY feature").fetchnumpy()
        counts = np.zeros(self.n_features, np.int64)
        counts[found["feature"]] = found["n"]
        ranges, low, held = [], 0, 0
        for feature, n in enumerate(counts.tolist()):
            full = held + n > self.options.chunk_codes or feature - low >= self.options.chunk_features
            if feature > low and full:
                ranges.append((low, feature))
                low, held = feature, 0
            held += n
        if self.n_features > low:
            ranges.append((low, self.n_features))
        return ranges

    def features(self, low: int, high: int) -> None:
        """The `features` and `profiles` rows of one chunk."""
        chunk, bins = {"low": low, "high": high}, self.options.bins
        self._decoder(low, high)
        self.sql.execute(
            "CREATE OR REPLACE TEMP TABLE moments AS " + MOMENTS.replace("LEVELS", str(list(QUANTILES))),
            {**chunk, "unit": self.unit},
        )
        self.sql.execute("CREATE OR REPLACE TEMP TABLE histograms AS " + HISTOGRAMS, {**chunk, "bins": bins})
        self.sql.execute(
            "CREATE OR REPLACE TEMP TABLE favourites AS " + FAVOURITES,
            {**chunk, "unit": self.unit, "keep": self.options.top_tokens},
        )
        self.sql.execute(FEATURES, {**chunk, "n_ordinary": self.n_ordinary})
        self.sql.execute(PROFILES, {**chunk, "unit": self.unit, "bins": self.position_bins})

    def _decoder(self, low: int, high: int) -> None:
        """What the caller gave of one chunk, as a table `decoder` with all columns."""
        home = {name: f"part{number}" for number, (_, names) in enumerate(self.given) for name in names}
        columns = "".join(
            f", {f'{home[name]}.{name}' if name in home else _nothing(kind)}::{kind} AS {name}"
            for part, names in GIVEN.items()
            for name in names
            for kind in [TABLES[part][name]]
        )
        joins = "".join(
            f" LEFT JOIN (SELECT * FROM {relation} WHERE feature >= $low AND feature < $high) AS part{number}"
            f" ON part{number}.feature = every.feature"
            for number, (relation, _) in enumerate(self.given)
        )
        self.sql.execute(
            "CREATE OR REPLACE TEMP TABLE decoder AS "
            f"SELECT every.feature{columns} FROM range($low, $high) AS every(feature){joins}",
            {"low": low, "high": high, **self.files},
        )

    def examples(self, low: int, high: int) -> None:
        """The `examples` rows of one chunk; follows `features`, whose extremes set the bands."""
        options = self.options
        self.sql.execute(
            "CREATE OR REPLACE TEMP TABLE peaks AS " + PEAKS,
            {"low": low, "high": high, "bands": options.bands},
        )
        self.sql.execute("CREATE OR REPLACE TEMP TABLE tops AS " + TOPS, {"top": options.top})
        levels = [band / options.bands for band in range(1, options.bands)] or [1.0]
        self.sql.execute("CREATE OR REPLACE TEMP TABLE by_rank AS " + BY_RANK.replace("LEVELS", str(levels)))
        for kind, source in (("interval", "peaks"), ("quantile", "by_rank")):
            self.sql.execute(
                f"CREATE OR REPLACE TEMP TABLE {kind}s AS " + INTERVALS.replace("SOURCE", source),
                {"kind": kind, "keep": options.per_band, "seed": options.seed},
            )
        self.sql.execute(
            "CREATE OR REPLACE TEMP TABLE randoms AS " + RANDOMS, {"keep": options.random, "seed": options.seed}
        )
        places = ", ".join(
            f"coalesce(any_value(value) FILTER (place = {place}), 0::FLOAT)" for place in range(options.window)
        )
        self.sql.execute(EXAMPLES.replace("PLACES", places), {"low": low, "high": high})

    def background(self) -> None:
        """A random sample of windows, half from each split while they last, and what fires in them."""
        self.sql.execute(
            """INSERT INTO store.windows
            WITH ranked AS (
                SELECT *, hash(start, $seed, 'window') AS lot,
                       row_number() OVER (PARTITION BY split ORDER BY hash(start, $seed, 'window'), start) AS turn
                FROM work.windows),
            chosen AS (SELECT * FROM ranked ORDER BY turn, lot, start LIMIT $n)
            SELECT row_number() OVER (ORDER BY start) - 1, doc, start, split, token_ids FROM chosen ORDER BY start""",
            {"seed": self.options.seed, "n": self.options.background},
        )
        self.sql.execute(
            """INSERT INTO store.window_peaks
            SELECT feature, "window", least(min(value), 0), greatest(max(value), 0)
            FROM work.fired JOIN store.windows USING (start) GROUP BY ALL ORDER BY feature, "window\""""
        )

    def finish(self, vocab: Sequence[bytes], meta: Mapping[str, str]) -> None:
        """What is not of one feature: positions, background, vocabulary, meta; then everything is in the file."""
        n_rows, n_documents = self._one("SELECT count(*), count(DISTINCT doc) FROM work.tokens")
        known = {
            "created": now(),
            **meta,
            "schema": SCHEMA_VERSION,
            "n_tokens": self.n_ordinary,
            "n_rows": n_rows,
            "n_documents": n_documents,
            "d_sae": self.n_features,
            "window": self.options.window,
            "top": self.options.top,
            "bands": self.options.bands,
            "seed": self.options.seed,
        }
        table = pa.table({"id": pa.array(range(len(vocab)), pa.int32()), "bytes": pa.array(vocab, pa.binary())})
        self.sql.register("vocabulary", table)
        with self._whole():
            self.sql.execute(
                """INSERT INTO store.positions
                SELECT bin, min(position), max(position), count(*) FILTER (ordinary)
                FROM work.tokens GROUP BY bin ORDER BY bin"""
            )
            self.background()
            self.sql.execute("INSERT INTO store.vocab SELECT id, bytes FROM vocabulary")
            rows = [(key, str(value)) for key, value in known.items()]
            self.sql.executemany("INSERT INTO store.meta VALUES (?, ?)", rows)
        self.sql.execute("CHECKPOINT store")

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """One transaction: a kill inside leaves nothing of it in the store."""
        self.sql.execute("BEGIN")
        try:
            yield
        except BaseException:
            self.sql.execute("ROLLBACK")
            raise
        self.sql.execute("COMMIT")

    def _one(self, query: str, parameters: object = None) -> tuple[Any, ...]:
        rows = self.sql.execute(query, parameters).fetchall()
        return tuple(rows[0])
