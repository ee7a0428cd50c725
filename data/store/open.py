"""Opens a feature store for reading and for adding explanations: one object, safe to share between threads.

The connection is an in-memory DuckDB to which `features.duckdb` is attached read-only, so any number of processes read
at once; then file access is switched off and the settings are locked, so that nothing inside a store from elsewhere
reaches the disk. Explanations and scores are read from their Parquet parts (by pyarrow) into memory tables, again
whenever the list of parts has changed: what another process adds is there at the next question.
"""

import threading
from collections.abc import Hashable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb

from data.store import read, write
from data.store.bucket import SCHEME, Bucket
from data.store.errors import StoreError
from data.store.files import store_folder
from data.store.parts import Parts
from data.store.place import Disk, Place
from data.store.schema import (
    STORE_FILE,
    Example,
    Explanation,
    Feature,
    Map,
    Page,
    Profile,
    Score,
    Summary,
    Window,
    check_tables,
    check_version,
    migrate,
)


def open_store(address: str | Path) -> "Store":
    """The feature store of a dictionary: RUN (its only dictionary), RUN/ID, or the dictionary's folder.

    An s3://BUCKET/FOLDER is the dictionary's folder on object storage, to read from (`data.store.bucket`).

    Raises StoreError, one line, when there is none yet, when it is damaged and when a newer version made it.
    """
    if isinstance(address, str) and address.startswith(SCHEME):
        return Store(Bucket(address))
    return Store(Disk(store_folder(address)))


class Store:
    """A feature store. A context manager; every method may be called from any thread, and raises StoreError only."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._lock = threading.Lock()
        self._explanations = Parts(
            place, "explanations", Explanation, ["feature", "pole", "source", "explainer", "model"]
        )
        self._scores = Parts(place, "scores", Score, ["explanation_id", "scorer"])
        self._listings: Hashable = None
        self._vocab: list[bytes] | None = None
        self._ids: dict[str, list[int]] | None = None
        self._connection = self._attach()
        try:
            self.meta: dict[str, str] = dict(self.query("SELECT key, value FROM store.meta"))
            self._check(lambda: check_version(self.meta))
            version = int(self.meta["schema"])
            self._check(lambda: check_tables(self._connection.cursor(), "store", version))
            migrate(self._connection, version)
        except BaseException:
            self._connection.close()
            raise
        self._stamp = place.identity()
        self.n_features = int(self.meta.get("d_sae", "0"))
        self.signed = self.meta.get("signed", "").lower() == "true"

    @property
    def name(self) -> str:
        """The name of the dictionary's folder."""
        return self.place.names[-1]

    @property
    def title(self) -> str:
        """RUN/ID by the names of the folders, without the path to them; of a store in no run its name."""
        *_, run, between, name = ("", "", *self.place.names)
        return f"{run}/{name}" if between == "dictionaries" else name

    @property
    def folder(self) -> Path:
        """The dictionary's folder on the disk; StoreError for a store on object storage."""
        return self.place.folder

    @property
    def path(self) -> Path:
        """`features.duckdb` on the disk; StoreError for a store on object storage."""
        return self.folder / STORE_FILE

    # What an index computed

    def summary(self) -> Summary:
        """Counts over the whole store."""
        return read.summary(self)

    def page(
        self,
        search: str = "",
        sort: str = "density",
        descending: bool = True,
        limit: int = 50,
        offset: int = 0,
        alive_only: bool = True,
        min_density: float = 0.0,
        max_density: float = 1.0,
        min_score: float | None = None,
        source: str | None = None,
    ) -> Page:
        """Lines `offset` to `offset + limit` of the feature list.

        search: part of an explanation (any case; % and _ are plain characters), a whole token that the feature fires on
        most, or a feature number. sort: 'feature', 'density', 'max' or 'score'; ties by number, features without a
        score last. source: only features whose best explanation comes from there.
        """
        return read.page(
            self,
            search=search,
            sort=sort,
            descending=descending,
            limit=limit,
            offset=offset,
            alive_only=alive_only,
            min_density=min_density,
            max_density=max_density,
            min_score=min_score,
            source=source,
        )

    def feature(self, feature: int) -> Feature:
        """All that is known of one feature; StoreError when there is no such number."""
        return read.feature(self, feature)

    def profile(self, feature: int) -> Profile | None:
        """Quantiles, tokens, positions, company and place of one feature; None when an older version made the store."""
        return read.profile(self, feature)

    def map(self, *, alive_only: bool = True) -> Map:
        """Where the decoder rows lie in two dimensions; empty when an older version made the store."""
        return read.map_of(self, alive_only=alive_only)

    def features(self, *, alive_only: bool = True) -> list[int]:
        """The numbers of all features, in order; by default of those that fired."""
        return read.features(self, alive_only=alive_only)

    def examples(self, feature: int, *, pole: str | None = None, split: str | None = None) -> list[Example]:
        """Windows with the feature's values, by pole, kind ('interval', 'quantile', 'random', 'top') and rank."""
        return read.examples(self, feature, pole=pole, split=split)

    def examples_of(self, features: Sequence[int]) -> dict[int, list[Example]]:
        """The examples of several features, each as `examples` gives them; features without any are left out."""
        return read.examples_of(self, features)

    def sample(self, split: str) -> dict[int, list[int]]:
        """The token ids of all windows of one split of the random sample, by window number."""
        return read.sample(self, split)

    def sample_active(self, features: Sequence[int]) -> dict[int, list[int]]:
        """The numbers of the sampled windows in which each feature fires; features that never do are left out."""
        return read.sample_active(self, features)

    def background(self, feature: int, n: int, split: str, seed: int, active: bool) -> list[Window]:
        """Up to `n` windows of the random sample on which the feature is on (`active`) or verified to be off.

        The same seed gives the same windows in the same order; a larger `n` continues the list.
        """
        return read.background(self, feature, n=n, split=split, seed=seed, active=active)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """One piece of text for each id, to be shown side by side.

        A character whose bytes are spread over several tokens stands whole on the first of them, '' on the others;
        bytes that are no UTF-8 appear as U+FFFD. Special tokens appear as their name.
        """
        return read.token_texts(self.vocab, ids)

    @property
    def vocab(self) -> list[bytes]:
        """The bytes of every token id."""
        if self._vocab is None:
            self._vocab = read.vocab(self)
        return self._vocab

    def ids_of(self, text: str) -> list[int]:
        """The tokens that are this text, blanks around them and case aside."""
        if self._ids is None:
            self._ids = read.ids_by_text(self.vocab)
        return self._ids.get(read.plain(text), [])

    # What people and models say of it

    def explanations(self, features: Sequence[int] | None = None) -> list[Explanation]:
        """The valid explanations, by feature, best first; all of them, or those of some features."""
        return read.explanations(self, features)

    def scores(self, features: Sequence[int] | None = None) -> list[Score]:
        """The valid scores, by feature; all of them, or those of some features."""
        return read.scores(self, features)

    def add_explanations(self, rows: Sequence[Explanation]) -> None:
        """Append explanations as one Parquet part. A newer row of a key replaces the older one.

        StoreError, and nothing written, when a row names no such feature, an unknown pole or an unknown source.
        """
        write.check_explanations(rows, self.n_features)
        self._append(self._explanations, rows)

    def add_scores(self, rows: Sequence[Score]) -> None:
        """Append scores as one Parquet part. A newer row of a key replaces the older one.

        StoreError, and nothing written, when a row names no such feature or a value that is not finite.
        """
        write.check_scores(rows, self.n_features)
        self._append(self._scores, rows)

    @property
    def warnings(self) -> list[str]:
        """One line for each damaged part, whose rows are missing from what is read."""
        self._refresh()
        return [*self._explanations.warnings.values(), *self._scores.warnings.values()]

    @property
    def state(self) -> Hashable:
        """Which explanations and scores are read: where it is equal, answers are."""
        self._refresh()
        return self._listings

    @property
    def replaced(self) -> bool:
        """Whether a newer index has taken this store's place on the disk since it was opened."""
        return self.place.identity() != self._stamp

    def close(self) -> None:
        """Let go of the file. Reading afterwards is an error."""
        self._connection.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # For read.py

    def query(self, sql: str, parameters: Any = None) -> list[tuple[Any, ...]]:
        """The rows of one question, on a cursor of its own; the memory tables are brought up to date first."""
        self._refresh()
        return self._rows(sql, parameters)

    def _rows(self, sql: str, parameters: Any = None) -> list[tuple[Any, ...]]:
        try:
            with self._connection.cursor() as cursor:
                return cursor.execute(sql, parameters).fetchall()
        except duckdb.Error as error:
            raise self._damaged(error) from error

    def _append(self, parts: Parts, rows: Sequence[Explanation] | Sequence[Score]) -> None:
        try:
            with self._lock:
                parts.append(rows)
        except OSError as error:
            reason = f"{parts.folder} cannot be written ({error})"
            raise StoreError(f"{reason}: free disk space, or mend the rights of the folder") from error

    def _attach(self) -> duckdb.DuckDBPyConnection:
        self.place.check()
        connection = duckdb.connect(":memory:")
        try:
            self.place.attach(connection)
            connection.execute("SET temp_directory = ''")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            read.create_memory(connection)
        except duckdb.Error as error:
            connection.close()
            raise self._damaged(error) from error
        return connection

    def _damaged(self, error: Exception) -> StoreError:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = lines[-1] if lines[0].startswith("Traceback") else lines[0]  # of the file system, in Python
        return StoreError(f"{self.place.file} cannot be read ({reason}): {self.place.remedy}")

    def _check(self, check: Any) -> None:
        try:
            check()
        except (StoreError, duckdb.Error) as error:
            raise self._damaged(error) from error

    def _refresh(self) -> None:
        """Read the Parquet parts again if there are others than last time."""
        with self._lock:
            for _ in range(20):
                listings = (self._explanations.listing(), self._scores.listing())
                if listings == self._listings:
                    return
                try:
                    explanations, scores = self._explanations.rows(listings[0]), self._scores.rows(listings[1])
                except FileNotFoundError:  # another process has just joined the parts
                    continue
                with self._connection.cursor() as cursor:
                    read.fill_memory(cursor, explanations, scores)
                self._listings = listings
                return
            raise StoreError(f"the parts in {self.place.address} keep changing: try again in a moment")
