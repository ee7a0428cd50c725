"""Parts of losses: pure functions, each with its paper."""

from jaxtyping import Float
from torch import Tensor


def fvu(error: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Squared error over the squared distance of the target from its batch mean: near 1 at the start."""
    return error.square().sum() / (target.var(dim=0, correction=0).sum() * len(target))
