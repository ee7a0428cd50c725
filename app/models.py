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

if TYPE_CHECKING:  # torch takes seconds to import, and most pages never need it
    from activations import Model
    from autointerp.search.prompt import Reading
    from sae import SAE


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


def read_text(dictionary: Dictionary, text: str) -> "Reading":
    """Run the model and the dictionary on a text of the reader's own; see `autointerp.search.prompt.read_text`.

    Raises InputError for an empty text, a model that cannot be loaded, or a dictionary that cannot be read.
    """
    from autointerp.search import prompt

    sae = dictionary_of(dictionary)
    with using_model(dictionary) as model:
        return prompt.read_text(sae, model, text)


@st.cache_resource(max_entries=1, show_spinner=False)
def _model(name: str, dtype: str | None) -> Shared:
    from activations import load_model

    return Shared(model=load_model(name, dtype=dtype), lock=threading.RLock())


@st.cache_resource(max_entries=4, show_spinner=False)
def _dictionary(folder: str, stamp: int) -> "SAE":  # noqa: ARG001  # the stamp is part of the key
    from sae import load_sae

    return load_sae(folder)
