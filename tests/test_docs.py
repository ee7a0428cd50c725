"""The README cannot drift: its commands exist, its snippet runs, its links lead somewhere."""

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import click
import pytest

from app.cli import _COMMANDS, main
from tests.tiny import planted_rows, planted_run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
ARCHITECTURES = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")


def test_every_command_is_in_the_readme_and_no_other():
    code = "\n".join(a or b for a, b in re.findall(r"```\n(.*?)```|`([^`\n]+)`", README, flags=re.S))
    named = set(re.findall(r"(?:^|/|&& )sae ([a-z]+)", code, flags=re.M))
    assert named == set(_COMMANDS)


@pytest.mark.parametrize("name", list(_COMMANDS))
def test_every_command_has_help_and_every_option_says_what_it_does(name):
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help or option.name in ("seed", "explainer"), option.name


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_options_in_the_docs_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for line in re.findall(r"(?:^|`|--no-python )sae ([a-z]+)([^`\n]*)", text, flags=re.M):
        command = main.get_command(click.Context(main), line[0])
        assert command is not None
        if isinstance(command, click.Group):  # the options are those of `sae plan train`
            command = command.get_command(click.Context(command), line[1].split()[0])
            assert command is not None, line
        known = {name for option in command.params for name in [*option.opts, *option.secondary_opts]}
        if line[0] == "bench":
            known |= {"--help"}.union(*map(options_of_benchmark, line[1].split()[:1]))
        for word in re.findall(r"(?<=\s)--?[a-z][a-z-]*", line[1].split("#")[0].split("&&")[0]):
            assert word in known, f"sae {line[0]} {word}"


def options_of_benchmark(name: str) -> set[str]:
    code = (ROOT / "tests" / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    return set(re.findall(r'add_argument\("(--?[a-z][a-z-]*)"', code))


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_table_of_architectures_is_that_of_the_registry():
    from sae.registry import REGISTRY

    table = [line for line in ARCHITECTURES.split("\n## ")[0].splitlines() if line.startswith("| `")]
    expected = []
    for name, entry in REGISTRY.items():
        text = sys.modules[entry.sae.__module__].__doc__ or ""
        sentence = " ".join(text.split("\n\n")[0].split())
        expected.append(f"| `{name}` | {sentence} | `{entry.sparsity}` | {entry.saelens or '-'} |")
    assert sorted(table) == sorted(expected)


def test_the_table_of_options_has_every_field_that_an_architecture_alone_has():
    from app.recipe import elsewhere
    from sae.registry import REGISTRY

    named = set()
    for line in ARCHITECTURES.split("\n## ")[1].splitlines():
        if line.startswith("| `"):
            field, _, of = line.strip("| ").split(" | ")
            named |= {(arch, field.strip("`")) for arch in re.findall(r"`(\w+)`", of)}
    fields = {(arch, field.name) for arch, entry in REGISTRY.items() for field in dataclasses.fields(entry.config)}
    assert named == {(arch, field) for arch, field in fields if field not in elsewhere(arch)}


def test_the_example_of_options_trains_what_it_says(tmp_path):
    run = planted_run(tmp_path / "run", planted_rows(4000, 16, 20, 3, signed=False)[0])
    (example,) = re.findall(r"^sae (train runs/mine .*)$", ARCHITECTURES, flags=re.M)
    command, _, *options = shlex.split(example)
    small = ["--d-sae", "1024", "-k", "3", "--tokens", "640", "--batch", "64", "--device", "cpu"]
    main([command, str(run.path), *options, *small], standalone_mode=False)
    (path,) = run.path.glob("dictionaries/*/cfg.json")
    cfg = json.loads(path.read_text())
    assert (cfg["detach_inner"], cfg["prefixes"]) == (False, [32, 128, 512])


def test_the_table_of_recipes_has_every_default_that_is_not_the_usual_one():
    from sae.base import FittedSAE
    from sae.registry import REGISTRY

    expected = {}
    for name, entry in REGISTRY.items():
        start, until = "-", "-"
        if entry.sparsity_warmup:
            start = next(f"{field.default:g}" for field in dataclasses.fields(entry.config) if field.name == "start_l0")
            until = f"{entry.sparsity_warmup:g}"
        elif entry.k_from != 1:
            start, until = f"{entry.k_from:g}", f"{entry.k_anneal:g}"
        if (entry.lr, start) != (1e-3, "-") and not issubclass(entry.sae, FittedSAE):
            expected[name] = (f"{entry.lr:g}", start, until)
    found = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| (\S+) \|$", RECIPES, flags=re.M)
    assert {name: tuple(rest) for name, *rest in found} == expected
