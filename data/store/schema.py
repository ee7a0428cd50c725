"""What the feature store holds: one dataclass for each thing that is read or written, and the tables behind them.

The surprise is that there are two kinds of table. What an index computes (features, examples, windows) is written once
into `features.duckdb` and never changed: DuckDB lets nobody read a file that somebody has open for writing. What grows
while people read (explanations, scores) is Parquet parts beside it, where the newest row of a key is the valid one.

Signs: a latent may be negative (AbsTopK). Every value here keeps its sign; the *pole* says which side is meant.
"""

import datetime
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import duckdb

from data.store.errors import StoreError

SCHEMA_VERSION = 2

STORE_FILE = "features.duckdb"

POLES = ("+", "-", "both")
SOURCES = ("person", "llm", "lexical")
"""Who wrote an explanation, the most trusted first."""

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
"""Levels of `Profile.quantiles`."""

DENSE = 0.1
"""A feature that fires on a larger share of the ordinary tokens is dense."""

DETECTION = "detection"
"""The scorer whose value (balanced accuracy on windows that the explainer has not seen) ranks explanations."""


@dataclass(frozen=True, kw_only=True)
class TokenValue:
    """A vocabulary entry and its logit."""

    id: int
    value: float


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """A token that a latent fires on."""

    id: int
    n: int
    """Firings on this token."""
    share: float
    """Those firings as a share of the token's own ordinary occurrences, 0 to 1."""
    mean: float
    """Mean value over those firings, with its sign."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """Another latent whose decoder row points the same way (or, for signed latents, the opposite way)."""

    feature: int
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A text about a feature. Of a key (feature, pole, source, explainer, model) the newest one is valid."""

    id: str
    """Stable hash of key and text, so that a score belongs to this text and to no later one."""
    feature: int
    pole: str
    """'+', '-' or 'both'."""
    text: str
    """An empty text withdraws the explanation of its key."""
    source: str
    """'person', 'llm' or 'lexical'."""
    explainer: str
    model: str
    prompt_version: str
    created: str
    """ISO 8601, UTC."""

    @classmethod
    def new(
        cls,
        *,
        feature: int,
        text: str,
        source: str,
        pole: str = "+",
        explainer: str = "",
        model: str = "",
        prompt_version: str = "",
    ) -> "Explanation":
        """An explanation made now, with its id."""
        key = "\x1f".join([str(feature), pole, source, explainer, model, text])
        return cls(
            id=hashlib.sha256(key.encode()).hexdigest()[:16],
            feature=feature,
            pole=pole,
            text=text,
            source=source,
            explainer=explainer,
            model=model,
            prompt_version=prompt_version,
            created=now(),
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well one explanation predicts its feature. Its key is (explanation_id, scorer)."""

    explanation_id: str
    feature: int
    scorer: str
    value: float
    """In the scorer's own unit; balanced accuracy for `detection`."""
    lo: float
    hi: float
    """95 % interval of `value`."""
    n: int
    """Windows judged."""
    chance: float
    """What guessing would get."""
    control: float | None
    """The same score for another feature's explanation, if it was measured."""
    failures: int
    """Replies that could not be read."""
    cost_tokens: int
    created: str
    """ISO 8601, UTC."""
    model: str
    """Who judged."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """All that the store knows of one latent. Values over ordinary tokens only."""

    feature: int
    alive: bool
    """Fired at least once in the indexed tokens."""
    n_active: int
    density: float
    """Share of ordinary tokens on which it is not zero."""
    max: float
    min: float
    """Largest and smallest value, zeros counted: `min` is 0 unless the latent goes negative."""
    mean: float | None
    q10: float | None
    q50: float | None
    q90: float | None
    """Mean and quantiles of the non-zero values; None for a latent that never fired."""
    hist_edges: list[float]
    hist_counts: list[int]
    """Histogram of the non-zero values, with one edge more than counts; both empty for a latent that never fired."""
    top_logits: list[TokenValue]
    bottom_logits: list[TokenValue]
    """The tokens that the decoder row raises and lowers most (logit lens, centred over the vocabulary)."""
    logit_edges: list[float]
    logit_counts: list[int]
    neighbours: list[Neighbour]
    top_tokens: list[TokenCount]
    bottom_tokens: list[TokenCount]
    """The tokens it fires on most, for each pole."""
    explanations: list[Explanation]
    """The valid ones, best first."""
    scores: list[Score]

    @property
    def explanation(self) -> Explanation | None:
        """The best explanation, if there is any."""
        return self.explanations[0] if self.explanations else None

    @property
    def dense(self) -> bool:
        """Whether it fires on more than a tenth of the ordinary tokens."""
        return self.density > DENSE


@dataclass(frozen=True, kw_only=True)
class Coactive:
    """Another latent that fires on the same tokens; of a sample of them (`coactivation_tokens` of the store's meta)."""

    feature: int
    n: int
    """Tokens on which both fire."""
    jaccard: float
    """Those as a share of the tokens on which either fires."""
    chance: float
    """That share if the two fired as often but independently."""
    phi: float
    """Correlation of the two firing or not, -1 to 1; 0 by chance."""


@dataclass(frozen=True, kw_only=True)
class LossEffect:
    """What the model loses when one latent is taken out (delta form) of contexts in which it fires."""

    nats: float
    """Loss without it less the clean one, mean over predicted tokens; positive where it helps."""
    error: float
    """Standard error over contexts; NaN for one context."""
    control: float
    """`nats` with a random direction of the decoder row's norm in its place."""
    n_contexts: int
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class PositionBin:
    """Some positions in a context, and how one latent fires on them."""

    first: int
    last: int
    """Positions `first` to `last`, counted from 0."""
    n_tokens: int
    """Ordinary tokens there."""
    n_active: int
    mean: float
    """Mean of the non-zero values there; 0 where it never fires."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """On which values, tokens and positions a latent fires, over ordinary tokens only."""

    quantiles: list[float]
    """Of the non-zero values at the levels `QUANTILES`; empty for a latent that never fired."""
    strong_tokens: list[TokenCount]
    weak_tokens: list[TokenCount]
    """The tokens of largest mean value of the positive pole, and of lowest of the negative one, among those with 3 or
    more firings."""
    positions: list[PositionBin]
    by_jaccard: list[Coactive]
    by_phi: list[Coactive]
    """The latents that fire together with it most, by either measure; those that meet it on 5 tokens or more."""
    x: float | None
    y: float | None
    """Place of its decoder row on a map of all of them: principal components of the rows at norm 1."""
    cluster: int | None
    """Cluster of decoder rows that point the same way; 0 is the largest."""
    loss: LossEffect | None
    """None where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class Map:
    """The places of all latents that have one, in the same order."""

    feature: list[int]
    x: list[float]
    y: list[float]
    cluster: list[int]
    density: list[float]


@dataclass(frozen=True, kw_only=True)
class FeatureRow:
    """One line of the feature list."""

    feature: int
    density: float
    max: float
    min: float
    alive: bool
    explanation: str | None
    """The best text."""
    source: str | None
    score: float | None
    """Balanced accuracy of that text on windows that its explainer has not seen."""
    top_tokens: list[str]
    hist_edges: list[float]
    hist_counts: list[int]
    """Histogram of the non-zero values, as in `Feature`."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Some lines of the feature list, and how many there are in all."""

    rows: list[FeatureRow]
    total: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """A window of text with the values of one latent."""

    feature: int
    pole: str
    """'+' or '-': the side on which `peak` lies."""
    kind: str
    """'top', 'interval', 'quantile' or 'random'."""
    band: int
    """Which fourth of (0, largest |value| of the pole] the peak lies in, 0 the weakest; for `quantile`, which fourth of
    the pole's windows by the size of their peak."""
    rank: int
    """0-based, within (feature, pole, kind)."""
    doc: int
    """Document of the first token."""
    start: int
    """Row number of the first token in the run."""
    split: str
    """'explain' or 'score', by document."""
    token_ids: list[int]
    acts: list[float]
    """One value a token, with its sign; 0 where the latent is off."""
    peak: float
    peak_index: int
    """Place of the peak in `token_ids`."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A window of the random background sample, as one feature sees it."""

    window: int
    doc: int
    token_ids: list[int]
    peak: float
    """The feature's value of largest magnitude in the window; 0 where it is off."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts over the whole store."""

    n_features: int
    n_alive: int
    n_explained: int
    n_scored: int
    n_tokens: int
    """Ordinary tokens that the index read."""


_COACTIVE = "STRUCT(feature INTEGER, n BIGINT, jaccard FLOAT, chance FLOAT, phi FLOAT)"

TABLES: dict[str, dict[str, str]] = {
    "meta": {"key": "VARCHAR", "value": "VARCHAR"},
    "vocab": {"id": "INTEGER", "bytes": "BLOB"},
    "features": {
        "feature": "INTEGER",
        "alive": "BOOLEAN",
        "n_active": "BIGINT",
        "density": "DOUBLE",
        "max": "FLOAT",
        "min": "FLOAT",
        "mean": "FLOAT",
        "q10": "FLOAT",
        "q50": "FLOAT",
        "q90": "FLOAT",
        "hist_edges": "FLOAT[]",
        "hist_counts": "BIGINT[]",
        "top_logits": "STRUCT(id INTEGER, value FLOAT)[]",
        "bottom_logits": "STRUCT(id INTEGER, value FLOAT)[]",
        "logit_edges": "FLOAT[]",
        "logit_counts": "BIGINT[]",
        "neighbours": "STRUCT(feature INTEGER, cosine FLOAT)[]",
        "top_tokens": "STRUCT(id INTEGER, n BIGINT, share FLOAT, mean FLOAT)[]",
        "bottom_tokens": "STRUCT(id INTEGER, n BIGINT, share FLOAT, mean FLOAT)[]",
    },
    "examples": {
        "feature": "INTEGER",
        "pole": "VARCHAR",
        "kind": "VARCHAR",
        "band": "INTEGER",
        "rank": "INTEGER",
        "doc": "INTEGER",
        "start": "BIGINT",
        "split": "VARCHAR",
        "token_ids": "INTEGER[]",
        "acts": "FLOAT[]",
        "peak": "FLOAT",
        "peak_index": "INTEGER",
    },
    "windows": {
        "window": "INTEGER",
        "doc": "INTEGER",
        "start": "BIGINT",
        "split": "VARCHAR",
        "token_ids": "INTEGER[]",
    },
    "window_peaks": {"feature": "INTEGER", "window": "INTEGER", "low": "FLOAT", "high": "FLOAT"},
    "positions": {"bin": "INTEGER", "first": "INTEGER", "last": "INTEGER", "n_tokens": "BIGINT"},
    "profiles": {
        "feature": "INTEGER",
        "quantiles": "FLOAT[]",
        "strong_tokens": "STRUCT(id INTEGER, n BIGINT, share FLOAT, mean FLOAT)[]",
        "weak_tokens": "STRUCT(id INTEGER, n BIGINT, share FLOAT, mean FLOAT)[]",
        "position_counts": "BIGINT[]",
        "position_means": "FLOAT[]",
        "by_jaccard": f"{_COACTIVE}[]",
        "by_phi": f"{_COACTIVE}[]",
        "x": "FLOAT",
        "y": "FLOAT",
        "cluster": "INTEGER",
        "loss": "STRUCT(nats FLOAT, error FLOAT, control FLOAT, n_contexts BIGINT, n_tokens BIGINT)",
    },
}
"""The tables of `features.duckdb`: column names and types, in order."""

SINCE = {"positions": 2, "profiles": 2}
"""The schema version that brought a table; all others are of version 1."""


def create_tables(connection: duckdb.DuckDBPyConnection, catalog: str, tables: Iterable[str] = tuple(TABLES)) -> None:
    """Make the empty tables of the newest schema that `catalog` lacks; all of them, or some."""
    for table in tables:
        body = ", ".join(f'"{name}" {kind}' for name, kind in TABLES[table].items())
        connection.execute(f"CREATE TABLE IF NOT EXISTS {catalog}.{table} ({body})")


def _add_profiles(connection: duckdb.DuckDBPyConnection) -> None:
    """1 to 2: no latent of an older store has a profile."""
    create_tables(connection, "memory", ("positions", "profiles"))


MIGRATIONS: dict[int, Callable[[duckdb.DuckDBPyConnection], None]] = {1: _add_profiles}
"""Steps from a schema version to the next one, by the version they start from. A store is never written to again, so a
step makes what is missing in the memory of who reads it."""


def migrate(connection: duckdb.DuckDBPyConnection, version: int) -> None:
    """Give the in-memory catalog every table that is newer than version 1: the attached store's, or a step's."""
    for table, since in SINCE.items():
        if since <= version:
            connection.execute(f"CREATE VIEW memory.{table} AS FROM store.{table}")
    for older in range(version, SCHEMA_VERSION):
        MIGRATIONS[older](connection)


def check_tables(connection: duckdb.DuckDBPyConnection, catalog: str, version: int) -> None:
    """Raise StoreError unless `catalog` has every table and column of its schema version, as plain tables.

    Views are refused: a store that comes from somebody else is read, never run.
    """
    views = connection.execute(
        "SELECT view_name FROM duckdb_views() WHERE database_name = ? AND NOT internal", [catalog]
    ).fetchall()
    rows = connection.execute(
        "SELECT table_name, column_name FROM duckdb_columns() WHERE database_name = ? AND NOT internal", [catalog]
    ).fetchall()
    if views:
        raise StoreError(f"it holds the view {views[0][0]!r}, expected tables only")
    expected = {table: columns for table, columns in TABLES.items() if SINCE.get(table, 1) <= version}
    missing = {(table, column) for table, columns in expected.items() for column in columns} - set(rows)
    if missing:
        table, column = sorted(missing)[0]
        raise StoreError(f"it has no column {table}.{column}")


def check_version(meta: dict[str, str]) -> None:
    """Raise StoreError for a store that this version cannot read: a newer one, or an older one without a migration."""
    found = meta.get("schema", "")
    if not found.isdecimal():
        raise StoreError(f"its schema version is {found!r}, expected a number up to {SCHEMA_VERSION}")
    if int(found) > SCHEMA_VERSION:
        raise StoreError(
            f"it was made by a newer version (schema {found}, this one reads up to {SCHEMA_VERSION}); "
            "update sae-workbench"
        )
    if any(version not in MIGRATIONS for version in range(int(found), SCHEMA_VERSION)):
        raise StoreError(f"its schema {found} is too old to be read")


def now() -> str:
    """The present time as the store writes it: ISO 8601, UTC, microseconds, so that text order is time order."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
