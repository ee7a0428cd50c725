"""What `sae train` takes and what a training is made of cannot drift apart."""

import dataclasses
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from activations.errors import InputError
from app.cli import guarded, main
from app.cli.train import command
from app.pipeline import train_run
from app.recipe import EXPANSION, TOKENS, K, Recipe, recipe_of, training
from sae.settings import Training
from sae.train import begun_with
from tests.tiny import HOOK, planted_rows, planted_run

OTHER: Recipe = {
    "arch": "abstopk",
    "hook": HOOK,
    "d_sae": 48,
    "k": 3,
    "options": {"auxk_weight": 0.25},
    "tokens": 6400,
    "roles": ("user",),
    "live": True,
    "dead_after": 77,
    "batch": 32,
    "lr": 2e-3,
    "seed": 5,
    "order_seed": 6,
    "warmup": 0.0,
    "decay": 0.3,
    "clip": 2.0,
    "k_from": 9,
    "k_anneal": 0.4,
    "ema": 0.5,
    "resample_every": 640,
    "matmul": "float32",
}
"""Every option with another value than its default; abstopk has no penalty to warm up, and --d-sae is --expansion."""


@pytest.fixture
def path(tmp_path) -> Path:
    return planted_run(tmp_path / "run", planted_rows(4000, 16, 20, 3, signed=False)[0]).path


def test_the_options_of_the_command_are_the_recipe_and_what_surrounds_it():
    around = {"run", "name", "track", "keep", "resume", "overwrite", "gpus", "data_parallel", "device", "as_json"}
    assert {parameter.name for parameter in command.params} == around | set(Recipe.__annotations__)


def test_every_setting_follows_from_an_option_and_back():
    plain = training({}, hook="x", d_in=16)
    made = training(OTHER, hook=HOOK, d_in=16)
    same = {f.name for f in dataclasses.fields(Training) if getattr(plain, f.name) == getattr(made, f.name)}
    assert same == {"sparsity_warmup", "hooks", "target_hooks", "base"}
    assert recipe_of(made) == OTHER
    assert training({"arch": "jumprelu", "sparsity_warmup": 0.2}, hook="x", d_in=16).sparsity_warmup == 0.2


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(arch="transcoder", hook="x", target_hook=("y",), d_sae=48, k=3),
        Recipe(arch="topk", hook=("x", "y"), d_sae=48, k=3),
        Recipe(arch="crosscoder", hook=("x", "y"), d_sae=48, k=3, options={"auxk_weight": 0.0}),
        Recipe(arch="clt", hook="x", target_hook=("y",), d_sae=48, k=3),
    ],
)
def test_hooks_follow_from_options_and_back(recipe):
    made = training(recipe, hook="x", d_in=16, widths={"x": 16, "y": 16})
    assert recipe_of(made).items() >= recipe.items()
    assert made.sizes.get("d_out", 16) == 16
    assert recipe_of(made).get("options") == recipe.get("options")


def test_the_defaults_in_the_help_are_those_that_are_taken():
    taken = {field.name: field.default for field in dataclasses.fields(Training)}
    taken |= {"arch": "topk", "expansion": EXPANSION, "k": K}
    for option in command.params:
        if isinstance(option, click.Option) and option.name in taken and taken[option.name] is not None:
            assert option.show_default == str(taken[option.name]) or option.name in ("hook", "roles"), option.name
    assert TOKENS == 10_000_000


def given(**changes: object) -> list[str]:
    recipe = {"--d-sae": 48, "-k": 3, "--tokens": 6400, "--batch": 64, "--warmup": 0, **changes}
    return [str(word) for pair in recipe.items() for word in pair]


def run_command(path: Path, *words: str) -> dict[str, object]:
    result = CliRunner().invoke(command, [str(path), "--json", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_zero_is_an_option_that_was_given(path):
    run_command(path, "--name", "a", *given())
    assert json.loads((path / "dictionaries/a/train.json").read_text())["warmup"] == 0


def test_resume_takes_the_settings_that_the_dictionary_was_begun_with(path):
    run_command(path, "--name", "a", *given())
    (path / "dictionaries/a/cfg.json").unlink()
    weights = (path / "dictionaries/a/sae_weights.safetensors").read_bytes()
    assert not run_command(path, "--name", "a", "--resume")["finished_before"]
    assert (path / "dictionaries/a/sae_weights.safetensors").read_bytes() == weights
    run_command(path, "--name", "a", "--resume", *given())
    with pytest.raises(InputError, match=r"was begun with batch=64, not 32: use the same"):
        train_run(path, name="a", resume=True, batch=32)
    with pytest.raises(InputError, match="was begun with sizes="):
        train_run(path, name="a", resume=True, expansion=5)


def test_resume_begins_what_was_not_begun(path):
    assert run_command(path, "--name", "new", "--resume", *given())["l0"] == pytest.approx(3, abs=0.1)


def test_what_the_sizes_have_beyond_the_options_stays_on_resume(path):
    from activations.run import Run
    from sae.train import train

    sizes = {"d_sae": 48, "k": 3, "auxk_weight": 0.0}
    folder = train(
        Run.open(path), Training(architecture="topk", hook=HOOK, sizes=sizes, n_tokens=6400, batch=64), name="a"
    )
    (folder / "cfg.json").unlink()
    train_run(path, name="a", resume=True)
    assert json.loads((folder / "cfg.json").read_text())["auxk_weight"] == 0


def test_k_may_be_a_fraction_where_a_batch_shares_it_and_nowhere_else():
    made = training({"arch": "batchtopk", "k": 6.5, "d_sae": 64}, hook="h", d_in=16)
    assert made.sizes["k"] == 6.5
    assert training({"arch": "topk", "k": 6.0, "d_sae": 64}, hook="h", d_in=16).sizes["k"] == 6
    with pytest.raises(InputError, match=r"k=6.5 is no whole number: topk keeps exactly k latents a token\."):
        training({"arch": "topk", "k": 6.5, "d_sae": 64}, hook="h", d_in=16)


def test_options_of_the_architecture_come_into_the_dictionary_and_back(path):
    words = ["--arch", "matryoshka", "-o", "detach_inner=false", "--option", "prefixes=[8,16]", *given()]
    run_command(path, "--name", "a", *words)
    folder = path / "dictionaries/a"
    cfg = json.loads((folder / "cfg.json").read_text())
    assert (cfg["detach_inner"], cfg["prefixes"], cfg["sort_by_frequency"]) == (False, [8, 16], True)
    begun = begun_with(folder)
    assert begun is not None
    recipe = recipe_of(begun)
    assert recipe["options"] == {"detach_inner": False, "prefixes": [8, 16]}
    again = training(recipe, hook=HOOK, d_in=16)
    assert again.sizes["prefixes"] == (8, 16)
    assert recipe_of(again)["options"] == {"detach_inner": False, "prefixes": (8, 16)}

    assert run_command(path, "--name", "a", *words)["finished_before"]
    assert run_command(path, "--name", "a", "--resume", "-o", "prefixes=[8,16]")["finished_before"]
    for others in (["-o", "prefixes=[8,32]"], ["-o", "tilt=0.5"]):
        assert "was begun with sizes=" in refused(path, "--name", "a", "--resume", *others)
    assert "was begun with sizes=" in refused(path, "--name", "a", "--arch", "matryoshka", *given())
    assert "was begun with architecture='matryoshka'" in refused(path, "--name", "a", "--resume", "--arch", "topk")


def refused(path: Path, *words: str) -> str:
    result = CliRunner().invoke(command, [str(path), *words])
    assert isinstance(result.exception, InputError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.mark.parametrize(
    ("arch", "option", "says"),
    [
        (
            "topk",
            "detach_inner=true",
            "topk: there is no field 'detach_inner': expected auxk_weight=0.03125, multi_topk=",
        ),
        ("codebook", "help=1", "codebook: there is no field 'help': expected none."),
        ("matryoshka", "detach_inner=maybe", 'matryoshka: detach_inner="maybe": expected true or false.'),
        ("matryoshka", "prefixes=3", "matryoshka: prefixes=3: expected a list of whole numbers."),
        ("matryoshka", "prefixes=[64,32]", "matryoshka: prefixes="),
        ("jumprelu", "loss=banana", "jumprelu: loss="),
        ("topk", "d_in=16", "d_in is not for -o, which sets what an architecture alone has: use --hook."),
        ("topk", "d_sae=64", "d_sae is not for -o, which sets what an architecture alone has: use --d-sae."),
        ("topk", "k=3", "k is not for -o, which sets what an architecture alone has: use -k."),
        ("jumprelu", "k=3", "k is not for -o, which sets what an architecture alone has: use -k."),
        ("jumprelu", "target_l0=3", "target_l0 is not for -o, which sets what an architecture alone has: use -k."),
        ("crosscoder", "widths=[8,8]", "widths is not for -o, which sets what an architecture alone has: use --hook."),
        (
            "crosscoder",
            "scales=[1,1]",
            "scales is not for -o, which sets what an architecture alone has: training sets",
        ),
        ("clt", "layers=3", "layers is not for -o, which sets what an architecture alone has: use --hook."),
        ("transcoder", "d_out=3", "d_out is not for -o, which sets what an architecture alone has: use --target-hook."),
        ("topk", "auxk_weight", "'auxk_weight' is no field with a value: expected FIELD=VALUE"),
        ("topk", "=3", "'=3' is no field with a value: expected FIELD=VALUE"),
        ("topk", "auxk_weight=", "'auxk_weight=' is no field with a value: expected FIELD=VALUE"),
    ],
)
def test_a_wrong_option_of_the_architecture_is_one_line(path, arch, option, says):
    assert refused(path, "--arch", arch, "-o", option, *given()).startswith(says)
    assert not (path / "dictionaries").exists()


def test_a_wrong_option_is_exit_1_without_a_traceback(path, capsys):
    words = ["sae", "train", str(path), "-o", "detach_inner=a\nb", "--arch", "matryoshka", *given()]
    assert guarded(lambda standalone_mode: main.main(words[1:], standalone_mode=standalone_mode)) == 1
    assert capsys.readouterr().err == 'Error: matryoshka: detach_inner="a\\nb": expected true or false.\n'
