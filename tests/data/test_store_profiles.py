"""Profiles against the same numbers computed densely from the planted text and codes; and older stores."""

from pathlib import Path

import duckdb
import numpy as np
import pytest

from data.store import QUANTILES, open_store
from tests.planted import CONTEXT, planted_codes, planted_store, planted_text

N, N_DOCUMENTS, BINS = 20, 60, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_store(tmp_path_factory.mktemp("run") / "demo", N, signed=True, n_documents=N_DOCUMENTS)


@pytest.fixture(scope="module")
def dense() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The text, and every value of every feature on it."""
    text = planted_text(N_DOCUMENTS)
    codes = planted_codes(text, N, signed=True)
    z = np.zeros((len(text["row"]), N), np.float32)
    z[codes["row"], codes["feature"]] = codes["value"]
    return text, z


def test_quantiles_are_of_the_values_that_are_not_zero(folder: Path, dense: tuple) -> None:
    with open_store(folder) as store:
        for number in range(N):
            values = dense[1][:, number].astype(np.float64)
            values = values[values != 0]
            profile = store.profile(number)
            assert profile is not None
            if len(values) == 0:
                assert profile.quantiles == []
                continue
            assert profile.quantiles == pytest.approx(np.quantile(values, QUANTILES).tolist(), rel=1e-6)
            feature = store.feature(number)
            assert [feature.q10, feature.q50, feature.q90] == [profile.quantiles[i] for i in (2, 4, 6)]
            assert feature.dense == (len(values) / dense[0]["ordinary"].sum() > 0.1)


def test_positions_count_every_firing_once(folder: Path, dense: tuple) -> None:
    text, z = dense
    bins = text["position"] * BINS // CONTEXT
    with open_store(folder) as store:
        for number in range(N):
            profile = store.profile(number)
            assert profile is not None
            assert [(p.first, p.last) for p in profile.positions] == [(8 * i, 8 * i + 7) for i in range(BINS)]
            for place, found in enumerate(profile.positions):
                here = (bins == place) & text["ordinary"]
                values = z[here, number]
                assert found.n_tokens == here.sum()
                assert found.n_active == (values != 0).sum()
                assert found.mean == pytest.approx(values.sum() / max(found.n_active, 1), rel=1e-5)


def test_strong_tokens_are_by_mean_value_of_three_firings_or_more(folder: Path, dense: tuple) -> None:
    text, z = dense
    occurrences = np.bincount(text["id"][text["ordinary"]])
    with open_store(folder) as store:
        n_found = 0
        for number in range(N):
            profile = store.profile(number)
            assert profile is not None
            for sign, found in ((1, profile.strong_tokens), (-1, profile.weak_tokens)):
                values = sign * z[:, number]
                means = {
                    int(token): values[hits].mean(dtype=np.float64)
                    for token in np.unique(text["id"])
                    if (hits := (values > 0) & (text["id"] == token)).sum() >= 3
                }
                best = sorted(means, key=lambda token: -means[token])[:10]
                assert [token.id for token in found] == best
                for token in found:
                    hits = (values > 0) & (text["id"] == token.id)
                    assert token.n == hits.sum()
                    assert token.share == pytest.approx(token.n / occurrences[token.id])
                    assert sign * token.mean == pytest.approx(means[token.id], rel=1e-6)
                n_found += len(found)
        assert n_found > N


def test_a_store_of_schema_1_opens_and_says_that_it_has_no_profiles(tmp_path: Path) -> None:
    folder = planted_store(tmp_path / "demo", N, n_documents=10)
    with open_store(folder) as store:
        before = store.feature(3), store.examples(3)
    with duckdb.connect(str(folder / "features.duckdb")) as connection:
        connection.execute("DROP TABLE profiles")
        connection.execute("DROP TABLE positions")
        connection.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")
    with open_store(folder) as store:
        assert (store.feature(3), store.examples(3)) == before
        assert store.profile(3) is None
        assert store.map().feature == []
