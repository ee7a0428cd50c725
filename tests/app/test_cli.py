"""The command line: one plain line for wrong input, the right exit codes, results for machines."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SAE = str(Path(sys.executable).with_name("sae"))


def sae(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SAE, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=280)


@pytest.fixture(scope="module")
def copied_run(small_run, tmp_path_factory):
    return Path(shutil.copytree(small_run, tmp_path_factory.mktemp("cli") / "run"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "nowhere"], "nowhere is no run"),
        (["eval", "nowhere"], "nowhere is no run"),
        (["index", "nowhere"], "nowhere is no run"),
        (["label", "nowhere", "--explainer", "lexical"], "nowhere"),
        (["steer", "nowhere", "--feature", "1", "--prompt", "x"], "nowhere is no run"),
        (["collect", "new", "--corpus", "missing.txt"], "missing.txt"),
        (["collect", "new", "--corpus", "empty.jsonl"], "empty.jsonl"),
        (["collect", "new", "--hook", "blocks.99.hook_resid_post"], "No hook 'blocks.99.hook_resid_post'"),
        (["collect", "new", "--model", "no/such-model"], "Model 'no/such-model' could not be loaded"),
    ],
)
def test_wrong_input_is_one_line_and_exit_1(tmp_path, arguments, says):
    (tmp_path / "empty.jsonl").write_text("")
    done = sae(*arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert says in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["banana"], "No command 'banana': expected one of demo, collect"),
        (["train"], "Missing argument"),
        (["train", "x", "--tokens", "many"], "'many' is no count: expected a number such as 4096, 500k, 2M or 1.5B"),
    ],
)
def test_wrong_usage_is_exit_2(arguments, says):
    done = sae(*arguments)
    assert done.returncode == 2
    assert says in done.stderr


def test_k_above_the_width_is_refused(copied_run):
    done = sae("train", copied_run, "--d-sae", "16", "-k", "17", "--name", "x")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "k=17 is out of range: expected 0 < k <= d_sae=16" in done.stderr


def test_several_dictionaries_ask_for_one(copied_run):
    made = sae(
        "train",
        copied_run,
        "--arch",
        "abstopk",
        "--d-sae",
        "64",
        "-k",
        "4",
        "--tokens",
        "20k",
        "--name",
        "two",
        "--json",
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["l0"] == 4
    done = sae("eval", copied_run)
    assert done.returncode == 1
    assert "has 2 dictionaries: name one of" in done.stderr
    done = sae("eval", f"{copied_run}/two", "--contexts", "4", "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert metrics["l0"]["value"] == 4
    assert 0 < metrics["fvu"]["value"] < 1
    assert metrics["delta_ce"]["lo"] <= metrics["delta_ce"]["value"] <= metrics["delta_ce"]["hi"]
    shutil.rmtree(copied_run / "dictionaries" / "two")


def test_a_corrupt_shard_is_named_before_training(copied_run, tmp_path):
    run = Path(shutil.copytree(copied_run, tmp_path / "run"))
    shard = next(run.glob("activations/blocks*/shard-00000.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 255
    shard.write_bytes(bytes(data))
    done = sae("train", run, "--d-sae", "64", "-k", "4", "--tokens", "20k", "--name", "x")
    assert done.returncode == 1
    assert f"{shard} is damaged" in done.stderr


def test_a_corrupt_store_is_named(copied_run, tmp_path):
    run = Path(shutil.copytree(copied_run, tmp_path / "run"))
    store = next(run.glob("dictionaries/*/features.duckdb"))
    store.write_bytes(b"junk" * 5000)
    done = sae("label", run, "--explainer", "lexical")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "features.duckdb" in done.stderr


def test_labels_without_a_server_or_key_say_how(copied_run):
    done = sae("label", copied_run)
    assert done.returncode == 1
    assert "--local" in done.stderr
    assert "OPENAI_API_KEY" in done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    done = sae("label", copied_run, "--base-url", url, "--llm", "x", "--limit", "1")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert url in done.stderr


def test_runs_lists_what_there_is(copied_run):
    rows = json.loads(sae("runs", copied_run.parent, "--json").stdout)
    assert rows[0]["dictionaries"] == [p.name for p in (copied_run / "dictionaries").iterdir()]
    assert "No runs in" in sae("runs", copied_run / "dictionaries").stdout


def test_steer_prints_both_texts(copied_run):
    done = sae(
        "steer",
        copied_run,
        "--feature",
        "3",
        "--strength",
        "6",
        "--prompt",
        "The weather is",
        "--max-tokens",
        "8",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout)
    assert texts["prompt"] == "The weather is"
    assert texts["base"]
    assert texts["steered"] != texts["base"]
