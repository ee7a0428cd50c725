"""Several processes at one store: reading while it is rebuilt and added to, and builds killed at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.store import BuildOptions, Explanation, build_store, open_store
from tests.planted import VOCAB, planted_codes, planted_store, planted_text

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

READER = """
import json, sys, time
from pathlib import Path
from data.store import open_store
folder, opened, texts, versions = Path(sys.argv[1]), 0, set(), set()
kept = open_store(folder)
print("ready", flush=True)
while not (folder / "stop").exists():
    with open_store(folder) as store:
        feature = store.feature(opened % store.n_features)
        assert len(store.examples(opened % store.n_features)) > 0
        versions.add(store.meta["version"])
    assert kept.meta["version"] == "0" and len(kept.examples(3)) > 0
    texts |= {e.text for e in kept.explanations()}
    opened += 1
print(json.dumps({"opened": opened, "texts": len(texts), "versions": sorted(versions), "replaced": kept.replaced}))
"""

BUILDER = """
import sys
from pathlib import Path
from data.store import BuildOptions, build_store
folder = Path(sys.argv[1])
print("ready", flush=True)
build_store(folder / "features.duckdb", codes=[folder / "codes.parquet"], tokens=[folder / "tokens.parquet"],
            n_features=400, vocab=[b"a"], meta={"version": sys.argv[2]}, options=BuildOptions(threads=1))
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def test_one_process_reads_while_another_rebuilds_and_explains(tmp_path: Path) -> None:
    folder = tmp_path / "planted"
    text = planted_text(60)
    pq.write_table(pa.table(text), tmp_path / "tokens.parquet")
    pq.write_table(pa.table(planted_codes(text, 20, signed=False)), tmp_path / "codes.parquet")

    def build(version: int) -> None:
        build_store(
            folder / "features.duckdb",
            codes=[tmp_path / "codes.parquet"],
            tokens=[tmp_path / "tokens.parquet"],
            n_features=18,
            vocab=VOCAB,
            meta={"version": str(version)},
            options=BuildOptions(memory="256MiB", threads=1),
        )

    planted_store(folder, n_features=20, n_documents=20)
    build(0)
    reader = start(READER, str(folder))
    try:
        for version in range(1, 6):
            build(version)
            with open_store(folder) as store:
                for turn in range(15):
                    row = Explanation.new(feature=turn, text=f"{version} {turn}", source="llm", model=str(version))
                    store.add_explanations([row])
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with open_store(folder) as store:
                if len(store.explanations()) == 75:
                    break
        time.sleep(1)
        (folder / "stop").touch()
        output, errors = reader.communicate(timeout=60)
    finally:
        reader.kill()
        reader.wait()
    assert reader.returncode == 0, errors
    found = json.loads(output)
    assert found["opened"] > 5
    assert found["texts"] == 75
    assert found["versions"][0] == "0"
    assert found["versions"][-1] == "5"
    assert found["replaced"] is True


def test_a_build_killed_at_any_moment_leaves_the_old_store_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = np.arange(60_000)
    text = {
        "row": rows,
        "id": (rows % 97).astype(np.int32),
        "doc": (rows // 300).astype(np.int32),
        "position": (rows % 128).astype(np.int32),
        "ordinary": rows % 128 != 0,
    }
    pq.write_table(pa.table(text), tmp_path / "tokens.parquet")
    fired = np.repeat(rows[text["ordinary"]], 8)
    codes = {
        "row": fired,
        "feature": random.integers(0, 400, len(fired)).astype(np.int32),
        "value": random.random(len(fired), dtype=np.float32) + 0.1,
    }
    pq.write_table(pa.table(codes), tmp_path / "codes.parquet")
    given = {"cfg.json", "codes.parquet", "tokens.parquet", "features.duckdb"}
    (tmp_path / "cfg.json").write_text("{}")

    began = time.monotonic()
    whole = start(BUILDER, str(tmp_path), "old")
    assert whole.wait(120) == 0
    whole.communicate()
    took = time.monotonic() - began
    with open_store(tmp_path) as store:
        before = (store.feature(7), store.examples(7))

    left_something, version = 0, "old"
    for share in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95):
        builder = start(BUILDER, str(tmp_path), f"at {share}")
        time.sleep(share * took)
        os.kill(builder.pid, signal.SIGKILL)
        builder.wait()
        builder.communicate()
        left_something += {path.name for path in tmp_path.iterdir()} > given
        with open_store(tmp_path) as store:
            assert store.meta["version"] in (version, f"at {share}")
            version = store.meta["version"]
            assert (store.feature(7), store.examples(7)) == before
    assert left_something > 0
    last = start(BUILDER, str(tmp_path), "new")
    assert last.wait(120) == 0, last.communicate()[1]
    last.communicate()
    assert {path.name for path in tmp_path.iterdir()} == given
    with open_store(tmp_path) as store:
        assert store.meta["version"] == "new"
        assert (store.feature(7), store.examples(7)) == before
