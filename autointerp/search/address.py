"""One search from an address and a text: opens and loads what the way of asking needs, and nothing else."""

from pathlib import Path
from typing import TYPE_CHECKING

from activations.errors import InputError
from autointerp.search.found import CANDIDATES, LIMIT, RANKS, Found, check_labels, check_rank
from autointerp.search.stored import by_token, by_words
from data.store import Store, open_store
from data.store.search import ALL, Filters

if TYPE_CHECKING:  # torch takes seconds to import, and words and tokens are found without
    from activations import Model
    from sae import SAE


def search(
    address: str | Path,
    text: str,
    *,
    by: str = "words",
    rank: str | None = None,
    filters: Filters = ALL,
    limit: int = LIMIT,
    candidates: int = CANDIDATES,
    device: str = "auto",
) -> Found:
    """Features of a dictionary (RUN, RUN/ID or its folder) that fit `text`.

    by: 'words' or 'meaning' of the labels; 'token' they fire on; 'prompt', a text they fire on; 'feature', the number
    of one that they are like. rank: see `RANKS`; None for the usual order. candidates: features whose loss effect is
    measured.
    Raises InputError or StoreError, one line, for what is missing: an index, labels, the model.
    """
    if by not in RANKS:
        raise InputError(f"by={by!r} is no way to search: expected one of {', '.join(RANKS)}.")
    rank = RANKS[by][0] if rank is None else rank
    check_rank(rank, by)
    with open_store(address) as store:
        if by == "words":
            return by_words(store, text, filters=filters, limit=limit)
        if by == "token":
            return by_token(store, text, rank=rank, filters=filters, limit=limit)
        if by == "meaning":
            return _by_meaning(store, text, filters, limit, device)
        if by == "feature":
            return _by_feature(store, text, rank, filters, limit, device)
        return _by_prompt(store, text, rank, filters, limit, candidates, device)


def _by_meaning(store: Store, text: str, filters: Filters, limit: int, device: str) -> Found:
    check_labels(store)  # before anything is loaded
    from activations.embedder import load_embedder
    from autointerp.search.meaning import LabelVectors, by_meaning

    return by_meaning(LabelVectors(store, load_embedder(device=device)), text, filters=filters, limit=limit)


def _by_feature(store: Store, text: str, rank: str, filters: Filters, limit: int, device: str) -> Found:
    number = text.strip()
    if not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise InputError(f"{text!r} is no feature number: expected 0 to {store.n_features - 1}.")
    from autointerp.search.similar import by_feature

    return by_feature(store, lambda: _dictionary(store, device), int(number), rank=rank, filters=filters, limit=limit)


def _by_prompt(store: Store, text: str, rank: str, filters: Filters, limit: int, candidates: int, device: str) -> Found:
    from autointerp.search.prompt import by_prompt

    sae = _dictionary(store, device)
    model = _model(store.folder, sae, "float32" if rank == "loss" else None, device)
    return by_prompt(store, sae, model, text, rank=rank, filters=filters, limit=limit, candidates=candidates)


def _dictionary(store: Store, device: str) -> "SAE":
    from activations.model import pick_device
    from sae import load_sae

    return load_sae(store.folder, device=str(pick_device(device)))


def _model(folder: Path, sae: "SAE", dtype: str | None, device: str) -> "Model":
    """The dictionary's model; dtype None: the precision that the run's activations were taken in."""
    from activations import Run, load_model

    run = folder.resolve().parent.parent
    if folder.resolve().parent.name == "dictionaries" and (run / "run.json").is_file():
        opened = Run.open(run)
        if opened.is_begun:
            return load_model(opened.model_name, dtype=dtype or opened.meta.get("model_dtype"), device=device)
    if not sae.model_name:
        raise InputError(f"{folder} does not say which model it is of: expected metadata.model_name in its cfg.json.")
    return load_model(sae.model_name, dtype=dtype, device=device)
