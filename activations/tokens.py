"""The tokens behind a shard's rows, and their short form on disk: about two bytes a token.

Ids of a vocabulary under 65,536 take two bytes; positions are the lengths of the sequences, documents the lengths of
their runs.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Int, Int8, Int32
from torch import Tensor


class Tokens(NamedTuple):
    """The tokens behind the rows of a shard."""

    ids: Int32[Tensor, " rows"]
    docs: Int32[Tensor, " rows"]
    """Number of the document in the corpus."""
    positions: Int32[Tensor, " rows"]
    """Position in the sequence."""
    roles: Int8[Tensor, " rows"] | None = None
    """Of a chat: who says the token, an index into the run's `roles`."""
    labels: Int32[Tensor, " rows"] | None = None
    """Of a labelled corpus: the document's label, an index into the run's `labels`."""


def to_disk(tokens: Tokens) -> dict[str, Tensor]:
    """The short form, ids first."""
    starts = (tokens.positions == 0).nonzero().flatten()
    lengths = torch.diff(starts, append=torch.tensor([len(tokens.ids)])).int()
    assert torch.equal(_positions(lengths), tokens.positions), "positions count from 0 in each sequence"
    numbers, runs = torch.unique_consecutive(tokens.docs, return_counts=True)
    short = bool((tokens.ids >= 0).all()) and int(tokens.ids.max()) < 1 << 16
    columns = {
        "ids": tokens.ids.to(torch.uint16) if short else tokens.ids,
        "lengths": lengths,
        "doc_numbers": numbers,
        "doc_lengths": runs.int(),
        "roles": tokens.roles,
        "labels": tokens.labels,
    }
    return {name: column for name, column in columns.items() if column is not None}


def from_disk(columns: Mapping[str, Tensor]) -> Tokens:
    """The tokens of a short form."""
    return Tokens(
        ids=columns["ids"].int(),
        docs=columns["doc_numbers"].repeat_interleave(columns["doc_lengths"]),
        positions=_positions(columns["lengths"]),
        roles=columns.get("roles"),
        labels=columns.get("labels"),
    )


def _positions(lengths: Int[Tensor, " sequences"]) -> Int32[Tensor, " rows"]:
    ends = lengths.long().cumsum(dim=0)
    return (torch.arange(int(lengths.sum())) - (ends - lengths).repeat_interleave(lengths)).int()
