"""Vectors from elsewhere, as a user types it: families of planted topics, steered search, and docs/vectors.md."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.files import save_sae
from tests.app.test_cli_steer import sae_command
from tests.tiny import planted_run

DOCS = Path(__file__).parents[2] / "docs" / "vectors.md"
TOPICS, D = 4, 32


def planted_vectors(n: int = 4000) -> np.ndarray:
    """Four topics of five subtopics each: a row is a topic, and mostly one of its subtopics."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((D, D)))[0]
    topic = rng.integers(3 * TOPICS, size=n)  # most rows are of no topic
    rows = 0.02 * rng.standard_normal((n, D)) + 2.0 * directions[31]
    for i in np.flatnonzero(topic < TOPICS):
        rows[i] += directions[topic[i]] * rng.uniform(1, 1.5)
        if rng.random() < 0.9:
            rows[i] += directions[4 + 5 * topic[i] + rng.integers(5)] * rng.uniform(1, 1.5)
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    np.save(folder / "rows.npy", planted_vectors())
    done(sae_command("collect", folder / "run", "--vectors", folder / "rows.npy"))
    sizes = ["--arch", "batchtopk", "--d-sae", 32, "-k", 1, "--tokens", "150k", "--batch", 256, "--lr", "3e-3"]
    done(sae_command("train", folder / "run", *sizes))
    return folder / "run"


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def wrong(*args: object) -> str:
    result = sae_command(*args)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_families_of_a_trained_dictionary_are_the_topics(run):
    said = done(sae_command("families", run, "--all-rows"))
    told = json.loads(done(sae_command("families", run, "--all-rows", "--json")))
    top = [family for family in told["families"] if family["round"] == 0]
    assert len(top) in (TOPICS - 1, TOPICS)  # a training may leave one topic to its subtopics
    value = {name: metric["value"] for name, metric in told["metrics"].items()}
    assert value["families.together"] > 0.6 > 5 * value["control.stand_in.families.together"]
    assert f"{len(told['families'])} families of " in said
    assert value["control.independent.families.n"] == 0
    assert "on 4,000 rows of all documents" in said


def test_a_row_is_searched_with_and_steered(run):
    told = json.loads(done(sae_command("families", run, "--all-rows", "--json")))
    parents = [family["parent"] for family in told["families"]]
    asked = json.loads(done(sae_command("retrieve", run, "--row", 3, "--json")))
    assert asked["steered"] == []
    other = next(parent for parent in parents if str(parent) not in asked["query"])
    found = json.loads(done(sae_command("retrieve", run, "--row", 3, "--latent", f"{other}=+2", "--json")))
    assert all(hit["row"] != 3 for hit in found["base"])
    value = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert value[f"steered.latent_{other}.fires"] == 1.0
    assert value[f"base.latent_{other}.fires"] == 0.0
    assert value[f"steered.latent_{other}.auc"] > value[f"base.latent_{other}.auc"] + 0.2
    assert value[f"steered.latent_{other}.auc"] > value[f"control.random.latent_{other}.auc"] + 0.2
    said = done(sae_command("retrieve", run, "--row", 3, "--latent", f"{other}=1", "--limit", 3))
    assert "As asked:" in said
    assert "Steered:" in said
    assert said.count("  row ") == 6


def test_wrong_searches_are_one_line(run, tmp_path):
    tokens = planted_run(tmp_path / "tokens", torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
    save_sae(TopKSAE(TopKConfig(d_in=4, d_sae=4, k=1)), tokens.dictionary("a"))
    assert "no embedder for a text: ask with --row" in wrong("retrieve", run, "a text")
    assert "no row 4000: expected 0 to 3999" in wrong("retrieve", run, "--row", 4000)
    assert "There is no latent 99" in wrong("retrieve", run, "--row", 0, "--latent", "99=1")
    assert "holds a language model's tokens" in wrong("retrieve", tokens.path, "a text")
    assert "lower --min-firings" in wrong("families", run, "--min-firings", "10k")
    assert sae_command("retrieve", run).exit_code == 2
    assert "is no change: expected 12=0" in sae_command("retrieve", run, "--row", 0, "--latent", "12").stderr


@pytest.mark.slow
def test_the_page_on_vectors_is_what_happens(tmp_path, monkeypatch):
    """Its commands, on fewer texts; latent 12 is made one that fires on some of them."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.S)
    assert block is not None
    commands = [shlex.split(line.split("  #")[0])[1:] for line in block[1].splitlines()]
    assert [command[0] for command in commands] == ["collect", "train", "eval", "families", "retrieve", "retrieve"]
    collect, *others, steered = commands
    done(sae_command(*collect, "--tokens", 300))
    for command in others:
        done(sae_command(*command, *(["--tokens", "60k"] if command[0] == "train" else [])))
    families = json.loads(next((tmp_path / "runs/texts/dictionaries").glob("*/families.json")).read_text())
    assert families["rows"] == 300
    latent = next(iter(json.loads(done(sae_command(*steered[:2], "a prayer to God", "--json")))["query"]))
    change = steered[-1].replace("12=", f"{latent}=")
    found = json.loads(done(sae_command(*steered[:-1], change, "--json")))
    assert len(found["base"]) == len(found["steered"]) == 10
    assert all(found["texts"][str(hit["doc"])] for hit in found["steered"])
    value = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert value[f"steered.latent_{latent}.auc"] > value[f"base.latent_{latent}.auc"]
    assert value[f"steered.latent_{latent}.auc"] > value[f"control.random.latent_{latent}.auc"]
    assert value["steered.similarity"] > 0.7
