"""Documents to contexts: packed end to end into rows of one length, or one by one, each a sequence of its own.

No BOS is added and nothing is padded. `pack` puts a separator token after every document, so a context may begin and
end within a document; `one_by_one` needs none. Text is taken literally: `<|im_start|>` in a document becomes ordinary
tokens, not the control token (dialogues, with their control tokens, are in `data.chat`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from .corpora import Document

BATCH_CHARACTERS = 200_000  # tokenised at a time: enough to keep the threads busy, little when few tokens are wanted
T = TypeVar("T")


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers fast tokenizer that is used here."""

    eos_token_id: int | None

    def get_vocab(self) -> dict[str, int]: ...

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]: ...


class Context(NamedTuple):
    """What goes through the model by itself. All contexts of one source have roles or none has; so with labels."""

    ids: np.ndarray
    """Token ids, int32, shape (n,), n at most the source's `context`."""
    docs: np.ndarray
    """`Document.id` of each token, int32, shape (n,); a separator has the id of the document that it ends."""
    roles: np.ndarray | None = None
    """Who says each token, int8, shape (n,): an index into `data.chat.ROLES`."""
    labels: np.ndarray | None = None
    """The class of each token's document, int32, shape (n,): an index into the list of `data.corpora.label_names`."""


def separator_of(tokenizer: Tokenizer) -> int:
    """The id of `<|endoftext|>`, or of the end-of-sequence token where there is none.

    Raises ValueError for a tokenizer with neither.
    """
    separator = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if separator is None:
        raise ValueError(
            "the tokenizer has no separator, expected <|endoftext|> or an EOS token: pass separator_id yourself."
        )
    return separator


def pack(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    context: int = 128,
    n_tokens: int | None = None,
    separator_id: int | None,
) -> Iterator[Context]:
    """Contexts of exactly `context` tokens; the unfinished tail is dropped.

    n_tokens: stop after so many tokens, rounded down to whole contexts (None: at the end of `documents`, which is also
    the end when they hold less).
    separator_id: put after every document, see `separator_of`; None: nothing is.
    The same documents and tokenizer give the same contexts. Only a batch of documents is in memory at a time.
    Raises ValueError, at once, when `context` or `n_tokens` leaves no context.
    """
    check_sizes(context, n_tokens)
    return _pack(documents, tokenizer, context, None if n_tokens is None else n_tokens // context, separator_id)


def one_by_one(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    context: int = 128,
    n_tokens: int | None = None,
    label_names: Sequence[str] | None = None,
) -> Iterator[Context]:
    """A context for each document: its first `context` tokens at most, and nothing of another document.

    n_tokens: stop before the first document with which there would be more (None: at the end of `documents`).
    label_names: all labels that occur, in the order of their numbers; None: contexts have no labels.
    The same documents and tokenizer give the same contexts. Only a batch of documents is in memory at a time.
    Raises ValueError, at once for sizes as `pack` does, else at a document whose label is not in `label_names`.
    """
    check_sizes(context, n_tokens)
    numbers = None if label_names is None else {label: number for number, label in enumerate(label_names)}
    return up_to(n_tokens, _one_by_one(documents, tokenizer, context, numbers))


def check_sizes(context: int, n_tokens: int | None) -> None:
    """Raise ValueError for sizes that leave no context."""
    if context < 1:
        raise ValueError(f"context={context} tokens, expected at least 1: 128 is the default.")
    if n_tokens is not None and n_tokens < context:
        raise ValueError(f"n_tokens={n_tokens} holds no context of {context} tokens: raise n_tokens or lower context.")


def up_to(n_tokens: int | None, contexts: Iterable[Context]) -> Iterator[Context]:
    """The contexts before the first one with which there would be more than `n_tokens` (None: all)."""
    taken = 0
    for each in contexts:
        taken += len(each.ids)
        if n_tokens is not None and taken > n_tokens:
            return
        yield each
        if taken == n_tokens:  # what comes next need not even be read
            return


def batches(items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of about BATCH_CHARACTERS, by what `length` says an item has."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += length(item)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pack(
    documents: Iterable[Document], tokenizer: Tokenizer, context: int, n_contexts: int | None, separator_id: int | None
) -> Iterator[Context]:
    end = [] if separator_id is None else [separator_id]
    ids = docs = np.empty(0, np.int32)  # what the last context left over
    n_made = 0
    for batch, encoded in _tokenised(documents, tokenizer):
        rows = [np.array(row + end, np.int32) for row in encoded]
        ids = np.concatenate([ids, *rows])
        docs = np.concatenate([docs, *(np.full(len(row), d.id, np.int32) for d, row in zip(batch, rows, strict=True))])
        whole = len(ids) // context * context
        for at in range(0, whole, context):
            yield Context(ids[at : at + context].copy(), docs[at : at + context].copy())
            n_made += 1
            if n_made == n_contexts:
                return
        ids, docs = ids[whole:], docs[whole:]


def _one_by_one(
    documents: Iterable[Document], tokenizer: Tokenizer, context: int, numbers: dict[str, int] | None
) -> Iterator[Context]:
    for batch, encoded in _tokenised(documents, tokenizer):
        for document, row in zip(batch, encoded, strict=True):
            ids = np.array(row[:context], np.int32)
            if not len(ids):  # a tokenizer may drop all of a text
                continue
            labels = None
            if numbers is not None:
                labels = np.full(len(ids), _label_number(document, numbers), np.int32)
            yield Context(ids, np.full(len(ids), document.id, np.int32), labels=labels)


def _label_number(document: Document, numbers: dict[str, int]) -> int:
    if document.label is None:
        raise ValueError(f"document {document.id} has no label, expected one: read the corpus with label_column.")
    if document.label not in numbers:
        raise ValueError(
            f"document {document.id} has the label {document.label!r}, expected one of the {len(numbers)} in "
            "label_names: take them from the same corpus and column."
        )
    return numbers[document.label]


def _tokenised(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[list[Document], list[list[int]]]]:
    for batch in batches(documents, lambda document: len(document.text)):
        texts = [document.text for document in batch]
        yield (
            batch,
            tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"],
        )
