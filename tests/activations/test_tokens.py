"""The short form on disk gives back what went in, at two bytes a token."""

import pytest
import torch

from activations.tokens import Tokens, from_disk, to_disk


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("largest", [65_535, 65_536, 200_000])
def test_what_went_in_comes_back(largest):
    tokens = Tokens(
        ids=ints(5, largest, 0, 7, 7, 1),
        docs=ints(3, 3, 9, 9, 3, 3),
        positions=ints(0, 1, 2, 0, 0, 1),
        roles=torch.tensor([0, 1, 2, 0, 0, 1], dtype=torch.int8),
    )
    back = from_disk(to_disk(tokens))
    for before, after in zip(tokens, back, strict=True):
        assert (before is None and after is None) or (torch.equal(before, after) and before.dtype == after.dtype)


def test_packed_text_takes_two_bytes_a_token():
    n = 65_536
    tokens = Tokens(
        ids=torch.arange(n, dtype=torch.int32) % 49_152,
        docs=torch.arange(n, dtype=torch.int32) // 300,
        positions=torch.arange(n, dtype=torch.int32) % 128,
    )
    assert sum(column.nbytes for column in to_disk(tokens).values()) / n < 2.1


def test_positions_that_do_not_count_are_a_fault_of_ours():
    with pytest.raises(AssertionError, match="positions count from 0"):
        to_disk(Tokens(ids=ints(1, 2), docs=ints(0, 0), positions=ints(0, 2)))
