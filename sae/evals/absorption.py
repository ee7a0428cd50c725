"""Splitting and absorption of a feature that the model surely has: the first letter of a word.

For each letter: a probe on the activations at the word (the truth); the main latents, chosen by k-sparse probing while
another one raises F1 by over 0.03; then, over test words that the probe gets right, whether another latent does the
main ones' work. p_act = x . w and p_i = z_i d_i . w, with w the probe's direction at norm 1.
    full: no main latent fires, and the latent of the largest p_i has cosine >= 0.025 with w and p_i / p_act >= 0.4
    fraction: a / (a + main), a = sum of the 3 largest p_i of others with cosine >= 0.1, at most p_act - main; 0 where
              main >= p_act or a / p_act < 0.4
Needs at least 20 letters on which the probe reaches F1 0.6: below that a model knows too little of spelling, and no
absorption is given.
Source: Chanin et al. 2024, arXiv:2409.14507; Karvonen et al. 2025, arXiv:2503.09532. Differs: main latents by mean
difference; words are single tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from activations.model import Model
from sae.base import SAE
from sae.evals.controls import random_dictionary
from sae.evals.labelled import rows_of_last
from sae.evals.logistic import Probe, f1, fit_probe
from sae.evals.metric import Metric, mean_of
from sae.evals.probing import by_difference, columns, split
from sae.evals.subject import Subject

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PER_LETTER, FEWEST = 60, 10
"""Words of a letter; letters with fewer than so many are left out."""
LEAST_F1, LEAST_LETTERS = 0.6, 20
JUMP, MOST_MAIN = 0.03, 10
_STRENGTH = (0.1,)
_EXAMPLES = 5


class Letter(NamedTuple):
    """What was found of one letter."""

    full: float
    """Share of the test words that are absorbed fully."""
    fraction: float
    main: int
    """Main latents: 1 where the feature is not split."""
    words: int
    """Test words that the probe gets right."""


def absorption(subject: Subject) -> dict[str, Metric]:
    """First letters, on words of the tokenizer; a random dictionary beside."""
    assert subject.model is not None
    seed = subject.options.seed
    sequences, letters = first_letters(subject.model, seed)
    x = rows_of_last(subject.model, subject.sae.hook, sequences).to(subject.sae.W_dec.device, torch.float32)
    control = random_dictionary(subject.sae, subject.cache.mean, k=subject.l0, seed=seed)
    return absorption_of(x, letters, subject.sae, control, seed=seed)


def first_letters(model: Model, seed: int) -> tuple[list[Int[Tensor, " _time"]], Int[np.ndarray, " n"]]:
    """(token ids that end in a word, the number of its first letter): words of a single token, in lower case, after
    five examples of the task."""
    rng = np.random.default_rng(seed)
    words = {}
    for index, each in enumerate(model.token_bytes()):
        word = each.decode("utf-8", "replace")
        if word.startswith(" ") and len(word) > 4 and word[1:].isascii() and word[1:].isalpha() and word.islower():
            words[word] = index
    names = sorted(words)
    examples = [names[i] for i in rng.permutation(len(names))[:_EXAMPLES]]
    prompt = model.encode("".join(f"{word} has the first letter: {word[1].upper()}\n" for word in examples))[0].cpu()
    sequences, letters = [], []
    for number, letter in enumerate(LETTERS):
        own = [word for word in names if word[1] == letter and word not in examples]
        if len(own) < FEWEST:
            continue
        for i in rng.permutation(len(own))[:PER_LETTER]:
            sequences.append(torch.cat([prompt, torch.tensor([words[own[i]]])]))
            letters.append(number)
    return sequences, np.array(letters, dtype=np.int64)


@torch.no_grad()
def absorption_of(
    x: Float[Tensor, "n d_in"], letters: Int[np.ndarray, " n"], sae: SAE, control: SAE, *, seed: int = 0
) -> dict[str, Metric]:
    """Metrics from the rows of words and their letters; only how many letters can be read, where those are too few."""
    probes = {}
    scores = []
    for letter in np.unique(letters):
        classes = letters == letter
        train, test = split(classes, seed)
        probe = fit_probe(x[train], classes[train], strengths=_STRENGTH, balanced=True)
        scores.append(f1((probe.score(x[test]) > 0).cpu().numpy(), classes[test]))
        if scores[-1] >= LEAST_F1:
            probes[int(letter)] = probe
    of = "first letters"
    enough = len(probes) >= LEAST_LETTERS
    verdict = "" if enough else "; too few: the model's own probes are too weak, so no absorption is given"
    found = {
        "absorption.letters": Metric(
            value=float(len(probes)),
            n=len(scores),
            of=of,
            definition=f"letters whose probe on the activations has F1 >= {LEAST_F1}, {LEAST_LETTERS} wanted{verdict}",
            seed=seed,
        ),
        "absorption.probe_f1": mean_of(
            np.array(scores), of=of, definition="F1 of the probe on the activations, mean over letters", seed=seed
        ),
    }
    if not enough:
        return found
    for prefix, dictionary in (("", sae), ("control.random.", control)):
        each = [of_letter(x, letters == letter, dictionary, probe, seed) for letter, probe in probes.items()]
        for name, values, definition in (
            ("full", [one.full for one in each], "share of words fully absorbed, mean over letters"),
            ("fraction", [one.fraction for one in each], "share of the letter's direction that others carry, mean"),
            ("splitting", [one.main for one in each], "main latents of a letter, mean; 1 is not split"),
        ):
            metric = mean_of(np.array(values, dtype=float), of=of, definition=definition, seed=seed)
            found[f"{prefix}absorption.{name}"] = metric
    return found


def of_letter(x: Float[Tensor, "n d_in"], classes: Bool[np.ndarray, " n"], sae: SAE, probe: Probe, seed: int) -> Letter:
    """One letter; its words are the rows of `classes`."""
    train, test = split(classes, seed)
    values, indices = sae.encode_sparse(x)
    main = main_latents(values, indices, classes, sae.d_sae, train, test)
    right = test[classes[test] & (probe.score(x[test]) > 0).cpu().numpy()]
    if not len(right):
        return Letter(0.0, 0.0, len(main), 0)
    direction = normalize(probe.direction.to(x.device), dim=0)
    values, indices = values[right], indices[right]
    cosines = (normalize(sae.W_dec.float(), dim=1) @ direction)[indices]
    work = values * (sae.W_dec.float() @ direction)[indices]
    is_main = torch.isin(indices, torch.as_tensor(main, device=x.device)) & (values != 0)
    whole = x[right] @ direction
    top = work.max(dim=1)
    full = (
        ~is_main.any(dim=1)
        & (whole > 0)
        & (cosines.gather(1, top.indices[:, None])[:, 0] >= 0.025)
        & (top.values >= 0.4 * whole)
    )
    by_main = (work * is_main).sum(dim=1)
    others = torch.where(~is_main & (cosines >= 0.1) & (work > 0), work, 0.0)
    absorbed = others.topk(min(3, others.shape[1]), dim=1).values.sum(dim=1)
    counts = (by_main < whole) & (absorbed >= 0.4 * whole)
    least = torch.minimum(absorbed, whole - by_main)
    fraction = torch.where(by_main <= 0, 1.0, least / (least + by_main).clamp(min=1e-30)) * counts
    return Letter(float(full.float().mean()), float(fraction.mean()), len(main), len(right))


def main_latents(
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
    classes: Bool[np.ndarray, " n"],
    d_sae: int,
    train: Int[np.ndarray, " _train"],
    test: Int[np.ndarray, " _test"],
) -> Sequence[int]:
    """The latents that tell the class apart: one, and each further one that raises the F1 on test rows by over 0.03."""
    order = by_difference(values[train], indices[train], classes[train], d_sae)[:MOST_MAIN]
    z, last = columns(values, indices, order), 0.0
    for k in range(1, len(order) + 1):
        probe = fit_probe(z[train, :k], classes[train], strengths=_STRENGTH, balanced=True)
        score = f1((probe.score(z[test, :k]) > 0).cpu().numpy(), classes[test])
        if k > 1 and score <= last + JUMP:
            return [int(latent) for latent in order[: k - 1]]
        last = score
    return [int(latent) for latent in order]
