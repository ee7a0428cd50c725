"""Search in a run of embeddings: the query through the run's embedder, the results with their texts."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from activations.cache import CachedActivations
from activations.embedder import NAME, REVISION, load_embedder
from activations.errors import InputError
from activations.model import pick_device
from activations.run import Run, dictionary_folder
from app.sources import embedded_column
from data.corpora import corpus_fingerprint, read_corpus
from sae.files import load_sae
from steering.retrieve import Change, Retrieved, retrieve


class Results(NamedTuple):
    found: Retrieved
    texts: dict[int, str]
    """Of the documents found; {} for a run of vectors, which has none."""


def retrieve_run(
    address: str | Path,
    query: str | int,
    changes: Sequence[Change] = (),
    *,
    n: int = 10,
    n_controls: int = 20,
    seed: int = 0,
    device: str = "auto",
) -> Results:
    """Search the run of a dictionary (RUN, RUN/ID) with a text, or with one of its rows; see `steering.retrieve`.

    Raises InputError for a run of a language model's tokens, a text where the run has no embedder, a row that is none,
    and a corpus that is another one by now.
    """
    folder = dictionary_folder(address)
    run = Run.open(folder.parent.parent)
    if run.has_text:
        raise InputError(f"{run.path} holds a language model's tokens: expected a run of embeddings or vectors.")
    sae = load_sae(folder, device=str(pick_device(device)))
    cache = run.activations(sae.only_hook("A search"))
    asked = (_row(cache, query), query) if isinstance(query, int) else (_embedded(run, query, device), None)
    found = retrieve(sae, cache, asked[0], changes, n=n, n_controls=n_controls, seed=seed, skip=asked[1])
    return Results(found, texts_of(run, {hit.doc for hit in [*found.base, *found.steered]}))


def texts_of(run: Run, docs: Collection[int]) -> dict[int, str]:
    """The documents of these numbers, of a run of embeddings. Raises InputError when the corpus has changed."""
    column = embedded_column(run.meta)
    if column is None:
        return {}
    name, wanted, texts = run.meta["corpus"], set(docs), {}
    if corpus_fingerprint(name) != run.meta["corpus_hash"]:
        raise InputError(f"{name} is not the corpus that {run.path} was made from: bring that one back.")
    for document in read_corpus(name, text_column=column):
        if document.id in wanted:
            texts[document.id] = document.text
            if len(texts) == len(wanted):
                break
    return texts


def _embedded(run: Run, text: str, device: str) -> Float[Tensor, " d"]:
    if embedded_column(run.meta) is None:
        raise InputError(f"{run.path} holds vectors from elsewhere, and no embedder for a text: ask with --row NUMBER.")
    embedder = load_embedder(run.meta["model"], device=device)
    if embedder.name == NAME and run.meta["revision"] != REVISION:
        raise InputError(f"{run.path} was made with {run.meta['revision']}, not {REVISION}: collect it anew.")
    return embedder.embed([text])[0]


def _row(cache: CachedActivations, number: int) -> Float[Tensor, " d"]:
    if not 0 <= number < cache.n_rows:
        raise InputError(f"There is no row {number}: expected 0 to {cache.n_rows - 1}.")
    shard = max(i for i in range(cache.n_shards) if cache.offset(i) <= number)
    return cache.rows(shard)[number - cache.offset(shard)].to(torch.float32)
