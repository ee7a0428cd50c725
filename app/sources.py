"""What a run is made of, by name: text packed, one document at a time or as chat; vectors from files or an embedder.

A source says what identifies it (`identity`, which goes into run.json) and opens as what a capture takes.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from activations.embedder import Embedder
from activations.errors import InputError
from activations.model import Model
from data.chat import ROLES, chat, read_dialogues
from data.corpora import corpus_fingerprint, label_names, read_corpus
from data.tokens import Context, one_by_one, pack, separator_of
from data.vectors import read_vectors, vectors_fingerprint

LAYOUTS = ("packed", "documents", "chat")
CONTEXT = {"packed": 128, "documents": 1024, "chat": 1024}
TEXTS_PER_BLOCK = 4096
_EMBEDDINGS = "embeddings text="

VectorBlock = tuple[Tensor, Callable[[], Tensor]]


class _Hub(TypedDict):
    split: str
    revision: str | None


class _Sizes(TypedDict):
    context: int
    n_tokens: int


class _Columns(TypedDict):
    text_column: str
    label_column: str | None


@dataclass(frozen=True, kw_only=True)
class Text:
    """A corpus and how it is cut into the sequences that go through the model.

    layout: "packed" (documents end to end, in contexts of one length), "documents" (each by itself), or "chat" (each
    dialogue by itself, through the model's chat template).
    """

    corpus: str = "sample"
    layout: str = "packed"
    tokens: int = 2_000_000
    context: int | None = None
    """Longest sequence, in tokens; None takes 128 packed, else 1,024."""
    text_column: str = "text"
    label_column: str | None = None
    """Keep each document's label from this column; the layout must be "documents"."""
    split: str = "train"
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise InputError(f"Layout {self.layout!r} is unknown: expected one of {', '.join(LAYOUTS)}.")
        if self.label_column is not None and self.layout != "documents":
            raise InputError("Labels belong to whole documents: take --layout documents with --label-column.")
        if self.tokens < self.length:
            raise InputError(
                f"{self.tokens} tokens hold no sequence of {self.length}: raise --tokens or lower --context."
            )

    @property
    def length(self) -> int:
        return self.context or CONTEXT[self.layout]

    @property
    def identity(self) -> dict[str, Any]:
        layout = self.layout
        if self.text_column != "text" or self.label_column is not None:
            layout += f" text={self.text_column}" + (f" label={self.label_column}" if self.label_column else "")
        return {
            "corpus": self.corpus,
            "corpus_hash": corpus_fingerprint(self.corpus, revision=self.revision),
            "context": self.length,
            "n_tokens": self.tokens,
            "layout": layout,
        }

    @property
    def _hub(self) -> "_Hub":
        return {"split": self.split, "revision": self.revision}

    def categories(self) -> Mapping[str, Sequence[str]]:
        """Names behind the sequences' roles and labels."""
        if self.layout == "chat":
            return {"roles": ROLES}
        if self.label_column is None:
            return {}
        return {"labels": label_names(self.corpus, self.label_column, text_column=self.text_column, **self._hub)}

    def sequences(
        self, model: Model, categories: Mapping[str, Sequence[str]], warn: Callable[[str], object]
    ) -> Iterable[Context]:
        """Raises InputError or CorpusError. warn: told at the end what was left out."""
        sizes: _Sizes = {"context": self.length, "n_tokens": self.tokens}
        if self.layout == "chat":
            return chat(read_dialogues(self.corpus, **self._hub), model.tokenizer, warn=warn, **sizes)
        columns: _Columns = {"text_column": self.text_column, "label_column": self.label_column}
        documents = read_corpus(self.corpus, **columns, **self._hub)
        if self.layout == "documents":
            return one_by_one(documents, model.tokenizer, label_names=categories.get("labels"), **sizes)
        try:
            separator = separator_of(model.tokenizer)
        except ValueError as error:
            raise InputError(f"{model.name} cannot pack documents ({error}): take --layout documents.") from None
        return pack(documents, model.tokenizer, separator_id=separator, **sizes)


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Vectors in files: a .npy matrix, Parquet, or a folder of them."""

    path: str
    column: str | None = None
    rows: int = 2_000_000
    """At most so many."""

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "corpus": self.path,
            "corpus_hash": vectors_fingerprint(self.path),
            "context": 1,
            "n_tokens": self.rows,
            "layout": "vectors" if self.column is None else f"vectors column={self.column}",
        }

    @property
    def width(self) -> int:
        return int(next(read_vectors(self.path, self._columns)).shape[1])

    @property
    def _columns(self) -> str | list[str] | None:
        return self.column.split(",") if self.column is not None and "," in self.column else self.column

    def blocks(self) -> Iterator[VectorBlock]:
        first = 0
        for block in read_vectors(self.path, self._columns):
            kept = torch.from_numpy(block[: self.rows - first])
            if len(kept) == 0:
                return
            yield torch.arange(first, first + len(kept)), lambda kept=kept: kept  # type: ignore[misc]
            first += len(kept)


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """A vector for each document of a corpus, from a sentence embedder."""

    embedder: str
    corpus: str = "sample"
    rows: int = 2_000_000
    """At most so many documents."""
    text_column: str = "text"

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus,
            "corpus_hash": corpus_fingerprint(self.corpus),
            "context": 1,
            "n_tokens": self.rows,
            "layout": f"{_EMBEDDINGS}{self.text_column}",
        }

    def blocks(self, embedder: Embedder) -> Iterator[VectorBlock]:
        documents = itertools.islice(read_corpus(self.corpus, text_column=self.text_column), self.rows)
        while part := list(itertools.islice(documents, TEXTS_PER_BLOCK)):
            texts = [document.text for document in part]
            yield torch.tensor([document.id for document in part]), lambda texts=texts: embedder.embed(texts)  # type: ignore[misc]


def embedded_column(meta: Mapping[str, Any]) -> str | None:
    """The column whose texts a run of embeddings was made from; None for another kind of run. meta: of run.json."""
    layout = str(meta["layout"])
    return layout.removeprefix(_EMBEDDINGS) if layout.startswith(_EMBEDDINGS) else None
