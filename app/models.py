"""The language model and the dictionaries, loaded once for all sessions.

Two people at once must not mix: an edit is a hook on the shared model, so whoever runs the model holds its lock from
before the first hook until after the last one is off.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from activations.errors import InputError
from app.runs import Dictionary
from data.tokens import separator_of

if TYPE_CHECKING:  # torch takes seconds to import, and most pages never need it
    from torch import Tensor

    from activations import Model
    from sae import SAE

LONGEST_TEXT = 2048
"""Tokens that the own-text test reads at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What a dictionary says of a text, token by token; position 0 (added in front) is not in it."""

    ids: list[int]
    values: "Tensor"
    """(tokens, m) float32: the latents that are on, 0 in unused places."""
    indices: "Tensor"
    """(tokens, m) which latents those are."""
    cut: bool
    """The text was longer than could be read."""

    def of(self, feature: int) -> list[float]:
        """The value of one latent at each token."""
        on = self.values * (self.indices == feature)
        return [float(value) for value in on.sum(dim=1)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """A loaded model and the lock that its user holds."""

    model: "Model"
    lock: threading.RLock


def model_name(dictionary: Dictionary) -> str:
    """The model that a dictionary was trained on. Raises InputError when its files do not say."""
    metadata = dictionary.config.get("metadata")
    name = metadata.get("model_name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{dictionary.address} does not say which model it is of: expected metadata.model_name in cfg.json."
        )
    return name


@contextmanager
def using_model(dictionary: Dictionary) -> Iterator["Model"]:
    """The dictionary's model in the run's precision, for this session alone until the block ends."""
    shared = _model(model_name(dictionary), dictionary.model_dtype)
    with shared.lock:
        yield shared.model


def dictionary_of(dictionary: Dictionary) -> "SAE":
    """The loaded dictionary. Read-only: it is shared by all sessions."""
    weights = dictionary.folder / "sae_weights.safetensors"
    stamp = weights.stat().st_mtime_ns if weights.exists() else 0
    return _dictionary(str(dictionary.folder), stamp)


def read_text(dictionary: Dictionary, text: str) -> Reading:
    """Run the model and the dictionary on a text of the reader's own.

    The text follows the mark that separates documents in the cached text: a first token's activations look like those
    of no other, so that none of the reader's should stand there.
    Raises InputError for an empty text, a model that cannot be loaded, or a dictionary that cannot be read.
    """
    import torch

    from activations.splice import read

    sae = dictionary_of(dictionary)
    hook = sae.only_hook("Reading a text")
    with using_model(dictionary) as model:
        ids = model.encode(text)
        if ids.shape[1] == 0:
            raise InputError("The text is empty: type at least one word.")
        kept = ids[:, :LONGEST_TEXT]
        try:
            separator = separator_of(model.tokenizer)
        except ValueError as error:
            raise InputError(f"{model.name} cannot read a text here: {error}") from None
        first = torch.tensor([[separator]], device=kept.device, dtype=kept.dtype)
        with torch.inference_mode(), read(model, [hook], stop=True) as got:
            model.hf(input_ids=torch.cat([first, kept], dim=1), use_cache=False)
            x = got[hook][0, 1:].float()
            values, indices = sae.encode_sparse(x.to(sae.W_dec.device))
            if sae.statistics is not None:  # sinks count nowhere else, so not here
                values = values.masked_fill((x.norm(dim=1) > sae.statistics.sink_threshold)[:, None], 0.0)
    return Reading(ids=kept[0].tolist(), values=values.cpu(), indices=indices.cpu(), cut=ids.shape[1] > LONGEST_TEXT)


@st.cache_resource(max_entries=1, show_spinner=False)
def _model(name: str, dtype: str | None) -> Shared:
    from activations import load_model

    return Shared(model=load_model(name, dtype=dtype), lock=threading.RLock())


@st.cache_resource(max_entries=4, show_spinner=False)
def _dictionary(folder: str, stamp: int) -> "SAE":  # noqa: ARG001  # the stamp is part of the key
    from sae import load_sae

    return load_sae(folder)
