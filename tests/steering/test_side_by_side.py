"""Base and steered text, and their figures, against sums by hand."""

import pytest
import torch

from activations import InputError, Model
from steering import steer
from steering.generate import mean_kl, side_by_side

PROMPT = "w3 w14 w15 w9 w26"
TOKENS = 12


def continuation(model: Model) -> torch.Tensor:
    return model.generate(model.encode(PROMPT), max_new_tokens=TOKENS)


def test_the_texts_are_the_models_own_and_the_steered_models(tiny, vector):
    both = side_by_side(tiny, PROMPT, vector, max_new_tokens=TOKENS)
    base = continuation(tiny)
    with steer(tiny, vector):
        steered = continuation(tiny)
    assert both.base == tiny.tokenizer.decode(base[0, 5:], skip_special_tokens=True)
    assert both.steered == tiny.tokenizer.decode(steered[0, 5:], skip_special_tokens=True)
    assert both.base != both.steered
    assert (both.prompt, both.n_base, both.n_steered) == (PROMPT, TOKENS, TOKENS)


def test_strength_0_gives_equal_texts_and_kl_0(tiny, vector):
    both = side_by_side(tiny, PROMPT, vector, strength=0.0, max_new_tokens=TOKENS)
    assert both.steered == both.base
    assert both.kl == 0.0
    assert both.steered_perplexity == both.base_perplexity


def test_kl_and_perplexity_are_those_of_the_definitions(tiny, vector):
    both = side_by_side(tiny, PROMPT, vector, max_new_tokens=TOKENS)
    ids = continuation(tiny)
    with steer(tiny, vector):
        q = tiny(ids)[0].softmax(dim=-1)
        steered = continuation(tiny)
    p = tiny(ids)[0].softmax(dim=-1)
    places = range(4, 4 + TOKENS)  # the places whose next token is one of the continuation's
    kl = sum(float((p[i] * (p[i] / q[i]).log()).sum()) for i in places) / TOKENS
    assert both.kl == pytest.approx(kl, rel=1e-4)
    r = tiny(steered)[0].softmax(dim=-1)
    for figure, probabilities, text in (
        (both.base_perplexity, p, ids),
        (both.steered_perplexity, r, steered),
    ):
        nll = -sum(float(probabilities[i, text[0, i + 1]].log()) for i in places) / TOKENS
        assert figure == pytest.approx(float(torch.tensor(nll).exp()), rel=1e-4)


def test_sampling_is_seeded_alike_for_both_and_leaves_the_callers_random_state(tiny, vector):
    before = torch.random.get_rng_state()
    first = side_by_side(tiny, PROMPT, vector, max_new_tokens=TOKENS, temperature=1.0, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert side_by_side(tiny, PROMPT, vector, max_new_tokens=TOKENS, temperature=1.0, seed=3) == first
    assert side_by_side(tiny, PROMPT, vector, max_new_tokens=TOKENS, temperature=1.0, seed=4).base != first.base
    unsteered = side_by_side(tiny, PROMPT, vector, strength=0.0, max_new_tokens=TOKENS, temperature=1.0, seed=3)
    assert unsteered.steered == unsteered.base == first.base


def test_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert mean_kl(p, q) == pytest.approx(0.5 * torch.log(torch.tensor(4 / 3)).item())
    assert mean_kl(p, p) == 0.0


@pytest.mark.parametrize(
    ("prompt", "changes", "part"),
    [
        ("", {}, "empty"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (PROMPT, {"temperature": -1.0}, "temperature"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(tiny, vector, prompt, changes, part):
    with pytest.raises(InputError, match=part) as caught:
        side_by_side(tiny, prompt, vector, **changes)
    assert "\n" not in str(caught.value)
