"""Documents to contexts: tokens packed end to end into rows of one length, with the document of every token.

Every document is followed by a separator token; no BOS is added and nothing is padded, so a context may begin and end
within a document. Text is taken literally: `<|im_start|>` in a document becomes ordinary tokens, not the control token.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from .corpora import Document

BATCH_CHARACTERS = 200_000  # tokenised at a time: enough to keep the threads busy, little when few tokens are wanted


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers fast tokenizer that is used here."""

    eos_token_id: int | None

    def get_vocab(self) -> dict[str, int]: ...

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]: ...


class Context(NamedTuple):
    ids: np.ndarray
    """Token ids, int32, shape (context,)."""
    docs: np.ndarray
    """`Document.id` of each token, int32, shape (context,); a separator has the id of the document that it ends."""


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
    if context < 1:
        raise ValueError(f"context={context} tokens, expected at least 1: 128 is the default.")
    if n_tokens is not None and n_tokens < context:
        raise ValueError(f"n_tokens={n_tokens} holds no context of {context} tokens: raise n_tokens or lower context.")
    return _pack(documents, tokenizer, context, None if n_tokens is None else n_tokens // context, separator_id)


def _pack(
    documents: Iterable[Document], tokenizer: Tokenizer, context: int, n_contexts: int | None, separator_id: int | None
) -> Iterator[Context]:
    end = [] if separator_id is None else [separator_id]
    ids = docs = np.empty(0, np.int32)  # what the last context left over
    n_made = 0
    for batch in _batches(documents):
        encoded = tokenizer(
            [document.text for document in batch], add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
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


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
