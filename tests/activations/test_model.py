"""The embedded model: tokenizer mended, bytes exact, errors plain."""

import pytest
import torch

from activations.errors import InputError
from activations.model import load_model


def test_digits_are_split_and_text_comes_back(model):
    text = "In 2024,  12345 x — naïve 東京 🙂\n\tdef f(x): return x**2"
    ids = model.encode(text)[0].tolist()
    assert model.tokenizer.decode(ids) == text
    assert len(model.encode("2024")[0]) == 4


def test_token_bytes_join_to_the_exact_text(model):
    table = model.token_bytes()
    text = "naïve 東京 🙂 don't"
    assert b"".join(table[i] for i in model.encode(text)[0].tolist()).decode() == text
    assert len(table) == model.hf.config.vocab_size


def test_a_special_token_has_its_own_text(model):
    assert model.token_bytes()[model.tokenizer.eos_token_id] == model.tokenizer.eos_token.encode()


def test_unembed_with_the_norm_gives_the_logits(model):
    from activations.splice import read

    ids = model.encode("The sky is")
    with read(model, ["blocks.29.hook_resid_post"]) as got:
        logits = model(ids)
    x = got["blocks.29.hook_resid_post"].float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.hf.config.rms_norm_eps)
    torch.testing.assert_close(normed @ model.unembed(), logits, atol=1e-3, rtol=1e-4)


def test_generate_is_seeded_and_leaves_the_callers_random_state(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = model.generate("I think that", max_new_tokens=8, temperature=1.0, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert a == model.generate("I think that", max_new_tokens=8, temperature=1.0, seed=3)
    assert a != model.generate("I think that", max_new_tokens=8, temperature=1.0, seed=4)
    assert a.startswith("I think that")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "no/such-model"}, "'no/such-model' could not be loaded .* expected 'smollm2-135m-instruct'"),
        ({"dtype": "int7"}, "dtype 'int7' is unknown: expected one of float32"),
        ({"device": "toaster"}, "Device 'toaster' is not here: expected auto, cpu"),
    ],
)
def test_wrong_input_is_one_plain_line(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        load_model(**arguments)
    assert "\n" not in str(error.value)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(InputError, match="prompt is empty"):
        model.generate("")
