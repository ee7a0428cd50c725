"""Several hooks as one: their rows side by side (`Joined`), or one after another (`Pooled`)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.cache import OPENING_SHARDS, Activations
from activations.errors import InputError
from activations.moments import Moments, merge, moments
from activations.tokens import Tokens


class Several(Activations):
    """What both share; norms are those at the first hook."""

    def __init__(self, sources: Sequence[Activations]) -> None:
        super().__init__()
        self.sources = list(sources)
        for source in self.sources:
            source.given_up = self.given_up

    @property
    def sink_threshold(self) -> float:
        return self.sources[0].sink_threshold

    @property
    def median_norm(self) -> float:
        return self.sources[0].median_norm

    @property
    def opening_moments(self) -> Moments:
        shards = (i for i in range(OPENING_SHARDS) if self.has(i))
        each = ((self.rows(i), self.mask(i)) for i in shards)
        return merge(moments(rows, rows.float().norm(dim=1), mask) for rows, mask in each)


class Joined(Several):
    """Row n is row n of each source, side by side; it is ordinary where it is at all of them.

    sources: caches of one run, or of runs over the same tokens (two models of one tokenizer).
    Raises InputError when their rows are not of the same tokens.
    """

    def __init__(self, sources: Sequence[Activations]) -> None:
        super().__init__(sources)
        self.hook = " + ".join(source.hook for source in sources)
        first = self.sources[0]
        for other in self.sources[1:]:
            if first.has(0) != other.has(0) or not _same_tokens(first, other):
                raise InputError(
                    f"The rows at {first.hook} and {other.hook} are not of the same tokens: collect both from the "
                    "same corpus, with one tokenizer."
                )

    @property
    def parts(self) -> list[Activations]:
        return self.sources

    @property
    def d_in(self) -> int:
        return sum(source.d_in for source in self.sources)

    @property
    def row_bytes(self) -> int:
        return sum(source.row_bytes for source in self.sources)

    def has(self, i: int) -> bool:
        return all(source.has(i) for source in self.sources)

    def rows_of(self, i: int) -> int:
        return self.sources[0].rows_of(i)

    def rows(self, i: int) -> Float[Tensor, "rows d_in"]:
        return torch.cat([source.rows(i) for source in self.sources], dim=1)

    def mask(self, i: int) -> Bool[Tensor, " rows"]:
        return torch.stack([source.mask(i) for source in self.sources]).all(dim=0)

    def tokens(self, i: int) -> Tokens:
        return self.sources[0].tokens(i)


class Pooled(Several):
    """The shards of all sources in turn: shard i is shard i // n of source i % n.

    factors: what the rows of each source are multiplied by, so that all layers weigh the same.
    Raises InputError when the sources differ in width.
    """

    def __init__(self, sources: Sequence[Activations], factors: Sequence[float]) -> None:
        super().__init__(sources)
        self.hook = " | ".join(source.hook for source in sources)
        self.factors = list(factors)
        if len({source.d_in for source in sources}) > 1:
            widths = ", ".join(f"{source.hook} {source.d_in}" for source in sources)
            raise InputError(f"Rows that are pooled have one width ({widths}): leave out the hooks of another.")

    @property
    def parts(self) -> list[Activations]:
        return self.sources[:1]

    @property
    def d_in(self) -> int:
        return self.sources[0].d_in

    @property
    def row_bytes(self) -> int:
        return self.sources[0].row_bytes

    def has(self, i: int) -> bool:
        return self._at(i).has(i // len(self.sources))

    def rows_of(self, i: int) -> int:
        return self._at(i).rows_of(i // len(self.sources))

    def rows(self, i: int) -> Float[Tensor, "rows d_in"]:
        return self._at(i).rows(i // len(self.sources)) * self.factors[i % len(self.sources)]

    def mask(self, i: int) -> Bool[Tensor, " rows"]:
        return self._at(i).mask(i // len(self.sources))

    def tokens(self, i: int) -> Tokens:
        return self._at(i).tokens(i // len(self.sources))

    def _at(self, i: int) -> Activations:
        return self.sources[i % len(self.sources)]


def _same_tokens(a: Activations, b: Activations) -> bool:
    return not a.has(0) or torch.equal(a.tokens(0).ids, b.tokens(0).ids)
