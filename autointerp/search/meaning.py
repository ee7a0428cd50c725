"""Search by meaning: cosines of a text's embedding with those of all labels.

The embeddings lie beside the store in `label_vectors.safetensors`, by a hash of the label's text: a label that changes
is embedded anew, one that two features share once, and what no label says any more is dropped at the next writing.
"""

import hashlib
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from activations.embedder import NAME, REVISION, Embedder
from activations.errors import InputError
from activations.files import writing
from autointerp.search.found import LIMIT, Found, Hit, check_labels, check_limit, check_text, found
from data.store import Store
from data.store.files import aside
from data.store.search import ALL, Filters, label_texts, labelled

FILE = "label_vectors.safetensors"
_HASH = 16
"""Bytes of a text's SHA-256 that name it."""
_SAVED = 8192
"""Labels that are embedded between two savings, a minute or two on a CPU."""
_BAR = 1024
"""Labels between two steps of the bar; those of like length are put together within them."""
_PIECE = 1024
"""Vectors that are widened to float32 at once, so that they stay in the processor's cache (10 times as fast as 16,384).
Half precision is for the disk: few CPUs multiply it fast, or exactly enough."""


class LabelVectors:
    """The embeddings of a store's labels, kept up to date with it. Not thread-safe."""

    def __init__(self, store: Store, embedder: Embedder) -> None:
        self.store = store
        self.embedder = embedder
        self._state: Hashable = None
        self._ids = np.zeros(0, object)
        self._rows: Int[np.ndarray, " explanations"] = np.zeros(0, np.int64)
        self._vectors: Float16[Tensor, "texts d"] = torch.zeros(0, embedder.d, dtype=torch.float16)

    def nearest(self, text: str) -> tuple[np.ndarray, Float[np.ndarray, " explanations"]]:
        """(explanation ids, their cosines with the text), the nearest first; of equal ones the best explanation.

        Labels that have no embedding yet are embedded first, with a progress bar.
        """
        self._refresh()
        (query,) = self.embedder.embed([text])
        parts = [part.float() @ query for part in self._vectors.split(_PIECE)]
        cosines = (torch.cat(parts) if parts else torch.zeros(0)).numpy()[self._rows]
        order = np.argsort(-cosines, kind="stable")
        return self._ids[order], cosines[order]

    def _refresh(self) -> None:
        """Read the labels again if others than last time are valid."""
        state = self.store.state
        if state == self._state:
            return
        labels = label_texts(self.store)
        keys = [_hash(text) for _, text in labels]
        texts = {key: text for key, (_, text) in zip(keys, labels, strict=True)}
        known = _read(self.store.folder / FILE, _name(self.embedder), self.embedder.d)
        self._vectors = self._embedded(texts, known)
        place = {key: row for row, key in enumerate(texts)}
        self._ids = np.array([id for id, _ in labels], dtype=object)
        self._rows = np.array([place[key] for key in keys], dtype=np.int64)
        self._state = state

    def _embedded(
        self, texts: dict[bytes, str], known: tuple[dict[bytes, int], Float16[Tensor, "_known d"]]
    ) -> Float16[Tensor, "texts d"]:
        """The vectors of `texts`, in their order; those that are not known are made, and saved as they are."""
        place, old = known
        vectors = torch.zeros(len(texts), self.embedder.d, dtype=torch.float16)
        keys = list(texts)
        have = [row for row, key in enumerate(keys) if key in place]
        vectors[have] = old[[place[keys[row]] for row in have]]
        missing = [row for row, key in enumerate(keys) if key not in place]
        done = list(have)
        with tqdm(total=len(missing), desc="embedding labels", unit="label", disable=None) as bar:
            for first in range(0, len(missing), _SAVED):
                rows = missing[first : first + _SAVED]
                for at in range(0, len(rows), _BAR):
                    piece = rows[at : at + _BAR]
                    vectors[piece] = self.embedder.embed([texts[keys[row]] for row in piece]).half()
                    bar.update(len(piece))
                done += rows
                _write(self.store.folder / FILE, _name(self.embedder), [keys[row] for row in done], vectors[done])
        return vectors


def by_meaning(vectors: LabelVectors, text: str, *, filters: Filters = ALL, limit: int = LIMIT) -> Found:
    """Features by the cosine of their label's embedding with that of `text`; of several labels, the nearest.

    Raises InputError for an empty text, and a store without labels.
    """
    check_limit(limit)
    query, store = check_text(text), vectors.store
    check_labels(store)
    ids, cosines = vectors.nearest(query)
    hits: dict[int, Hit] = {}
    first, size = 0, 8 * limit
    while first < len(ids) and len(hits) < limit:
        part = ids[first : first + size].tolist()
        facts = labelled(store, part, filters)
        for id, cosine in zip(part, cosines[first : first + size].tolist(), strict=True):
            if id in facts and facts[id].feature not in hits:
                hits[facts[id].feature] = Hit(facts=facts[id], numbers={"cosine": cosine})
        first, size = first + size, 4 * size
    return found(
        store,
        by="meaning",
        query=text,
        rank="cosine",
        hits=list(hits.values())[:limit],
        total=None,
        definitions={"cosine": f"cosine of the embeddings of the text and of the label ({vectors.embedder.name})"},
        filters=filters,
        otherwise="No feature with a label passes.",
    )


def write_vectors(path: Path, embedder: Embedder, texts: Sequence[str], vectors: Float16[Tensor, "n d"]) -> None:
    """Save the vectors of these texts, all different, as those of this embedder, aside and renamed."""
    _write(path, _name(embedder), [_hash(text) for text in texts], vectors)


def _name(embedder: Embedder) -> str:
    return f"{embedder.name} {REVISION}" if embedder.name == NAME else embedder.name


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:_HASH]


def _read(path: Path, name: str, d: int) -> tuple[dict[bytes, int], Float16[Tensor, "n d"]]:
    """(row by hash, vectors) of a file of this embedder's; nothing of another's. Raises InputError when damaged."""
    empty: tuple[dict[bytes, int], Tensor] = ({}, torch.zeros(0, d, dtype=torch.float16))
    if not path.exists():
        return empty
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("embedder") != name:
                return empty
            hashes, vectors = file.get_tensor("hashes"), file.get_tensor("vectors")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it, and it is made anew.") from None
    forms = [(each.dtype, *each.shape) for each in (hashes, vectors)]
    if forms != [(torch.uint8, vectors.shape[0], _HASH), (torch.float16, vectors.shape[0], d)]:
        raise InputError(f"{path} does not hold the vectors of labels: remove it, and it is made anew.")
    keys = hashes.numpy().tobytes()
    return {keys[at : at + _HASH]: at // _HASH for at in range(0, len(keys), _HASH)}, vectors


def _write(path: Path, name: str, keys: Sequence[bytes], vectors: Float16[Tensor, "n d"]) -> None:
    """Save the vectors with the hashes of their texts, aside and renamed."""
    hashes: UInt8[Tensor, "n 16"] = torch.tensor(np.frombuffer(b"".join(keys), np.uint8)).view(-1, _HASH)
    with writing(path.parent), aside(path) as temporary:
        save_file({"hashes": hashes, "vectors": vectors.contiguous()}, temporary, metadata={"embedder": name})
