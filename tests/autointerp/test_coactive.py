"""Co-activation against a dense table of all pairs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autointerp import coactive
from autointerp.coactive import coactive_tables, sampled, sampled_firings

D_SAE, N_ROWS = 40, 3000


def write(folder: Path, fires: np.ndarray, ordinary: np.ndarray) -> tuple[Path, Path]:
    """codes.parquet and tokens.parquet of a table of firings; a latent's sign is that of its row's number."""
    row, feature = np.nonzero(fires & ordinary[:, None])
    value = np.where(row % 2 == 0, 1.0, -1.0).astype(np.float32)
    codes, tokens = folder / "codes.parquet", folder / "tokens.parquet"
    pq.write_table(pa.table({"row": row, "feature": feature.astype(np.int32), "value": value}), codes)
    pq.write_table(pa.table({"row": np.arange(len(fires)), "ordinary": ordinary}), tokens)
    return codes, tokens


def coactive_columns(codes: Path, tokens: Path) -> tuple[pa.Table, int]:
    """(by_jaccard and by_phi of every latent, the tokens that were counted)."""
    fires = sampled_firings([codes], [tokens], D_SAE)
    table = pa.concat_tables(coactive_tables(fires))
    assert table["feature"].to_pylist() == list(range(D_SAE))
    return table, fires.shape[0]


@pytest.fixture
def fires() -> np.ndarray:
    """Latent 1 fires where 0 does and a bit more, 2 where neither does, 3 on every row, 4 never, 5 with 0 on 4 rows."""
    rng = np.random.default_rng(0)
    fires = rng.random((N_ROWS, D_SAE)) < rng.uniform(0.01, 0.3, D_SAE)
    fires[:, 1] = fires[:, 0] | (rng.random(N_ROWS) < 0.01)
    fires[:, 2] &= ~fires[:, 1]
    fires[:, 3], fires[:, 4], fires[:, 5] = True, False, False
    fires[np.flatnonzero(fires[:, 0] & (np.arange(N_ROWS) % 8 != 0))[:4], 5] = True
    return fires


def expected(fires: np.ndarray, i: int, by: str) -> list[tuple[int, int, float, float, float]]:
    n, found = len(fires), []
    for j in range(D_SAE):
        a, b = fires[:, i], fires[:, j]
        both = int((a & b).sum())
        if j != i and both >= 5:
            chance = a.sum() * b.sum() / n
            phi = 0.0 if a.all() or b.all() else np.corrcoef(a, b)[0, 1]
            found.append((j, both, both / (a | b).sum(), chance / (a.sum() + b.sum() - chance), phi))
    column = 2 if by == "by_jaccard" else 4
    return sorted(found, key=lambda pair: (-round(pair[column], 12), pair[0]))[:10]


@pytest.mark.parametrize("block", [1 << 22, 500])
def test_every_number_is_that_of_the_dense_table(
    fires: np.ndarray, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coactive, "BLOCK", block)
    ordinary = np.arange(N_ROWS) % 8 != 0
    columns, n = coactive_columns(*write(tmp_path, fires, ordinary))
    assert n == ordinary.sum()
    for name in ("by_jaccard", "by_phi"):
        for i, found in enumerate(columns[name].to_pylist()):
            wanted = expected(fires[ordinary], i, name)
            assert [(p["feature"], p["n"]) for p in found] == [pair[:2] for pair in wanted]
            got = np.array([[p["jaccard"], p["chance"], p["phi"]] for p in found]).reshape(-1, 3)
            assert got == pytest.approx(np.array([pair[2:] for pair in wanted]).reshape(-1, 3), abs=1e-6)
    assert columns["by_jaccard"].to_pylist()[0][0]["feature"] == 1
    assert columns["by_phi"].to_pylist()[4] == columns["by_phi"].to_pylist()[5] == []


def test_a_sample_is_of_evenly_spread_tokens(
    fires: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = np.arange(N_ROWS) % 8 != 0
    monkeypatch.setattr(coactive, "FIRINGS", int(fires[ordinary].sum()) // 3)
    columns, n = coactive_columns(*write(tmp_path, fires, ordinary))
    assert n == pytest.approx(ordinary.sum() / 3, rel=0.02)
    kept = ordinary & sampled(np.arange(N_ROWS), int(fires[ordinary].sum()) // 3 / fires[ordinary].sum())
    found = [(p["feature"], p["n"]) for p in columns["by_jaccard"].to_pylist()[0]]
    assert found == [pair[:2] for pair in expected(fires[kept], 0, "by_jaccard")]
    residues = np.bincount(np.flatnonzero(sampled(np.arange(128 * 300), 0.1)) % 128, minlength=128)
    assert residues.min() >= 25
    assert residues.max() <= 35
    assert sampled(np.arange(1000), 1.0).all()
