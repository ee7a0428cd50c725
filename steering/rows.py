"""Activations of a few short texts at one hook: what vectors are made from.

Position 0 is left out, and so are padding and sinks. Position 0 is no detail: its norm is a hundred times that of other
tokens in many models and does not depend on the text, so one such row drowns a mean of a thousand others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.cache import SINK_FACTOR
from activations.errors import InputError
from activations.model import Model
from activations.splice import read

TEXTS_PER_BATCH = 32


class TextRows(NamedTuple):
    """Ordinary tokens of some texts, in the order of the texts."""

    rows: Float[Tensor, "rows d"]
    """float32, on the CPU."""
    text: Int[Tensor, " rows"]
    """Which text each row is from."""

    def without_sinks(self, threshold: float) -> "TextRows":
        """The rows whose norm is at most `threshold`."""
        keep = self.rows.norm(dim=1) <= threshold
        return TextRows(self.rows[keep], self.text[keep])


def text_rows(model: Model, texts: Sequence[str], hook: str) -> TextRows:
    """Rows at `hook` of each token of `texts` but the first; nothing is added to the texts. Sinks are still in.

    Texts may differ in length: they are padded on the right, where a causal model does not see it.
    Raises InputError for a hook that the model lacks, or when no text has a second token.
    """
    if isinstance(texts, str):
        raise InputError("Got one text where a list of texts was expected: write [text].")
    ids = [model.encode(text)[0] for text in texts]
    kept = [(number, row) for number, row in enumerate(ids) if len(row) > 1]
    if not kept:
        raise InputError(
            f"None of the {len(texts)} texts has two tokens or more; position 0 is never used: give longer texts."
        )
    parts = [_batch(model, kept[i : i + TEXTS_PER_BATCH], hook) for i in range(0, len(kept), TEXTS_PER_BATCH)]
    return TextRows(torch.cat([part.rows for part in parts]), torch.cat([part.text for part in parts]))


def median_norm(parts: Sequence[TextRows]) -> float:
    """The median norm over the rows of all `parts`; 5 times that is the norm above which a row is a sink."""
    return float(torch.cat([part.rows for part in parts]).norm(dim=1).median())


def sink_threshold(median: float) -> float:
    """Norm above which a row is a sink, where the median norm is `median`."""
    return SINK_FACTOR * median


def _batch(model: Model, texts: list[tuple[int, Tensor]], hook: str) -> TextRows:
    numbers = torch.tensor([number for number, _ in texts])
    lengths = torch.tensor([len(row) for _, row in texts])
    padded = torch.nn.utils.rnn.pad_sequence([row for _, row in texts], batch_first=True)
    places = torch.arange(padded.shape[1])
    ordinary = (places > 0) & (places < lengths[:, None])
    with torch.inference_mode(), read(model, [hook], stop=True) as got:
        mask = (places < lengths[:, None]).to(model.device, torch.long)
        model.hf(input_ids=padded, attention_mask=mask, use_cache=False)
        x = got[hook].to("cpu", torch.float32)
    return TextRows(x[ordinary], numbers[:, None].expand_as(ordinary)[ordinary])
