"""Choosing which latents stay: pure functions of pre-activations. None carries gradient (see
`sae.sparse.selected`); values come out in float32 whatever the precision of the product."""

from jaxtyping import Float, Int
from torch import Tensor


def topk(pre: Float[Tensor, "n d_sae"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest of each row with their indices, indices ascending; values below 0 become 0."""
    indices = pre.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    return pre.gather(1, indices).relu().float(), indices


def abs_topk(pre: Float[Tensor, "n d_sae"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k of largest magnitude of each row, with their sign, indices ascending."""
    indices = pre.abs().topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    return pre.gather(1, indices).float(), indices
