"""What the pages ask of the feature stores, kept open and remembered between reruns. All SQL is in `data.store`.

A store is opened once for all sessions, and anew when its file has been replaced. Answers are remembered by the state
of all its files, the Parquet parts that a running `sae label` adds among them, so that nothing old is shown.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from app.runs import STORE_FILE, Dictionary
from data.store import Example, Feature, Page, Profile, Store, Summary, open_store

Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What the feature list shows, and in which order; the fields are the arguments of `Store.page`."""

    search: str = ""
    sort: str = "density"
    descending: bool = True
    alive_only: bool = True
    min_density: float = 0.0
    max_density: float = 1.0
    min_score: float | None = None
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureView:
    """All that the feature page shows of one feature."""

    feature: Feature
    profile: Profile | None
    """None in a store of an older version."""
    examples: list[Example]
    pieces: list[list[str]]
    """Display text of the tokens of each example."""
    tokens: dict[int, str]
    """Display text of every token id in the feature's tables."""
    names: dict[int, str]
    """Best explanation of each neighbour, and of each feature that fires together with it, that has one."""


def stamp_of(dictionary: Dictionary) -> Stamp:
    """Names, sizes and times of the files of a store; differs when any of them has been replaced or added."""
    parts = [p for folder in ("explanations", "scores") for p in sorted((dictionary.folder / folder).glob("*.parquet"))]
    return _stamp([dictionary.folder / STORE_FILE, *parts])


def _stamp(files: Iterable[Path]) -> Stamp:
    stamps = []
    for file in files:
        try:
            status = file.stat()
        except FileNotFoundError:  # compacted between listing and looking
            continue
        stamps.append((file.name, status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def store_of(dictionary: Dictionary) -> Store:
    """The open store of a dictionary. Raises StoreError when it is missing or damaged."""
    return _store(str(dictionary.folder))


def summary(dictionary: Dictionary) -> Summary:
    """Counts over the store."""
    return _summary(str(dictionary.folder), stamp_of(dictionary))


def page(dictionary: Dictionary, filters: Filters, limit: int, offset: int) -> Page:
    """One page of the feature list."""
    return _page(str(dictionary.folder), stamp_of(dictionary), filters, limit, offset)


def feature_view(dictionary: Dictionary, feature: int) -> FeatureView:
    """Everything about one feature. Raises StoreError when the store has no such feature."""
    return _feature_view(str(dictionary.folder), stamp_of(dictionary), feature)


def _store(folder: str) -> Store:
    """The store reads new Parquet parts by itself, so only another `features.duckdb` makes it open anew."""
    return _open(folder, _stamp([Path(folder) / STORE_FILE]))


@st.cache_resource(max_entries=8, show_spinner=False)  # not closed when it is dropped: another session may be reading
def _open(folder: str, stamp: Stamp) -> Store:  # noqa: ARG001  # the stamp is part of the key
    return open_store(folder)


@st.cache_resource(max_entries=64, show_spinner=False)
def _summary(folder: str, stamp: Stamp) -> Summary:  # noqa: ARG001
    return _store(folder).summary()


@st.cache_resource(max_entries=64, show_spinner=False)
def _page(folder: str, stamp: Stamp, filters: Filters, limit: int, offset: int) -> Page:  # noqa: ARG001
    return _store(folder).page(
        search=filters.search,
        sort=filters.sort,
        descending=filters.descending,
        limit=limit,
        offset=offset,
        alive_only=filters.alive_only,
        min_density=filters.min_density,
        max_density=filters.max_density,
        min_score=filters.min_score,
        source=filters.source,
    )


@st.cache_resource(max_entries=256, show_spinner=False)
def _feature_view(folder: str, stamp: Stamp, index: int) -> FeatureView:  # noqa: ARG001
    return view_of(_store(folder), index)


def view_of(store: Store, index: int) -> FeatureView:
    """Everything about one feature of an open store, not remembered."""
    feature = store.feature(index)
    examples = store.examples(index)
    ids = {t.id for t in [*feature.top_logits, *feature.bottom_logits]}
    ids |= {t.id for t in [*feature.top_tokens, *feature.bottom_tokens]}
    profile = store.profile(index)
    others = {n.feature for n in feature.neighbours}
    if profile is not None:
        ids |= {t.id for t in [*profile.strong_tokens, *profile.weak_tokens]}
        others |= {c.feature for c in [*profile.by_jaccard, *profile.by_phi]}
    return FeatureView(
        feature=feature,
        profile=profile,
        examples=examples,
        pieces=[store.token_texts(example.token_ids) for example in examples],
        tokens={i: store.token_texts([i])[0] for i in ids},
        names={e.feature: e.text for e in reversed(store.explanations(sorted(others)))},
    )
