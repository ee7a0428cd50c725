"""Searching a store: which features have words in a label, fire on a token, or fire in the same windows as another.

Every search takes `Filters`, and every text of a caller reaches DuckDB as a parameter: quotes, %, _ and SQL in it are
plain characters. What a feature is called depends on the filters: its label is the best explanation that passes those
of source and score.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from data.store.errors import StoreError
from data.store.schema import SOURCES

if TYPE_CHECKING:
    from data.store.open import Store

STATES = ("all", "alive", "dead")
FEWEST = 5
"""Two features that are both on in fewer windows of the sample do not count as firing together: chance would do it."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which features a search may find. Bounds are inclusive."""

    state: str = "all"
    """'alive' (fired in the indexed text), 'dead' or 'all'."""
    min_density: float = 0.0
    max_density: float = 1.0
    """Share of ordinary tokens on which it fires."""
    min_score: float | None = None
    max_score: float | None = None
    """Detection score of the label."""
    source: str | None = None
    """Who wrote the label: one of `SOURCES`."""
    cluster: int | None = None
    """Cluster of its decoder row (`Profile.cluster`)."""

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise StoreError(f"state={self.state!r} is unknown: expected one of {', '.join(STATES)}")
        if self.source is not None and self.source not in SOURCES:
            raise StoreError(f"source={self.source!r} is unknown: expected one of {', '.join(SOURCES)}")

    @property
    def ask_for_label(self) -> bool:
        """Whether a feature without a label fails them."""
        return (self.min_score, self.max_score, self.source) != (None, None, None)


ALL = Filters()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a search tells of a feature, whatever it was found by."""

    feature: int
    alive: bool
    density: float
    max: float
    min: float
    cluster: int | None
    """None where an older version made the store."""
    label: str | None
    source: str | None
    score: float | None
    """Detection score of this label."""


class OnToken(NamedTuple):
    """How a feature fires on a token (on all spellings that were asked for)."""

    facts: Facts
    id: int
    """The spelling on which it fires most."""
    n: int
    """Firings there."""
    of_firings: float
    """Those as a share of all its firings."""
    of_token: float
    """Those as a share of the token's ordinary occurrences."""
    mean: float
    """Mean value over those firings, with its sign."""
    of_max: float
    """Its size as a share of the feature's largest value of that sign."""


class Together(NamedTuple):
    """A feature that fires in the same windows of the random sample as another."""

    feature: int
    n: int
    """Windows in which both are on."""
    jaccard: float
    phi: float


# What an answer is ordered by -> its column.
_TOKEN_ORDERS = {"firings": "of_firings", "value": "of_max"}

_KEPT = """
labels AS (
    SELECT id, feature, text, source, score, place FROM explanations
    WHERE ($source IS NULL OR source = $source)
      AND ($min_score IS NULL OR score >= $min_score) AND ($max_score IS NULL OR score <= $max_score)),
kept AS (
    SELECT features.feature AS feature, alive, n_active, density, "max", "min", cluster
    FROM store.features AS features LEFT JOIN profiles USING (feature)
    WHERE density BETWEEN $min_density AND $max_density AND ($state = 'all' OR alive = ($state = 'alive'))
      AND ($cluster IS NULL OR cluster = $cluster))
"""
_FACTS = 'kept.feature, alive, density, "max", "min", cluster, text, source, score'
_N_FACTS = _FACTS.count(",") + 1


def facts_of(store: "Store", wanted: Sequence[int], filters: Filters = ALL) -> dict[int, Facts]:
    """Facts of those of these features that pass the filters."""
    rows = store.query(
        f"""WITH {_KEPT},
        best AS (
            SELECT feature, unnest(arg_min(struct_pack(text := text, source := source, score := score), place))
            FROM labels WHERE feature IN (SELECT unnest($wanted::INTEGER[])) GROUP BY feature)
        SELECT {_FACTS} FROM kept LEFT JOIN best USING (feature)
        WHERE kept.feature IN (SELECT unnest($wanted::INTEGER[])) AND (best.feature IS NOT NULL OR NOT $labelled)""",
        {**_parameters(filters), "wanted": list(wanted), "labelled": filters.ask_for_label},
    )
    return {row[0]: _facts(row) for row in rows}


def labelled(store: "Store", ids: Sequence[str], filters: Filters = ALL) -> dict[str, Facts]:
    """Facts by explanation, with this explanation as the label, of those of these that pass the filters."""
    rows = store.query(
        f"""WITH {_KEPT}
        SELECT {_FACTS}, id FROM labels JOIN kept USING (feature) WHERE id IN (SELECT unnest($ids::VARCHAR[]))""",
        {**_parameters(filters), "ids": list(ids)},
    )
    return {row[-1]: _facts(row) for row in rows}


def label_texts(store: "Store") -> list[tuple[str, str]]:
    """(id, text) of every valid explanation, by feature, best first."""
    return [(id, text) for id, text in store.query("SELECT id, text FROM explanations ORDER BY feature, place")]


def has_labels(store: "Store") -> bool:
    """Whether any feature has an explanation."""
    return bool(store.query("SELECT 1 FROM explanations LIMIT 1"))


def with_words(
    store: "Store", words: Sequence[str], filters: Filters = ALL, *, limit: int = 20
) -> tuple[list[tuple[Facts, int]], int]:
    """(features with a label in which a word begins with each of `words`, each with how many of them it has whole; how
    many such features there are).

    Case does not count. A word begins where the text does or after what is no letter and no digit; one that begins with
    another character may begin anywhere. The label is the one with most whole words, then the best. Order: whole words,
    best explanations before others, score, shorter labels, number.
    """
    text = "lower(text)"
    begins = "if(regexp_matches({word}, '^[\\pL\\pN]'), '(^|[^\\pL\\pN])', '')"
    ends = "if(regexp_matches({word}, '[\\pL\\pN]$'), '($|[^\\pL\\pN])', '')"
    where, whole, parameters = [], [], dict[str, Any]()
    for i, word in enumerate(words):
        parameters[f"word{i}"] = word
        folded = f"lower($word{i}::VARCHAR)"
        pattern = f"{begins.format(word=folded)} || regexp_escape({folded})"
        where.append(f"contains({text}, {folded}) AND regexp_matches({text}, {pattern})")
        whole.append(f"regexp_matches({text}, {pattern} || {ends.format(word=folded)})::INTEGER")
    rows = store.query(
        f"""WITH {_KEPT},
        hits AS (
            SELECT feature, text, source, score, place, {" + ".join(whole) or "0"} AS whole
            FROM labels WHERE {" AND ".join(where) or "true"}),
        best AS (FROM hits QUALIFY row_number() OVER (PARTITION BY feature ORDER BY whole DESC, place) = 1)
        SELECT {_FACTS}, whole, count(*) OVER () FROM best JOIN kept USING (feature)
        ORDER BY whole DESC, place > 0, score DESC NULLS LAST, length(text), feature LIMIT $limit""",
        {**_parameters(filters), **parameters, "limit": limit},
    )
    return [(_facts(row), row[_N_FACTS]) for row in rows], rows[0][-1] if rows else 0


def on_token(
    store: "Store", ids: Sequence[int], filters: Filters = ALL, *, order: str = "firings", limit: int = 20
) -> tuple[list[OnToken], int]:
    """(features that have one of these tokens among those on which they fire most or strongest, of the pole that fires
    on it more; how many such features there are).

    order: 'firings' (by `of_firings`) or 'value' (by `of_max`), the largest first.
    """
    if order not in _TOKEN_ORDERS:
        raise StoreError(f"order={order!r} is unknown: expected one of {', '.join(_TOKEN_ORDERS)}")
    poles = [("+", "top_tokens", "strong_tokens"), ("-", "bottom_tokens", "weak_tokens")]
    named = " UNION ALL ".join(
        f"""SELECT feature, '{pole}' AS pole,
               unnest(list_filter({column}, lambda t: list_contains($ids::INTEGER[], t.id))) AS token
        FROM {table} WHERE list_has_any(list_transform({column}, lambda t: t.id), $ids::INTEGER[])"""
        for pole, most, strongest in poles
        for column, table in ((most, "store.features"), (strongest, "profiles"))
    )
    rows = store.query(
        f"""WITH {_KEPT},
        named AS ({named}),
        once AS (SELECT DISTINCT feature, pole, token.id AS id, token.n AS n, token.share AS share, token.mean AS mean
                 FROM named),
        poles AS (
            SELECT feature, pole, arg_max(id, n) AS id, sum(n)::BIGINT AS n, sum(n) / sum(n / share) AS of_token,
                   sum(n * mean::DOUBLE) / sum(n) AS mean
            FROM once GROUP BY feature, pole),
        chosen AS (FROM poles QUALIFY row_number() OVER (PARTITION BY feature ORDER BY n DESC, pole) = 1),
        best AS (
            SELECT feature, unnest(arg_min(struct_pack(text := text, source := source, score := score), place))
            FROM labels WHERE feature IN (SELECT feature FROM chosen) GROUP BY feature),
        found AS (
            SELECT {_FACTS}, id, n, n / n_active AS of_firings, of_token, mean,
                   abs(mean) / abs(if(pole = '+', "max", "min")) AS of_max
            FROM chosen JOIN kept USING (feature) LEFT JOIN best USING (feature)
            WHERE best.feature IS NOT NULL OR NOT $labelled)
        SELECT *, count(*) OVER () FROM found ORDER BY {_TOKEN_ORDERS[order]} DESC, n DESC, feature LIMIT $limit""",
        {**_parameters(filters), "ids": list(ids), "labelled": filters.ask_for_label, "limit": limit},
    )
    return [OnToken(_facts(row), *row[_N_FACTS:-1]) for row in rows], rows[0][-1] if rows else 0


def together(store: "Store", number: int) -> tuple[list[Together], int]:
    """(every feature that is on in `FEWEST` windows of the random sample or more in which `number` is on too, by
    number; how many windows the sample has).

    phi: correlation of the two being on in a window or not. Coarser than `Profile.by_phi`, which counts tokens, and
    over all features.
    """
    rows = store.query(
        """WITH mine AS (SELECT "window" FROM store.window_peaks WHERE feature = $feature),
        sizes AS (SELECT (SELECT count(*) FROM store.windows)::DOUBLE AS n, (SELECT count(*) FROM mine)::DOUBLE AS i),
        pairs AS (
            SELECT feature, count(*)::DOUBLE AS j, count(mine."window") AS n_both
            FROM store.window_peaks AS peaks LEFT JOIN mine USING ("window")
            WHERE feature <> $feature GROUP BY feature HAVING n_both >= $fewest)
        SELECT feature, n_both, n_both / (i + j - n_both),
               coalesce((n * n_both - i * j) / nullif(sqrt(i * j * (n - i) * (n - j)), 0), 0)
        FROM pairs, sizes ORDER BY feature""",
        {"feature": number, "fewest": FEWEST},
    )
    ((n,),) = store.query("SELECT count(*) FROM store.windows")
    return [Together(*row) for row in rows], n


def _parameters(filters: Filters) -> dict[str, Any]:
    return asdict(filters)


def _facts(row: Sequence[Any]) -> Facts:
    feature, alive, density, high, low, cluster, text, source, score = row[:_N_FACTS]
    return Facts(
        feature=feature,
        alive=alive,
        density=density,
        max=high,
        min=low,
        cluster=cluster,
        label=text,
        source=source,
        score=score,
    )
