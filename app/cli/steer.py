"""`sae steer`: base and steered text side by side."""

import dataclasses
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from app.cli.options import COUNT, device_option, json_option

if TYPE_CHECKING:
    from steering.generate import SideBySide

NARROW = 100
"""Columns of a terminal below which the texts stand one under the other."""


@click.command()
@click.argument("address", metavar="RUN[/ID]")
@click.option("--feature", type=click.IntRange(0), default=None, help="Latent whose decoder row is added.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="In units; below 0 pushes the other way.")
@click.option(
    "--unit",
    type=click.Choice(["max", "norm", "raw"]),
    default="max",
    show_default=True,
    help="Of --feature: its largest value on the cached text, the hook's median norm, or 1.",
)
@click.option(
    "--edit",
    "edit_file",
    type=click.Path(path_type=Path),
    default=None,
    help="Saved edits (.json) or a saved vector (.safetensors); --strength multiplies them.",
)
@click.option("--prompt", required=True, help="Text to go on from.")
@click.option("--max-tokens", type=COUNT, default=40, show_default=True, help="Tokens to write.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of sampling, the same for both texts."
)
@click.option("--model-dtype", default=None, help="Precision of the model. [default: the fastest of this machine]")
@device_option
@json_option
def command(
    address: str,
    feature: int | None,
    strength: float,
    unit: str,
    edit_file: Path | None,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    model_dtype: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Add a feature to the model while it writes; its text beside the text without it.

    Example: sae steer runs/demo --feature 12 --strength 2 --prompt "I think that"
    """
    if feature is None and edit_file is None:
        raise click.UsageError("Nothing to steer with: give --feature NUMBER or --edit FILE.")
    from activations import InputError, load_model
    from sae import load_sae
    from steering import SteeringVector
    from steering.files import load_edits
    from steering.generate import side_by_side

    sae = load_sae(address)
    edits: list[Any] = [] if feature is None else [SteeringVector.from_latent(sae, feature, unit=unit)]  # type: ignore[arg-type]
    edits += [] if edit_file is None else load_edits(edit_file)
    if not sae.model_name:
        raise InputError(f"{address} does not say which model it is of: expected metadata.model_name in its cfg.json.")
    _say(f"Loading {sae.model_name} ...")
    model = load_model(sae.model_name, dtype=model_dtype, device=device)
    _say("Writing both texts ...")
    texts = side_by_side(
        model, prompt, edits, strength=strength, max_new_tokens=max_tokens, temperature=temperature, seed=seed
    )
    if as_json:
        about = {"address": address, "feature": feature, "unit": unit, "edit": str(edit_file) if edit_file else None}
        settings = {"strength": strength, "temperature": temperature, "seed": seed}
        click.echo(json.dumps({**about, **settings, **dataclasses.asdict(texts)}))
        return
    parts = [f"feature {feature}" if feature is not None else "", edit_file.name if edit_file else ""]
    name = f"steered: {', '.join(filter(None, parts))}, strength {strength:g}"
    click.echo(_side_by_side(texts, name, shutil.get_terminal_size().columns))
    click.echo(
        f"\nKL(base || steered) {texts.kl:.3f} nats, mean over the {texts.n_base} tokens of the base text; "
        f"perplexity under the base model: base {texts.base_perplexity:.1f}, steered {texts.steered_perplexity:.1f}."
    )


def _side_by_side(texts: "SideBySide", name: str, columns: int) -> str:
    """Both texts with the prompt in front: in two columns where they fit, else one under the other."""
    base, steered = (_printable(texts.prompt + text) for text in (texts.base, texts.steered))
    if columns < NARROW:
        return f"base:\n{base}\n\n{name}:\n{steered}"
    width = (columns - 3) // 2
    left, right = (["", *_wrapped(text, width)] for text in (base, steered))
    left[0], right[0] = "base:", name[:width] + ":"
    left += [""] * (len(right) - len(left))
    right += [""] * (len(left) - len(right))
    return "\n".join(f"{a:{width}} | {b}".rstrip() for a, b in zip(left, right, strict=True))


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]


def _printable(text: str) -> str:
    """Without control characters but line ends and tabs: a model's text must not steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def _say(line: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        click.echo(line, err=True)
