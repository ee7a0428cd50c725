"""Search by a text of the caller's own: which features fire on it, and what the text loses without them.

The text follows the mark that separates documents in the cached text: a first token's activations look like those of no
other, so that none of the caller's should stand there. Sinks count nowhere else, so not here.

The loss effect of a feature is in delta form: -z_i d_i is added to the activations of all tokens of the text at once,
and what the dictionary does not explain stays. It takes a forward pass of the text for each feature, so only the
strongest few are measured. The model has to be in float32: on a sentence of 27 tokens of the embedded model, bfloat16
moves the loss by 0.005 nats where the median of fifty features is 0.011.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from activations.errors import InputError
from activations.model import Model
from activations.splice import read
from autointerp.loss_effect import losses
from autointerp.search.found import (
    CANDIDATES,
    LIMIT,
    Found,
    Hit,
    check_dictionary,
    check_limit,
    check_rank,
    check_text,
    found,
)
from data.store import Store
from data.store.search import ALL, Facts, Filters, facts_of
from data.tokens import separator_of
from sae.base import SAE

LONGEST = 2048
"""Tokens of a text that are read at most."""
_TOKENS = 2048
"""Tokens of one batched forward: their logits are a vocabulary wide."""


class Reading(NamedTuple):
    """What a dictionary says of a text, token by token; position 0 (added in front) is not in it."""

    ids: list[int]
    first: int
    """The id that was added in front."""
    values: Float[Tensor, "tokens m"]
    """The latents that are on, 0 in unused places and on sinks."""
    indices: Int[Tensor, "tokens m"]
    """Which latents those are."""
    cut: bool
    """The text was longer than `LONGEST`."""

    def of(self, feature: int) -> list[float]:
        """The value of one latent at each token."""
        return [float(value) for value in self.column(feature)]

    def column(self, feature: int) -> Float[Tensor, " tokens"]:
        """As `of`, as a tensor."""
        return (self.values * (self.indices == feature)).sum(dim=1)


class Peaks(NamedTuple):
    """The features that fire on a text, by number, each at its value of largest magnitude."""

    feature: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]
    place: Int[np.ndarray, " n"]
    """Which token of the text; the first of equal ones."""
    n_tokens: Int[np.ndarray, " n"]
    """Tokens on which it fires."""


@torch.inference_mode()
def read_text(sae: SAE, model: Model, text: str) -> Reading:
    """Run the model up to the dictionary's hook, and the dictionary, on a text.

    Raises InputError for an empty text, and a model without a mark between documents.
    """
    hook = sae.only_hook("Reading a text")
    ids = model.encode(text)
    if ids.shape[1] == 0:
        raise InputError("The text is empty: type at least one word.")
    kept = ids[:, :LONGEST]
    try:
        separator = separator_of(model.tokenizer)
    except ValueError as error:
        raise InputError(f"{model.name} cannot read a text here: {error}") from None
    first = torch.tensor([[separator]], device=kept.device, dtype=kept.dtype)
    with read(model, [hook], stop=True) as got:
        model.hf(input_ids=torch.cat([first, kept], dim=1), use_cache=False)
    x = got[hook][0, 1:].to(sae.W_dec.device, torch.float32)
    values, indices = sae.encode_sparse(x)
    if sae.statistics is not None:
        values = values.masked_fill((x.norm(dim=1) > sae.statistics.sink_threshold)[:, None], 0.0)
    return Reading(kept[0].tolist(), separator, values.float().cpu(), indices.cpu(), ids.shape[1] > LONGEST)


def peaks(reading: Reading) -> Peaks:
    """The largest value of each feature that is on anywhere in the text."""
    place, column = reading.values.nonzero(as_tuple=True)
    feature, value = reading.indices[place, column].numpy(), reading.values[place, column].numpy()
    order = np.lexsort((place.numpy(), -np.abs(value), feature))
    numbers, first, count = np.unique(feature[order], return_index=True, return_counts=True)
    return Peaks(numbers, value[order][first], place.numpy()[order][first], count)


def by_prompt(
    store: Store,
    sae: SAE,
    model: Model,
    text: str,
    *,
    rank: str = "activation",
    filters: Filters = ALL,
    limit: int = LIMIT,
    candidates: int = CANDIDATES,
) -> Found:
    """Features that fire on `text`, at their strongest token.

    rank: 'activation' (|value|), 'rarity' (|value| times -ln of the density, so that a feature that seldom fires comes
    before one that often does) or 'loss' (what the text loses without the feature, of the `candidates` that fire most
    strongly; see above).
    Raises InputError for an empty text, a store of another dictionary, and 'loss' with a model in half precision.
    """
    check_limit(limit)
    check_rank(rank, "prompt")
    check_text(text)
    check_dictionary(store, sae)
    if rank == "loss" and model.dtype != torch.float32:
        raise InputError("A loss effect needs the model in float32, whose rounding is smaller: load it in that.")
    reading = read_text(sae, model, text)
    on = peaks(reading)
    facts = facts_of(store, on.feature.tolist(), filters)
    n_tokens = max(store.summary().n_tokens, 1)
    pieces = store.token_texts(reading.ids)
    hits = [
        Hit(
            facts=facts[feature],
            numbers=_numbers(facts[feature], value, n_on, n_tokens),
            token=pieces[place] or store.token_texts([reading.ids[place]])[0],
        )
        for feature, value, place, n_on in zip(*(column.tolist() for column in on), strict=True)
        if feature in facts
    ]
    definitions = {
        "value": "value of largest magnitude on the text, at the token shown",
        "of_max": "that value as a share of the feature's largest of that sign in the indexed text",
        "tokens": "tokens of the text on which it fires",
        "rarity": "|value| times -ln(density), the density at least one firing in the indexed text",
    }
    notes = [f"Only the first {LONGEST:,} tokens of the text were read."] if reading.cut else []
    total = len(hits)
    hits.sort(
        key=lambda hit: (-(hit.numbers["rarity"] if rank == "rarity" else abs(hit.numbers["value"])), hit.feature)
    )
    if rank == "loss":
        effects, n_predicted = loss_effects(sae, model, reading, [hit.feature for hit in hits[:candidates]])
        for hit, nats in zip(hits, effects, strict=False):
            hit.numbers["nats"] = nats
        if total > candidates:
            notes.append(f"Measured are the {candidates} of {total} features that fire most strongly.")
        hits = sorted(hits[:candidates], key=lambda hit: (-hit.numbers["nats"], hit.feature))
        definitions["nats"] = (
            f"cross-entropy of the text without the feature, less that with it; mean over {n_predicted} predicted "
            "tokens, in nats; above 0 where the feature helps"
        )
    return found(
        store,
        by="prompt",
        query=text,
        rank=rank,
        hits=hits[:limit],
        total=total,
        definitions=definitions,
        filters=filters,
        otherwise="No feature fires on this text: try a longer one.",
        notes=notes,
    )


@torch.inference_mode()
def loss_effects(sae: SAE, model: Model, reading: Reading, features: Sequence[int]) -> tuple[list[float], int]:
    """(mean change of the text's cross-entropy without each feature, nats a predicted token; predicted tokens).

    The token after the mark is not among the predicted: nothing that is edited comes before it.
    Raises InputError for a text of one token, which predicts none.
    """
    if len(reading.ids) < 2:
        raise InputError("The text is one token, which predicts nothing: a loss effect needs a longer one.")
    hook = sae.only_hook("A loss effect")
    ids = torch.tensor([reading.first, *reading.ids])
    (clean,) = losses(model, hook, [ids], None)
    batch = max(_TOKENS // len(ids), 1)
    found = []
    with tqdm(total=len(features), desc="loss effects", unit="feature", disable=None) as bar:
        for first in range(0, len(features), batch):
            here = features[first : first + batch]
            deltas = [torch.zeros(len(ids), sae.W_dec.shape[1]) for _ in here]
            for delta, feature in zip(deltas, here, strict=True):
                delta[1:] = -reading.column(feature)[:, None] * sae.W_dec[feature].float().cpu()
            changed = losses(model, hook, [ids] * len(here), deltas, batch)
            found += [float((loss.double() - clean.double()).mean()) for loss in changed]
            bar.update(len(here))
    return found, len(clean)


def _numbers(facts: Facts, value: float, n_on: int, n_tokens: int) -> dict[str, float]:
    largest = facts.max if value > 0 else facts.min
    share = {"of_max": value / largest} if largest else {}  # one that never fired in the indexed text has no largest
    rarity = abs(value) * -float(np.log(max(facts.density, 1 / n_tokens)))
    return {"value": value, **share, "tokens": float(n_on), "rarity": rarity}
