"""Polysemous words: whether a word's strongest latent is the same in two texts exactly when its sense is.

Prompt: "{context} The {word} means", read at the last " word"; words that the tokenizer takes apart are left out. Two
texts have the same sense, so is predicted, where the same latent is the largest there; latents that fire on over 10 %
of tokens do not count, since they would win everywhere. Beside: a random dictionary, and the cosine of the activations.
Source: Minegishi et al. 2025, arXiv:2501.06254 (PS-Eval). Differs: dense latents left out; own sentences.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from activations.model import Model
from sae.base import SAE
from sae.evals.controls import random_dictionary
from sae.evals.density import DENSE
from sae.evals.labelled import rows_of_last
from sae.evals.metric import Metric, bootstrap
from sae.evals.subject import SenseContext, Subject


class Pairs(NamedTuple):
    """Every two contexts of a word."""

    first: Int[np.ndarray, " pairs"]
    second: Int[np.ndarray, " pairs"]
    same: Bool[np.ndarray, " pairs"]
    """Whether the word has one sense in both."""
    word: Int[np.ndarray, " pairs"]
    """Number of the word."""


def polysemy(subject: Subject) -> dict[str, Metric]:
    """Balanced accuracy and its parts, with intervals over words; the controls' accuracy beside."""
    assert subject.model is not None
    seed = subject.options.seed
    sequences, kept = prompts(subject.model, subject.options.senses)
    x = rows_of_last(subject.model, subject.sae.hook, sequences).to(subject.sae.W_dec.device, torch.float32)
    control = random_dictionary(subject.sae, subject.cache.mean, k=subject.l0, seed=seed)
    n_words = len({each.word for each in subject.options.senses})
    return polysemy_of(x, kept, subject.sae, control, n_words=n_words, seed=seed)


def prompts(model: Model, contexts: Sequence[SenseContext]) -> tuple[list[Int[Tensor, " _time"]], list[SenseContext]]:
    """(token ids that end in the word, its context) for the words that are one token after a space."""
    sequences, kept = [], []
    for each in contexts:
        word = model.encode(f" {each.word}")[0].cpu()
        if len(word) == 1:
            sequences.append(torch.cat([model.encode(f"{each.context} The")[0].cpu(), word]))
            kept.append(each)
    return sequences, kept


@torch.no_grad()
def polysemy_of(
    x: Float[Tensor, "n d_in"],
    contexts: Sequence[SenseContext],
    sae: SAE,
    control: SAE,
    *,
    n_words: int | None = None,
    seed: int = 0,
) -> dict[str, Metric]:
    """Metrics from a row for each context.

    n_words: of all words, where some were left out.
    """
    pairs = pairs_of(contexts)
    left = len(np.unique(pairs.word))
    of = f"pairs of contexts of {left} words, of {n_words or left}"
    top, random = (strongest(each, x) for each in (sae, control))
    cosine = normalize(x - x.mean(dim=0), dim=1).cpu().numpy()
    near = (cosine[pairs.first] * cosine[pairs.second]).sum(axis=1)
    found = scores(top[pairs.first] == top[pairs.second], pairs, of, seed)
    accuracy = scores(random[pairs.first] == random[pairs.second], pairs, of, seed)["polysemy.accuracy"]
    # As many pairs are called the same as are: the threshold sees no label of a pair.
    closest = near >= np.quantile(near, 1 - pairs.same.mean())
    dense = scores(closest, pairs, of, seed, "activations of a high cosine")["polysemy.accuracy"]
    return {**found, "control.random.polysemy.accuracy": accuracy, "control.dense.polysemy.accuracy": dense}


def strongest(sae: SAE, x: Float[Tensor, "n d_in"]) -> Int[np.ndarray, " n"]:
    """The latent of the largest size in each row, dense ones apart; a number of its own, below 0, where none fires."""
    values, indices = sae.encode_sparse(x)
    size = values.abs()
    if sae.statistics is not None:
        size = torch.where((sae.statistics.density.to(x.device) > DENSE)[indices], 0.0, size)
    most = size.max(dim=1)
    top = indices.gather(1, most.indices[:, None])[:, 0]
    alone = -1 - torch.arange(len(x), device=x.device)
    return torch.where(most.values > 0, top, alone).cpu().numpy()


def pairs_of(contexts: Sequence[SenseContext]) -> Pairs:
    words = sorted({each.word for each in contexts})
    each = [
        (i, j, contexts[i].sense == contexts[j].sense, words.index(contexts[i].word))
        for i, j in combinations(range(len(contexts)), 2)
        if contexts[i].word == contexts[j].word
    ]
    first, second, same, word = (np.array(column) for column in zip(*each, strict=True))
    return Pairs(first, second, same.astype(bool), word)


def scores(
    predicted: Bool[np.ndarray, " pairs"], pairs: Pairs, of: str, seed: int, rule: str = "same strongest latent"
) -> dict[str, Metric]:
    """Balanced accuracy, recall, specificity, precision and F1 of "the same sense", with intervals over words.

    rule: what was predicted from, for the definitions.
    """
    n_words = int(pairs.word.max()) + 1

    def counts(chosen: Bool[np.ndarray, " pairs"]) -> Int[np.ndarray, " words"]:
        return np.bincount(pairs.word[chosen], minlength=n_words)

    tp, fn = counts(predicted & pairs.same), counts(~predicted & pairs.same)
    fp, tn = counts(predicted & ~pairs.same), counts(~predicted & ~pairs.same)

    def ratio(above: np.integer[Any], below: np.integer[Any]) -> float:
        return float(above / below) if below else 0.0

    def recall(drawn: np.ndarray) -> float:
        return ratio(tp[drawn].sum(), tp[drawn].sum() + fn[drawn].sum())

    def specificity(drawn: np.ndarray) -> float:
        return ratio(tn[drawn].sum(), tn[drawn].sum() + fp[drawn].sum())

    measures = {
        "accuracy": (
            f"balanced accuracy of '{rule}' for 'same sense': (recall + specificity) / 2; chance is 0.5",
            lambda drawn: (recall(drawn) + specificity(drawn)) / 2,
        ),
        "recall": (f"share of pairs of one sense with {rule}", recall),
        "specificity": (f"share of pairs of two senses without {rule}", specificity),
        "precision": (
            f"share of pairs with {rule} that have one sense",
            lambda drawn: ratio(tp[drawn].sum(), tp[drawn].sum() + fp[drawn].sum()),
        ),
        "f1": (
            f"F1 of '{rule}' for 'same sense'",
            lambda drawn: ratio(2 * tp[drawn].sum(), 2 * tp[drawn].sum() + fp[drawn].sum() + fn[drawn].sum()),
        ),
    }
    found = {}
    for name, (definition, value) in measures.items():
        lo, hi = bootstrap(n_words, value, seed)
        found[f"polysemy.{name}"] = Metric(
            value=value(np.arange(n_words)), n=len(predicted), of=of, definition=definition, lo=lo, hi=hi, seed=seed
        )
    return found
