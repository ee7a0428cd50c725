"""Steering the real model: sentiment moves, and a bridge and bare transformers are steered alike."""

import dataclasses

import pytest
import torch

from activations import Model
from activations.splice import read
from sae import load_sae
from steering import Clamp, SteeringVector, steer

HOOK = "blocks.15.hook_resid_post"
POSITIVE = [
    "I loved every minute of it, a wonderful and beautiful film.",
    "What a great day, I am so happy and grateful.",
    "The food was delicious and the staff were kind.",
    "This is the best book I have read, truly brilliant.",
]
NEGATIVE = [
    "I hated every minute of it, a terrible and ugly film.",
    "What an awful day, I am so sad and angry.",
    "The food was disgusting and the staff were rude.",
    "This is the worst book I have read, truly stupid.",
]
PROMPTS = [f"Overall, the {word} was" for word in ("movie", "trip", "food", "service")]  # of one length
GOOD = (" good", " great", " wonderful", " excellent", " amazing", " beautiful")
BAD = (" bad", " terrible", " awful", " horrible", " ugly", " poor")


@pytest.fixture(scope="module")
def sentiment(model: Model) -> SteeringVector:
    return SteeringVector.from_pairs(model, POSITIVE, NEGATIVE, hook=HOOK)


def log_odds(model: Model) -> float:
    """log P(a good word) - log P(a bad word) as the next token, mean over the prompts."""
    good, bad = ([int(model.encode(word)[0, 0]) for word in words] for words in (GOOD, BAD))
    log_p = model(torch.cat([model.encode(prompt) for prompt in PROMPTS]))[:, -1].log_softmax(dim=-1)
    return float((log_p[:, good].logsumexp(dim=1) - log_p[:, bad].logsumexp(dim=1)).mean())


def test_a_sentiment_vector_moves_the_words_and_a_random_one_of_equal_norm_does_not(model, sentiment):
    def moved(vector: SteeringVector, strength: float) -> float:
        with steer(model, vector, strength):
            return log_odds(model) - base

    base = log_odds(model)
    up, down = moved(sentiment, 0.1), moved(sentiment, -0.1)
    random = []
    for seed in range(4):
        noise = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
        random.append(moved(dataclasses.replace(sentiment, direction=noise / noise.norm()), 0.1))
    assert up > 1.0
    assert down < -1.0
    assert max(map(abs, random)) < 0.5 * min(up, -down)


def rows(model: Model, ids: torch.Tensor) -> torch.Tensor:
    with read(model, [HOOK]) as got:
        model(ids)
    return got[HOOK][0]


def test_the_sink_at_position_0_is_known_and_left_alone(model, sentiment):
    ids = model.encode(PROMPTS[0])
    base = rows(model, ids)
    with steer(model, sentiment):
        steered = rows(model, ids)
    assert base[0].norm() > 10 * sentiment.sink_threshold
    assert torch.equal(steered[0], base[0])
    # One norm unit was added to all others: v is about as long as they are.
    assert torch.allclose((steered[1:] - base[1:]).norm(dim=-1), torch.tensor(sentiment.median_norm), rtol=1e-3)


def test_a_document_mark_in_the_text_is_a_sink_and_is_left_alone(model, sentiment):
    ids = torch.cat([model.encode("The movie was"), model.encode("<|endoftext|>"), model.encode("My visit to")], dim=1)
    base = rows(model, ids)
    with steer(model, sentiment):
        changed = (rows(model, ids) != base).any(dim=-1)
    assert changed.tolist() == [False, True, True, False, True, True, True]


def test_a_bridge_and_a_bare_model_are_steered_alike(model, small_run, sentiment):
    edits = [sentiment.scaled(0.2), Clamp(load_sae(small_run), 3, 2.0)]
    ids = model.encode("My visit to the new restaurant was")
    with steer(model, edits):
        ours = model(ids)
    with torch.inference_mode():
        with steer(model.hf, edits):
            bare = model.hf(ids).logits
        with steer(model.bridge, edits):
            bridged = model.bridge(ids)
        base = model.bridge(ids)
    assert torch.equal(bare, ours)
    # The bridge computes attention another way, which moves logits by some 1e-4.
    assert torch.allclose(bridged, ours, atol=2e-3)
    assert (bridged - base).abs().max() > 1.0


def test_generation_of_the_real_model_with_a_cache_equals_that_without(model, small_run, sentiment):
    edits = [sentiment.scaled(0.2), SteeringVector.from_latent(load_sae(small_run), 3)]
    ids = model.encode("My visit to")
    with steer(model, edits), torch.inference_mode():
        fast = model.generate(ids, max_new_tokens=6)
        logits = model(fast)[0]
    assert logits[ids.shape[1] - 1 : -1].argmax(dim=-1).tolist() == fast[0, ids.shape[1] :].tolist()
