"""`sae steer` as a user types it."""

import json

import click
import pytest
from click.testing import CliRunner, Result

from app.cli import guarded, main
from app.cli.steer import _printable, _side_by_side
from sae import load_sae
from steering import SteeringVector, ablate
from steering.files import save_edits
from steering.generate import SideBySide

FAST = ["--prompt", "I think that", "--max-tokens", "3"]


def sae_command(*args: object) -> Result:
    """Run `sae ARGS`; the exit code and the output as a user sees them."""

    def call(standalone_mode: bool) -> None:
        main.main([str(arg) for arg in args], standalone_mode=standalone_mode)

    @click.command(add_help_option=False)
    def wrapper() -> None:
        raise SystemExit(guarded(call))

    return CliRunner().invoke(wrapper)


def test_both_texts_are_shown_with_what_the_steering_cost(small_run):
    result = sae_command("steer", small_run, "--feature", 3, "--strength", 2, *FAST)
    assert result.exit_code == 0, result.output
    assert "base:\nI think that" in result.output
    assert "steered: feature 3, strength 2:\nI think that" in result.output
    assert "nats" in result.output


def test_json_for_machines(small_run):
    result = sae_command("steer", small_run, "--feature", 3, "--strength", 0, "--json", *FAST)
    told = json.loads(result.stdout)
    assert told["base"] == told["steered"] != ""
    assert (told["kl"], told["feature"], told["unit"], told["n_base"]) == (0.0, 3, "max", 3)


def test_saved_edits_and_vectors_are_applied(small_run, tmp_path):
    sae = load_sae(small_run)
    vector = SteeringVector.from_latent(sae, 3, unit="norm")
    vector.save(tmp_path / "v.safetensors")
    save_edits(tmp_path / "edits.json", [ablate(sae, 3), ablate(sae, 4)])
    direct = json.loads(sae_command("steer", small_run, "--feature", 3, "--unit", "norm", "--json", *FAST).stdout)
    by_file = json.loads(sae_command("steer", small_run, "--edit", tmp_path / "v.safetensors", "--json", *FAST).stdout)
    assert by_file["kl"] == direct["kl"] > 0
    assert sae_command("steer", small_run, "--edit", tmp_path / "edits.json", *FAST).exit_code == 0


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--feature", "999999"], "no latent 999999"),
        (["--edit", "nowhere.json"], "nowhere.json is missing"),
        (["--edit", "nowhere.safetensors"], "nowhere.safetensors is no steering vector"),
        (["--feature", "3", "--strength", "nan"], "strength=nan"),
        (["--feature", "3", "--device", "tpu"], "'tpu'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_1(small_run, args, part):
    result = sae_command("steer", small_run, *args, *FAST)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert part in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "args", [FAST, ["--feature", "3"], ["--feature", "-3", *FAST], ["--feature", "3", *FAST, "--unit", "ell"]]
)
def test_wrong_usage_is_exit_2(tmp_path, args):
    result = sae_command("steer", tmp_path, *args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_run_that_is_none_is_one_line(tmp_path):
    result = sae_command("steer", tmp_path / "nowhere", "--feature", 3, *FAST)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)


def test_two_columns_on_a_wide_terminal():
    texts = SideBySide(
        prompt="P",
        base=" one\n\ntwo",
        steered=" three",
        kl=0,
        base_perplexity=1,
        steered_perplexity=1,
        n_base=1,
        n_steered=1,
    )
    assert _side_by_side(texts, "steered: x", columns=103).splitlines() == [
        f"{'base:':50} | steered: x:",
        f"{'P one':50} | P three",
        f"{'':50} |",
        f"{'two':50} |",
    ]
    assert _side_by_side(texts, "steered: x", columns=80) == "base:\nP one\n\ntwo\n\nsteered: x:\nP three"


def test_generated_text_cannot_steer_the_terminal():
    assert _printable("a\x1b[2Jb\x07\tc\nd\u202e") == "a[2Jb\tc\nd"
