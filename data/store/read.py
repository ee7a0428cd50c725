"""Each question that is asked of a store: one typed function, one to three parameterised queries.

Two memory tables stand beside the file: `explanations` (the valid ones; `place` 0 is the best of a feature), `scores`.

Which explanation is the best: a person's, then a model's, then the lexical one; among several of a kind the one with
the highest detection score, then the newest. But a model's stands before the lexical one of its pole only if it scored
higher on windows that neither has seen, or if the lexical one has no score: a model has to earn its place.
"""

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from data.store.errors import StoreError
from data.store.schema import (
    DETECTION,
    SOURCES,
    Coactive,
    Example,
    Explanation,
    Feature,
    FeatureRow,
    LossEffect,
    Map,
    Neighbour,
    Page,
    PositionBin,
    Profile,
    Score,
    Summary,
    TokenCount,
    TokenValue,
    Window,
)

if TYPE_CHECKING:
    from data.store.open import Store

_SORTS = {"feature": "feature", "density": "density", "max": '"max"', "score": "score"}

_EXPLANATION = "id, feature, pole, text, source, explainer, model, prompt_version, created"
_SCORE = "explanation_id, feature, scorer, value, lo, hi, n, chance, control, failures, cost_tokens, created, model"
_FEATURE = (
    'feature, alive, n_active, density, "max", "min", mean, q10, q50, q90, hist_edges, hist_counts, '
    "top_logits, bottom_logits, logit_edges, logit_counts, neighbours, top_tokens, bottom_tokens"
)
_PROFILE = (
    "quantiles, strong_tokens, weak_tokens, position_counts, position_means, by_jaccard, by_phi, x, y, cluster, loss"
)
_EXAMPLE = "feature, pole, kind, band, rank, doc, start, split, token_ids, acts, peak, peak_index"


def create_memory(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the empty memory tables."""
    connection.execute(
        """CREATE TABLE explanations (
            id VARCHAR, feature BIGINT, pole VARCHAR, text VARCHAR, source VARCHAR, explainer VARCHAR, model VARCHAR,
            prompt_version VARCHAR, created VARCHAR, score DOUBLE, place BIGINT)"""
    )
    connection.execute(
        """CREATE TABLE scores (
            explanation_id VARCHAR, feature BIGINT, scorer VARCHAR, value DOUBLE, lo DOUBLE, hi DOUBLE, n BIGINT,
            chance DOUBLE, control DOUBLE, failures BIGINT, cost_tokens BIGINT, created VARCHAR, model VARCHAR)"""
    )


def fill_memory(cursor: duckdb.DuckDBPyConnection, explanations: pa.Table, scores: pa.Table) -> None:
    """Replace the contents of the memory tables in one transaction, so that no reader sees half of it."""
    cursor.register("new_explanations", explanations)
    cursor.register("new_scores", scores)
    cursor.execute("BEGIN")
    try:
        cursor.execute("DELETE FROM explanations")
        cursor.execute("DELETE FROM scores")
        cursor.execute(f"INSERT INTO scores SELECT {_SCORE} FROM new_scores ORDER BY feature")
        cursor.execute(
            f"""INSERT INTO explanations
            WITH said AS (
                SELECT {_EXPLANATION}, (SELECT max(value) FROM scores WHERE explanation_id = id AND scorer = $detection)
                       AS score
                FROM new_explanations WHERE text <> ''),
            ranked AS (
                SELECT *, list_position($sources, source) AS rank,
                       max(score) FILTER (source = 'lexical') OVER (PARTITION BY feature, pole) AS lexical_score
                FROM said),
            judged AS (
                SELECT *, if(source = 'llm' AND lexical_score IS NOT NULL
                             AND (score IS NULL OR score <= lexical_score), 3.5, rank) AS standing
                FROM ranked)
            SELECT {_EXPLANATION}, score, row_number() OVER best - 1 AS place FROM judged
            WINDOW best AS (PARTITION BY feature ORDER BY standing, score DESC NULLS LAST, created DESC, pole, id)
            ORDER BY feature, place""",
            {"detection": DETECTION, "sources": list(SOURCES)},
        )
        cursor.execute("COMMIT")
    except BaseException:
        cursor.execute("ROLLBACK")
        raise


def summary(store: "Store") -> Summary:
    """Counts over the whole store."""
    ((n, n_alive, n_explained, n_scored),) = store.query(
        """SELECT count(*), count(*) FILTER (alive),
                  (SELECT count(DISTINCT feature) FROM explanations),
                  (SELECT count(DISTINCT feature) FROM explanations WHERE score IS NOT NULL)
        FROM store.features"""
    )
    return Summary(
        n_features=n,
        n_alive=n_alive,
        n_explained=n_explained,
        n_scored=n_scored,
        n_tokens=int(store.meta.get("n_tokens", "0")),
    )


def page(
    store: "Store",
    *,
    search: str,
    sort: str,
    descending: bool,
    limit: int,
    offset: int,
    alive_only: bool,
    min_density: float,
    max_density: float,
    min_score: float | None,
    source: str | None,
) -> Page:
    """See `Store.page`."""
    if sort not in _SORTS:
        raise StoreError(f"sort={sort!r} is unknown: expected one of {', '.join(_SORTS)}")
    if limit < 0 or offset < 0:
        raise StoreError(f"limit={limit}, offset={offset}: expected 0 or more")
    where = ["density BETWEEN $min_density AND $max_density"]
    parameters: dict[str, Any] = {"min_density": min_density, "max_density": max_density}
    if alive_only:
        where.append("alive")
    if min_score is not None:
        where.append("score >= $min_score")
        parameters["min_score"] = min_score
    if source is not None:
        where.append("source = $source")
        parameters["source"] = source
    if search := search.strip():
        where.append(
            """(feature = $number OR list_has_any(list_transform(top_tokens, lambda t: t.id), $ids::INTEGER[])
               OR list_has_any(list_transform(bottom_tokens, lambda t: t.id), $ids::INTEGER[])
               OR feature IN (SELECT feature FROM explanations WHERE contains(lower(text), lower($search))))"""
        )
        parameters["search"] = search
        parameters["ids"] = store.ids_of(search)
        parameters["number"] = int(search) if search.isascii() and search.isdecimal() and len(search) < 10 else -1
    order = f"{_SORTS[sort]} {'DESC' if descending else 'ASC'} NULLS LAST, feature"
    rows = store.query(
        f"""WITH hits AS (
            SELECT feature, density, "max", "min", alive, text, source, score
            FROM store.features LEFT JOIN (FROM explanations WHERE place = 0) USING (feature)
            WHERE {" AND ".join(where)}),
        shown AS (SELECT *, count(*) OVER () AS total FROM hits ORDER BY {order} LIMIT $limit OFFSET $offset)
        SELECT * FROM shown ORDER BY {order}""",
        {**parameters, "limit": limit, "offset": offset},
    )
    return Page(rows=_page_rows(store, rows), total=rows[0][-1] if rows else _count(store, where, parameters))


def _count(store: "Store", where: list[str], parameters: dict[str, Any]) -> int:
    """How many lines there are, for a page that lies behind the last of them."""
    ((n,),) = store.query(
        f"""SELECT count(*) FROM store.features LEFT JOIN (FROM explanations WHERE place = 0) USING (feature)
        WHERE {" AND ".join(where)}""",
        parameters,
    )
    return int(n)


def _page_rows(store: "Store", rows: list[tuple[Any, ...]]) -> list[FeatureRow]:
    wanted = [row[0] for row in rows]
    found = store.query(
        "SELECT feature, list_transform(top_tokens || bottom_tokens, lambda t: t.id), hist_edges, hist_counts "
        "FROM store.features WHERE feature IN (SELECT unnest($wanted::INTEGER[]))",
        {"wanted": wanted},
    )
    details = {number: (tokens, edges, counts) for number, tokens, edges, counts in found}
    return [
        FeatureRow(
            feature=row[0],
            density=row[1],
            max=row[2],
            min=row[3],
            alive=row[4],
            explanation=row[5],
            source=row[6],
            score=row[7],
            top_tokens=[token_text(store.vocab, id) for id in details[row[0]][0]],
            hist_edges=details[row[0]][1],
            hist_counts=details[row[0]][2],
        )
        for row in rows
    ]


def feature(store: "Store", number: int) -> Feature:
    """See `Store.feature`."""
    rows = store.query(f"SELECT {_FEATURE} FROM store.features WHERE feature = ?", [number])
    if not rows:
        raise StoreError(f"there is no feature {number}: expected 0 to {store.n_features - 1}")
    values = dict(zip(_names(_FEATURE), rows[0], strict=True))
    for name in ("top_logits", "bottom_logits"):
        values[name] = [TokenValue(**entry) for entry in values[name]]
    for name in ("top_tokens", "bottom_tokens"):
        values[name] = [TokenCount(**entry) for entry in values[name]]
    values["neighbours"] = [Neighbour(**entry) for entry in values["neighbours"]]
    return Feature(**values, explanations=explanations(store, [number]), scores=scores(store, [number]))


def profile(store: "Store", number: int) -> Profile | None:
    """See `Store.profile`."""
    _check_number(store, number)
    rows = store.query(f"SELECT {_PROFILE} FROM profiles WHERE feature = ?", [number])
    if not rows:
        return None
    values = dict(zip(_names(_PROFILE), rows[0], strict=True))
    for name in ("strong_tokens", "weak_tokens"):
        values[name] = [TokenCount(**entry) for entry in values[name]]
    for name in ("by_jaccard", "by_phi"):
        values[name] = [Coactive(**entry) for entry in values[name]]
    if values["loss"] is not None:
        values["loss"] = LossEffect(**values["loss"])
    bins = store.query('SELECT "first", "last", n_tokens FROM positions ORDER BY bin')
    fired = zip(bins, values.pop("position_counts"), values.pop("position_means"), strict=True)
    return Profile(
        **values,
        positions=[
            PositionBin(first=first, last=last, n_tokens=n, n_active=n_active, mean=mean)
            for (first, last, n), n_active, mean in fired
        ],
    )


def map_of(store: "Store", *, alive_only: bool) -> Map:
    """See `Store.map`."""
    rows = store.query(
        """SELECT feature, x, y, cluster, density FROM profiles JOIN store.features USING (feature)
        WHERE x IS NOT NULL AND (alive OR NOT ?) ORDER BY feature""",
        [alive_only],
    )
    feature, x, y, cluster, density = map(list, zip(*rows, strict=True)) if rows else ([], [], [], [], [])
    return Map(feature=feature, x=x, y=y, cluster=cluster, density=density)


def features(store: "Store", *, alive_only: bool) -> list[int]:
    """See `Store.features`."""
    rows = store.query("SELECT feature FROM store.features WHERE alive OR NOT ? ORDER BY feature", [alive_only])
    return [row[0] for row in rows]


def examples(store: "Store", number: int, *, pole: str | None, split: str | None) -> list[Example]:
    """See `Store.examples`."""
    _check_number(store, number)
    rows = store.query(
        f"""SELECT {_EXAMPLE} FROM store.examples
        WHERE feature = $feature AND ($pole IS NULL OR pole = $pole) AND ($split IS NULL OR split = $split)
        ORDER BY pole, kind, rank""",
        {"feature": number, "pole": pole, "split": split},
    )
    return [Example(**dict(zip(_names(_EXAMPLE), row, strict=True))) for row in rows]


def examples_of(store: "Store", wanted: Sequence[int]) -> dict[int, list[Example]]:
    """See `Store.examples_of`."""
    rows = store.query(
        f"""SELECT {_EXAMPLE} FROM store.examples WHERE feature IN (SELECT unnest($wanted::INTEGER[]))
        ORDER BY feature, pole, kind, rank""",
        {"wanted": list(wanted)},
    )
    names, found = _names(_EXAMPLE), dict[int, list[Example]]()
    for row in rows:
        found.setdefault(row[0], []).append(Example(**dict(zip(names, row, strict=True))))
    return found


def sample(store: "Store", split: str) -> dict[int, list[int]]:
    """See `Store.sample`."""
    return dict(store.query('SELECT "window", token_ids FROM store.windows WHERE split = ? ORDER BY "window"', [split]))


def sample_active(store: "Store", wanted: Sequence[int]) -> dict[int, list[int]]:
    """See `Store.sample_active`."""
    return dict(
        store.query(
            """SELECT feature, list("window" ORDER BY "window") FROM store.window_peaks
            WHERE feature IN (SELECT unnest($wanted::INTEGER[])) GROUP BY feature""",
            {"wanted": list(wanted)},
        )
    )


def background(store: "Store", number: int, *, n: int, split: str, seed: int, active: bool) -> list[Window]:
    """See `Store.background`."""
    _check_number(store, number)
    rows = store.query(
        """SELECT w."window", w.doc, w.token_ids, if(-coalesce(low, 0) > coalesce(high, 0), low, coalesce(high, 0))
        FROM store.windows AS w
        LEFT JOIN (FROM store.window_peaks WHERE feature = $feature) AS p ON w."window" = p."window"
        WHERE w.split = $split AND (p."window" IS NOT NULL) = $active
        ORDER BY hash(w."window", $seed), w."window" LIMIT $n""",
        {"feature": number, "split": split, "active": active, "seed": seed, "n": n},
    )
    return [Window(window=row[0], doc=row[1], token_ids=row[2], peak=row[3]) for row in rows]


def explanations(store: "Store", wanted: Sequence[int] | None) -> list[Explanation]:
    """See `Store.explanations`."""
    rows = store.query(
        f"""SELECT {_EXPLANATION} FROM explanations
        WHERE $every OR feature IN (SELECT unnest($wanted::BIGINT[])) ORDER BY feature, place""",
        {"every": wanted is None, "wanted": list(wanted or [])},
    )
    return [Explanation(**dict(zip(_names(_EXPLANATION), row, strict=True))) for row in rows]


def scores(store: "Store", wanted: Sequence[int] | None) -> list[Score]:
    """See `Store.scores`."""
    rows = store.query(
        f"""SELECT {_SCORE} FROM scores
        WHERE $every OR feature IN (SELECT unnest($wanted::BIGINT[])) ORDER BY feature, explanation_id, scorer""",
        {"every": wanted is None, "wanted": list(wanted or [])},
    )
    return [Score(**dict(zip(_names(_SCORE), row, strict=True))) for row in rows]


def vocab(store: "Store") -> list[bytes]:
    """The bytes of every token id, in order."""
    rows = store.query("SELECT id, bytes FROM store.vocab ORDER BY id")
    if [row[0] for row in rows] != list(range(len(rows))):
        raise StoreError(f"{store.place.file} has gaps in its vocabulary: {store.place.remedy}")
    return [row[1] for row in rows]


def token_texts(entries: Sequence[bytes], ids: Sequence[int]) -> list[str]:
    """See `Store.token_texts`.

    A character is given to the token in which it begins. So each token is decoded together with as many of the bytes
    that follow it as its last character still needs.
    """
    pieces, texts = [_bytes(entries, id) for id in ids], []
    borrowed = 0  # bytes at the head of this token that the one before it has shown already
    for place, piece in enumerate(pieces):
        taken = min(borrowed, len(piece))
        borrowed -= taken
        text = piece[taken:]
        rest = b"".join(pieces[place + 1 : place + 4])
        needed = _missing(text, rest) if text else 0
        texts.append((text + rest[:needed]).decode("utf-8", errors="replace"))
        borrowed += needed
    return texts


def _missing(text: bytes, rest: bytes) -> int:
    """How many bytes of `rest` complete the last character of `text`; 0 when they cannot."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(text)
    open_bytes = decoder.getstate()[0]
    if not open_bytes:
        return 0
    for n in range(1, min(3, len(rest)) + 1):
        try:
            (open_bytes + rest[:n]).decode("utf-8")
            return n
        except UnicodeDecodeError:
            continue
    return 0


def token_text(entries: Sequence[bytes], id: int) -> str:
    """One token on its own."""
    return _bytes(entries, id).decode("utf-8", errors="replace")


def _bytes(entries: Sequence[bytes], id: int) -> bytes:
    """The bytes of a token; ids beyond the vocabulary (padding of the embedding matrix) show as their number."""
    return entries[id] if 0 <= id < len(entries) else f"<{id}>".encode()


def ids_by_text(entries: Sequence[bytes]) -> dict[str, list[int]]:
    """Token ids by their plain text."""
    found: dict[str, list[int]] = {}
    for id in range(len(entries)):
        found.setdefault(plain(token_text(entries, id)), []).append(id)
    return found


def plain(text: str) -> str:
    """The text without blanks around it and without case."""
    return text.strip().casefold()


def _check_number(store: "Store", number: int) -> None:
    if not 0 <= number < store.n_features:
        raise StoreError(f"there is no feature {number}: expected 0 to {store.n_features - 1}")


def _names(columns: str) -> list[str]:
    return [name.strip('"') for name in columns.split(", ")]
