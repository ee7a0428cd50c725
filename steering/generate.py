"""Base and steered text side by side, from one prompt and one seed, with what the steering cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from activations.errors import InputError
from activations.model import Model
from steering.apply import steer
from steering.edit import Edit
from steering.vector import SteeringVector


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Two continuations of one prompt and three figures."""

    prompt: str
    base: str
    """What the model goes on with by itself; the prompt is not in it."""
    steered: str
    kl: float
    """Mean KL(base || steered) of the next-token distributions over the `n_base` tokens of `base`, nats."""
    base_perplexity: float
    """Perplexity of the base continuation under the base model."""
    steered_perplexity: float
    """Perplexity of the steered continuation under the base model: how unlikely the steering made the text."""
    n_base: int
    """Tokens of the base continuation, its end mark included."""
    n_steered: int


def side_by_side(
    model: Model,
    prompt: str,
    edits: SteeringVector | Edit | Sequence[SteeringVector | Edit],
    *,
    strength: float = 1.0,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> SideBySide:
    """Go on from `prompt` without and with the edits, and compare.

    temperature: 0 takes the likeliest token each time; above 0 both texts are sampled with the same `seed`.
    The figures are at temperature 1 whatever the texts were made with. Raises InputError for an empty prompt or
    max_new_tokens below 1, and as `steer` does.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise InputError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}: expected at least 1 and at least 0."
        )
    ids = model.encode(prompt)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with steer(model, edits, strength):  # first, since this is where wrong edits show
        steered_ids = _ids(model.generate(ids, **settings))
    base_ids = _ids(model.generate(ids, **settings))
    start = ids.shape[1]
    base = log_probabilities(model, base_ids, start)
    with steer(model, edits, strength):
        steered = log_probabilities(model, base_ids, start)
    other = log_probabilities(model, steered_ids, start)
    return SideBySide(
        prompt=prompt,
        base=_text(model, base_ids, start),
        steered=_text(model, steered_ids, start),
        kl=mean_kl(base, steered),
        base_perplexity=_perplexity(base, base_ids[:, start:]),
        steered_perplexity=_perplexity(other, steered_ids[:, start:]),
        n_base=base_ids.shape[1] - start,
        n_steered=steered_ids.shape[1] - start,
    )


def log_probabilities(model: Model, ids: Int[Tensor, "batch time"], start: int) -> Float[Tensor, "batch new vocab"]:
    """Log-probabilities (float32) for the tokens from `start` on, each given all before it."""
    return model(ids)[:, start - 1 : -1].float().log_softmax(dim=-1)


def mean_kl(base: Float[Tensor, "*places vocab"], other: Float[Tensor, "*places vocab"]) -> float:
    """Mean over places of KL(base || other), nats, from log-probabilities. Exactly 0 when both are equal."""
    return float((base.exp() * (base - other)).sum(dim=-1).mean())


def _perplexity(log_p: Float[Tensor, "batch new vocab"], ids: Int[Tensor, "batch new"]) -> float:
    return float(log_p.gather(-1, ids[..., None].to(log_p.device)).mean().neg().exp())


def _text(model: Model, ids: Int[Tensor, "1 time"], start: int) -> str:
    return str(model.tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def _ids(generated: str | Tensor) -> Tensor:
    assert isinstance(generated, Tensor)  # ids were given, so ids came
    return generated
