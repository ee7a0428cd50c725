"""One search from an address and a text: opens and loads what the way of asking needs."""

from pathlib import Path

from activations import load_model
from activations.embedder import load_embedder
from activations.errors import InputError
from activations.model import Model, pick_device
from activations.run import Run
from autointerp.search.found import LIMIT, Found, check_labels, check_rank
from autointerp.search.meaning import LabelVectors, by_meaning
from autointerp.search.prompt import CANDIDATES, by_prompt
from autointerp.search.prompt import RANKS as PROMPT_RANKS
from autointerp.search.similar import RANKS as FEATURE_RANKS
from autointerp.search.similar import by_feature
from autointerp.search.stored import TOKEN_RANKS, by_token, by_words
from data.store import open_store
from data.store.search import ALL, Filters
from sae.base import SAE
from sae.files import load_sae

WAYS: dict[str, tuple[str, ...]] = {
    "words": (),
    "meaning": (),
    "token": TOKEN_RANKS,
    "prompt": PROMPT_RANKS,
    "feature": FEATURE_RANKS,
}
"""Ways to ask, and the orders that each has, the usual one first; none where there is only one."""


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
    of one that they are like. rank: see `WAYS`; None for the usual order. candidates: features whose loss effect is
    measured.
    Raises InputError or StoreError, one line, for what is missing: an index, labels, the model.
    """
    if by not in WAYS:
        raise InputError(f"by={by!r} is no way to search: expected one of {', '.join(WAYS)}.")
    if rank is None:
        rank = next(iter(WAYS[by]), "")
    elif not WAYS[by]:
        raise InputError(f"A search by {by} has one order: leave out rank={rank!r}.")
    else:
        check_rank(rank, WAYS[by], by)
    with open_store(address) as store:
        if by == "words":
            return by_words(store, text, filters=filters, limit=limit)
        if by == "token":
            return by_token(store, text, rank=rank, filters=filters, limit=limit)
        if by == "feature":
            number = text.strip()
            if not (number.isascii() and number.isdecimal() and len(number) < 10):
                raise InputError(f"{text!r} is no feature number: expected 0 to {store.n_features - 1}.")
            where = str(pick_device(device))
            return by_feature(
                store,
                lambda: load_sae(store.folder, device=where),
                int(number),
                rank=rank,
                filters=filters,
                limit=limit,
            )
        if by == "meaning":
            check_labels(store)  # before the embedder is loaded
            vectors = LabelVectors(store, load_embedder(device=device))
            return by_meaning(vectors, text, filters=filters, limit=limit)
        sae = load_sae(store.folder, device=str(pick_device(device)))
        model = _model_of(store.folder, sae, "float32" if rank == "loss" else None, device)
        return by_prompt(store, sae, model, text, rank=rank, filters=filters, limit=limit, candidates=candidates)


def _model_of(folder: Path, sae: SAE, dtype: str | None, device: str) -> Model:
    """The dictionary's model; dtype None: the precision that the run's activations were taken in."""
    run = folder.resolve().parent.parent
    if folder.resolve().parent.name == "dictionaries" and (run / "run.json").is_file():
        opened = Run.open(run)
        if opened.is_begun:
            return load_model(opened.model_name, dtype=dtype or opened.meta.get("model_dtype"), device=device)
    if not sae.model_name:
        raise InputError(f"{folder} does not say which model it is of: expected metadata.model_name in its cfg.json.")
    return load_model(sae.model_name, dtype=dtype, device=device)
