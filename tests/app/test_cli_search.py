"""`sae search` as a user types it, on a small run of the real model."""

import json
import shutil
from pathlib import Path

import pytest

from app.cli.search import command, lines
from autointerp.search.found import RANKS, Found, Hit
from data.store import Explanation, Facts, open_store
from tests.app.test_cli_steer import sae_command
from tests.data.test_store_search import ATTACKS

TEXT = "The ship sailed at dawn from Liverpool."


@pytest.fixture(scope="module")
def run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run with labels, and a feature called by something that would steer a terminal."""
    path = Path(shutil.copytree(small_run, tmp_path_factory.mktemp("search") / "run"))
    done("label", path, "--explainer", "lexical")
    with open_store(path) as store:
        alive = store.features()
        store.add_explanations(
            [
                Explanation.new(feature=alive[0], text="ships\x1b[31m and\nsailing " + "far " * 100, source="person"),
                Explanation.new(feature=alive[1], text="cooking", source="person"),
            ]
        )
    return path


def done(*args: object) -> str:
    result = sae_command(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def found(*args: object) -> dict[str, object]:
    return json.loads(done("search", *args, "--json"))


def wrong(*args: object) -> str:
    result = sae_command("search", *args)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_words_are_a_table_that_fits_the_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    said = done("search", run, "ship").splitlines()
    assert said[0].split() == ["feature", "words", "density", "score", "label"]
    assert "ships[31m and sailing far" in said[1]
    assert said[1].endswith("…")
    assert len(said[1]) <= 90
    assert "1 of 1 features of " in said[-2]
    assert "blocks.15.hook_resid_post" in said[-2]


def test_meaning_keeps_its_vectors_in_the_dictionary(run):
    with open_store(run) as store:
        alive = store.features()
    told = found(run, "a recipe for soup", "--by", "meaning", "--source", "person")
    assert [hit["facts"]["feature"] for hit in told["hits"]] == [alive[1], alive[0]]
    (vectors,) = run.glob("dictionaries/*/label_vectors.safetensors")
    before = vectors.stat().st_mtime_ns
    assert found(run, "a recipe for soup", "--by", "meaning", "--source", "person") == told
    assert vectors.stat().st_mtime_ns == before


def test_a_token_and_its_features_agree_with_the_store(run):
    told = found(run, "the", "--by", "token", "--limit", 3)
    assert len(told["hits"]) == 3
    with open_store(run) as store:
        for hit in told["hits"]:
            ids = store.ids_of("the")
            feature = store.feature(hit["facts"]["feature"])
            profile = store.profile(feature.feature)
            tokens = {t.id: t for t in [*feature.top_tokens, *profile.strong_tokens] if t.id in ids}
            n = sum(t.n for t in tokens.values())
            assert hit["numbers"]["n"] == n
            assert hit["numbers"]["of_token"] == pytest.approx(n / sum(t.n / t.share for t in tokens.values()))
            assert hit["numbers"]["of_firings"] == pytest.approx(n / feature.n_active)
    assert "'" in done("search", run, "the", "--by", "token", "--rank", "value", "--limit", 3).splitlines()[1]


@pytest.mark.parametrize(("rank", "number"), [("activation", "value"), ("rarity", "rarity"), ("loss", "nats")])
def test_a_prompt_is_ranked_by_each_number(run, rank, number):
    told = found(run, TEXT, "--by", "prompt", "--rank", rank, "--candidates", 6)
    values = [hit["numbers"][number] for hit in told["hits"]]
    assert values == sorted(values, reverse=True)
    assert len(values) == (6 if rank == "loss" else 20)
    assert told["total"] > 20
    assert all(hit["token"].strip() in TEXT for hit in told["hits"])
    assert all(hit["facts"]["label"] for hit in told["hits"])
    if rank == "loss":
        assert max(map(abs, values)) > 1e-3
        assert len(told["notes"]) == 1


def test_another_feature_by_decoder_and_by_company(run):
    near = found(run, 5, "--by", "feature", "--limit", 30)
    assert len(near["hits"]) == 30
    assert [hit["facts"]["feature"] for hit in near["hits"][:10]] == [
        hit["facts"]["feature"] for hit in found(run, 5, "--by", "feature", "--limit", 10)["hits"]
    ]
    for rank in ("phi", "jaccard"):
        assert set(found(run, 5, "--by", "feature", "--rank", rank)["definitions"]) == {"phi", "jaccard", "n"}


@pytest.mark.parametrize("attack", [text for text in ATTACKS if "\x00" not in text])
def test_no_text_does_harm(run, attack):
    text = attack[:1000]
    for by in ("words", "token"):
        result = sae_command("search", run, "--by", by, "--", text)
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.output
    assert wrong(run, "--by", "feature", "--", text).startswith("Error: ")
    result = sae_command("search", f"{run}/{text}", "x")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    with open_store(run) as store:
        assert store.summary().n_features == 512


def test_nothing_found_says_what_to_do(run):
    assert "try --by meaning" in done("search", run, "zzzz")
    assert "Leave out a filter." in done("search", run, "ship", "--source", "llm")
    assert "not one token" in done("search", run, "two words", "--by", "token")
    told = found(run, "zzzz")
    assert (told["hits"], told["total"]) == ([], 0)
    assert told["next_step"]


def test_what_is_missing_names_its_command(run, small_run, tmp_path):
    assert "sae label" in wrong(small_run, "ship")
    assert "sae label" in wrong(small_run, "ship", "--by", "meaning")
    bare = Path(shutil.copytree(run, tmp_path / "bare"))
    next(bare.glob("dictionaries/*/features.duckdb")).unlink()
    assert "has no feature store yet: build it with `sae index" in wrong(bare, "ship")
    assert "nowhere is no run" in wrong(tmp_path / "nowhere", "ship")
    assert "expected firings or value" in wrong(run, "the", "--by", "token", "--rank", "loss")
    assert sae_command("search", run).exit_code == 2
    assert sae_command("search", run, "x", "--by", "magic").exit_code == 2


def test_the_command_offers_every_way_to_ask_and_names_every_order():
    (by,) = [option for option in command.params if option.name == "by"]
    (rank,) = [option for option in command.params if option.name == "rank"]
    assert list(by.type.choices) == list(RANKS)
    for way, ranks in RANKS.items():
        if len(ranks) > 1:
            assert f"{way}: {', '.join(ranks[:-1])} or {ranks[-1]}." in rank.help


def test_a_feature_without_numbers_or_label_has_dashes():
    facts = Facts(
        feature=3, alive=False, density=0.0, max=0.0, min=0.0, cluster=None, label=None, source=None, score=None
    )
    hits = [
        Hit(facts=facts, numbers={"value": 2.0}, token="\n\x1b"),
        Hit(facts=facts, numbers={"value": 2.0, "of_max": 0.5}, token="a"),
    ]
    answer = Found(
        address="a",
        hook="h",
        by="prompt",
        query="q",
        rank="activation",
        hits=hits,
        total=2,
        definitions={"value": "v", "of_max": "m"},
    )
    table = lines(answer, 80)
    assert table[1].split() == ["3", "2.00", "-", r"'\n\x1b'", "dead", "-", "-"]
    assert table[2].split() == ["3", "2.00", "50.0", "%", "'a'", "dead", "-", "-"]
