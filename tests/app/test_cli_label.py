"""`sae label` as a user types it."""

import json

import click
import pytest
from click.testing import CliRunner, Result

from app.cli import guarded, main
from app.cli.options import feature_numbers
from data.store import open_store
from tests.autointerp.fake_server import MODEL, body, fake_server
from tests.planted import planted_store


def sae_label(*args: object) -> Result:
    """Run `sae label ARGS`; the exit code and the output as a user sees them."""

    def call(standalone_mode: bool) -> None:
        main.main(["label", *(str(arg) for arg in args)], standalone_mode=standalone_mode)

    @click.command(add_help_option=False)
    def wrapper() -> None:
        raise SystemExit(guarded(call))

    return CliRunner().invoke(wrapper)


@pytest.fixture
def folder(tmp_path):
    return planted_store(tmp_path / "d", n_features=12)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["--local", "--base-url", "OPENAI_API_KEY", "--explainer lexical"]),
        (["--llm", "gpt-5-mini"], ["OPENAI_API_KEY", "--local"]),
        (["--base-url", "http://127.0.0.1:9/v1"], ["--llm NAME"]),
        (["--base-url", "http://127.0.0.1:9/v1", "--llm", "x"], ["No server answers at http://127.0.0.1:9/v1"]),
        (["--base-url", "nonsense", "--llm", "x"], ["no usable URL"]),
        (["--local", "--llm", "/no/such.gguf"], ["/no/such.gguf is no file"]),
        (["--explainer", "lexical", "--features", "99"], ["no feature 99: expected 0 to 11"]),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_do(folder, args, parts):
    result = sae_label(folder, *args)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts)


def test_without_a_feature_store_it_names_the_command(tmp_path):
    (tmp_path / "cfg.json").write_text("{}")
    result = sae_label(tmp_path, "--explainer", "lexical")
    assert result.exit_code == 1
    assert "sae index" in result.stderr


@pytest.mark.parametrize(
    "args",
    [["--features", "5-3"], ["--features", "a"], ["--features", "1", "--limit", "2"], ["--explainer", "magic"]],
)
def test_wrong_usage_is_exit_2(folder, args):
    assert sae_label(folder, *args).exit_code == 2


def test_numbers_and_ranges_are_read_once_each():
    context, option = click.Context(main), click.Option(["--features"])
    assert feature_numbers(context, option, "3, 7,5-7,0") == [3, 7, 5, 6, 0]
    for wrong in ("", ",", "1-", "-1", "1-2-3", "1.5", "0-99999999"):
        with pytest.raises(click.BadParameter):
            feature_numbers(context, option, wrong)


def test_rules_for_all_features_and_what_they_are_worth(folder):
    result = sae_label(folder, "--explainer", "lexical")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("11 explained, 11 scored, 0 failed, 0 skipped")
    assert "mean of 11: 1.00 (chance 0.50; with another feature's explanation 0." in result.stdout
    with open_store(folder) as store:
        assert store.summary().n_explained == 11


def test_a_server_labels_and_the_report_is_json(folder):
    with fake_server() as server:
        args = [folder, "--base-url", server.base_url, "--llm", MODEL, "--features", "0-3", "--windows", 4, "--json"]
        told = json.loads(sae_label(*args).stdout)
        assert len(server.judged) <= 4 * 8 * 2
        again = json.loads(sae_label(*args).stdout)
    assert (told["n_explained"], told["n_scored"], told["n_failed"]) == (4, 4, 0)
    assert told["scores"]["balanced_accuracy"] > 0.9
    assert told["tokens_in"] > 0
    assert (again["n_skipped"], again["tokens_in"]) == (4, 0)
    assert again["scores"] == told["scores"]


def test_where_nothing_could_be_read_the_exit_is_1_and_the_reason_is_shown(folder):
    with fake_server() as server:
        server.faults = [body("<html>", "text/html")] * 3
        result = sae_label(folder, "--base-url", server.base_url, "--llm", MODEL, "--features", "0-2")
    assert result.exit_code == 1
    assert "Failed 3 times: the reply is no chat completion (text/html)." in result.stdout


def test_a_budget_that_is_used_up_is_said(folder):
    with fake_server() as server:
        args = ["--base-url", server.base_url, "--llm", MODEL, "--limit", 4, "--budget", "5k"]
        result = sae_label(folder, *args)
    assert result.exit_code == 0
    assert "Stopped early: the budget is used up" in result.stdout
