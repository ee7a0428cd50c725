"""What the steering page asks for, does and shows: one request, both texts, and what the edit cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from app import models
from app.parts.markup import esc
from app.parts.strip import number
from app.runs import Dictionary

if TYPE_CHECKING:
    from steering.generate import SideBySide


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to add to which prompt, and how to go on from it."""

    edit: Path | None
    """A saved edit; None for the feature."""
    feature: int
    sign: int
    unit: str
    strength: float
    prompt: str
    max_new_tokens: int
    temperature: float
    seed: int

    @property
    def words(self) -> str:
        """The edit in a few words, beside the text that it made."""
        if self.edit is not None:
            return f"{self.edit.name}, strength {number(self.strength)}"
        pole = ", negative pole" if self.sign < 0 else ""
        return f"feature {self.feature}{pole}, strength {number(self.strength)} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Both texts, and the request and dictionary that they are of."""

    request: Request
    address: str
    texts: "SideBySide"


def saved_edits(dictionary: Dictionary) -> dict[str, Path]:
    """The edits saved in the dictionary's run, by file name."""
    folder = dictionary.folder.parent.parent / "edits"
    files = [*folder.glob("*.json"), *folder.glob("*.safetensors")]
    return {file.name: file for file in sorted(files) if not file.name.startswith(".")}


def compare(dictionary: Dictionary, request: Request) -> Result:
    """Write both texts. Raises InputError for what the request gets wrong."""
    from steering import Add, SteeringVector
    from steering.files import load_edits
    from steering.generate import side_by_side

    if request.edit is not None:
        edits = load_edits(request.edit)
    else:
        unit = cast(Literal["max", "norm", "raw"], request.unit)
        sae = models.dictionary_of(dictionary)
        edits = [Add(SteeringVector.from_latent(sae, request.feature, sign=request.sign, unit=unit))]
    with models.using_model(dictionary) as model:
        texts = side_by_side(
            model,
            request.prompt,
            edits,
            strength=request.strength,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
        )
    return Result(request=request, address=dictionary.address, texts=texts)


def result_html(result: Result) -> str:
    """The two texts side by side, and figures with their definitions."""
    texts, request = result.texts, result.request
    shared = common_start(texts.base, texts.steered)
    sampled = f"temperature {request.temperature:g}, seed {request.seed}" if request.temperature else "greedy"
    return (
        '<div class="pair">'
        f"{_text('Base', sampled, texts.prompt, texts.base, len(texts.base), 'base')}"
        f"{_text('Steered', request.words, texts.prompt, texts.steered, shared, 'steered')}</div>"
        f'<div class="stats">{_figures(texts)}</div>'
        f'<p class="small muted">{esc(result.address)}. Marked: from where the steered text parts from the base.</p>'
    )


def common_start(base: str, steered: str) -> int:
    """Number of characters that both texts begin with, cut back to the end of a word."""
    same = next(
        (i for i, (a, b) in enumerate(zip(base, steered, strict=False)) if a != b), min(len(base), len(steered))
    )
    if same == len(base) == len(steered):
        return same
    return steered.rfind(" ", 0, same) + 1


def _text(name: str, about: str, prompt: str, text: str, shared: int, style: str) -> str:
    marked = f"<mark>{esc(text[shared:])}</mark>" if shared < len(text) else ""
    start = f'<span class="prompt">{esc(prompt)}</span>{esc(text[:shared])}'
    return (
        f'<div><div class="section">{esc(name)} <span class="muted">{esc(about)}</span></div>'
        f'<div class="gen {style}" dir="auto">{start}{marked}</div></div>'
    )


def _figures(texts: "SideBySide") -> str:
    figures = [
        (
            "KL(base, steered)",
            f"{texts.kl:.3g} nats",
            "Mean over the tokens of the base text: how far the edit moves the next-token distribution.",
        ),
        ("perplexity, base", f"{texts.base_perplexity:.3g}", "Of the base text, under the model without the edit."),
        (
            "perplexity, steered",
            f"{texts.steered_perplexity:.3g}",
            "Of the steered text, under the model without the edit: how unlikely the edit made it.",
        ),
        ("tokens", f"{texts.n_base} / {texts.n_steered}", "Of the base and of the steered text, end mark included."),
    ]
    return "".join(
        f'<div title="{esc(help)}"><div class="k">{esc(name)}</div><div class="v">{esc(value)}</div></div>'
        for name, value, help in figures
    )
