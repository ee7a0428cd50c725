"""`sae collect` from every source, `sae train --live`, `sae runs`, `sae clean`: through the command line."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from activations.run import Run
from tests.activations.test_ranks import tiny_folder  # noqa: F401  (a fixture)

SAE = str(Path(sys.executable).with_name("sae"))
HOOK = "blocks.0.hook_resid_post"


def sae(*arguments: object) -> str:
    done = subprocess.run([SAE, *map(str, arguments)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wrong(*arguments: object) -> str:
    done = subprocess.run([SAE, *map(str, arguments)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_labelled_set_keeps_its_labels(tiny_folder, tmp_path):  # noqa: F811
    corpus = tmp_path / "reviews.jsonl"
    reviews = [{"review": f"It was a {word} film, number {i}.", "stars": i % 3} for i, word in enumerate(["good"] * 60)]
    corpus.write_text("".join(json.dumps(review) + "\n" for review in reviews))
    columns = ["--text-column", "review", "--label-column", "stars", "--layout", "documents"]
    sae("collect", tmp_path / "run", "--model", tiny_folder, "--hook", HOOK, "--corpus", corpus, *columns)
    cache = Run.open(tmp_path / "run").activations(HOOK)
    tokens = cache.tokens(0)
    assert cache.labels == ["0", "1", "2"]
    assert tokens.labels is not None
    assert (tokens.labels == tokens.docs % 3).all()
    assert int((tokens.positions == 0).sum()) == 60
    said = wrong("collect", tmp_path / "run", "--model", tiny_folder, "--hook", HOOK, "--corpus", corpus, *columns[:2])
    assert "was made with" in said


@pytest.mark.slow
def test_a_chat_is_trained_on_by_role_measured_and_indexed(tiny_folder, tmp_path):  # noqa: F811
    corpus = tmp_path / "chats.jsonl"
    turns = [
        [{"role": "user", "content": f"What is {i} plus {j}?"}, {"role": "assistant", "content": f"It is {i + j}."}]
        for i in range(20)
        for j in range(20)
    ]
    corpus.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    run = tmp_path / "run"
    sae("collect", run, "--model", tiny_folder, "--hook", HOOK, "--corpus", corpus, "--layout", "chat")
    assert "no role 'narrator': expected one of template, system, user, assistant, tool" in wrong(
        "train", run, "--role", "narrator"
    )
    sae("train", run, "--role", "assistant", "--d-sae", 64, "-k", 4, "--tokens", "20k", "--batch", 256, "--name", "a")
    sae("eval", run, "--contexts", 16)
    sae("index", run)
    metrics = json.loads((run / "dictionaries" / "a" / "eval.json").read_text())["metrics"]
    assert metrics["fvu"]["value"] < 0.9
    assert metrics["delta_ce"]["n"] > 16


def test_vectors_from_a_file_train_and_are_measured(tmp_path):
    rows = np.random.default_rng(0).standard_normal((2000, 12)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    run = tmp_path / "run"
    assert "vectors: 2,000 rows of 12, 2,000 ordinary" in sae("collect", run, "--vectors", tmp_path / "rows.npy")
    sae("train", run, "--d-sae", 32, "-k", 4, "--tokens", "20k", "--batch", 256)
    assert "fvu" in sae("eval", run)
    assert "holds vectors, which are no tokens" in wrong("index", run)


@pytest.mark.slow
def test_documents_become_sentence_embeddings(tmp_path):
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"Sentence number {i} about the sea."}) + "\n" for i in range(50)))
    run = tmp_path / "run"
    said = sae("collect", run, "--embedder", "all-minilm-l6-v2", "--corpus", corpus)
    assert "vectors: 50 rows of 384, 50 ordinary" in said
    cache = Run.open(run).activations("vectors")
    np.testing.assert_allclose(cache.rows(0).norm(dim=1).numpy(), 1.0, rtol=1e-5)
    assert cache.tokens(0).docs.tolist() == list(range(50))


@pytest.mark.slow
def test_training_straight_from_the_model_resumes_exactly_and_equals_training_from_disk(tiny_folder, tmp_path):  # noqa: F811
    train = ["--live", "--hook", HOOK, "--d-sae", 64, "-k", 4, "--tokens", "60k", "--batch", 256]
    collect = ["--model", tiny_folder, "--tokens", "150k"]
    live, disk = tmp_path / "live", tmp_path / "disk"
    assert f"sae train {live} --live" in sae("collect", live, *collect, "--tokens-only")
    sae("train", live, *train, "--name", "a")
    sae("collect", disk, *collect, "--hook", HOOK)
    sae("train", disk, *train, "--name", "a")
    weights = "dictionaries/a/sae_weights.safetensors"
    assert (live / weights).read_bytes() == (disk / weights).read_bytes()
    assert not (live / "activations" / HOOK).exists()


@pytest.mark.slow
def test_a_trainer_follows_a_capture_in_another_process(tiny_folder, tmp_path):  # noqa: F811
    collect = [SAE, "collect", str(tmp_path / "run"), "--model", str(tiny_folder), "--hook", HOOK, "--tokens", "1M"]
    run = tmp_path / "run"
    with subprocess.Popen(collect, stdout=subprocess.DEVNULL) as capture:
        while not (run / "activations" / HOOK / "shard-00000.json").exists():
            assert capture.poll() is None
            time.sleep(0.01)
        capture.send_signal(signal.SIGSTOP)  # it is at work, and slow
        train = ["--live", "--d-sae", "64", "-k", "4", "--tokens", "900k", "--batch", "4096", "--name", "a"]
        with subprocess.Popen([SAE, "train", str(run), *train], stdout=subprocess.DEVNULL) as training:
            time.sleep(8)
            assert training.poll() is None  # it waits
            capture.send_signal(signal.SIGCONT)
            assert training.wait(timeout=200) == 0
        assert capture.wait(timeout=200) == 0
    sae("train", run, *train[:-1], "b")
    a, b = ((run / "dictionaries" / name / "sae_weights.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_clean_drops_what_can_be_made_again_and_nothing_else(tiny_folder, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    collect = ["collect", run, "--model", tiny_folder, "--hook", HOOK, "--tokens", "20k"]
    sae(*collect)
    sae("train", run, "--d-sae", 64, "-k", 4, "--tokens", "20k", "--batch", 256, "--name", "a")
    left = run / "dictionaries" / "a" / ".index"  # by an index that was killed
    left.mkdir()
    (left / "plan.json").write_text("{}")
    shard = run / "activations" / HOOK / "shard-00000.safetensors"
    before, kept = shard.read_bytes(), (run / "dictionaries/a/sae_weights.safetensors").read_bytes()
    assert "would be freed" in sae("clean", run, "--dry-run")
    assert shard.exists()
    assert left.exists()
    freed = json.loads(sae("clean", run, "--json"))["freed"]
    assert freed > len(before)
    assert not shard.parent.exists()
    assert not left.exists()
    assert (run / "dictionaries/a/sae_weights.safetensors").read_bytes() == kept
    assert "nothing to drop" in sae("clean", run)
    assert "has no activations at" in wrong("train", run, "--hook", HOOK)
    sae(*collect)
    assert shard.read_bytes() == before
    listed = json.loads(sae("runs", tmp_path, "--json"))[0]
    assert listed["hooks"] == {HOOK: {"rows": 19968, "complete": True, "bytes": listed["hooks"][HOOK]["bytes"]}}


def test_wrong_sources_are_one_line(tmp_path):
    run = tmp_path / "run"
    assert "'heap' is unknown: expected one of packed, documents, chat" in wrong("collect", run, "--layout", "heap")
    assert "take --layout documents" in wrong("collect", run, "--label-column", "stars")
    assert "hold no sequence of 128: raise --tokens" in wrong("collect", run, "--tokens", "100")
    assert "dtype 'int4' is unknown: expected one of float32" in wrong("collect", run, "--dtype", "int4")
    assert "nowhere.npy" in wrong("collect", run, "--vectors", tmp_path / "nowhere.npy")
    assert not run.exists()
