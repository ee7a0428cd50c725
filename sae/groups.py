"""Layers that one dictionary can serve: groups of hooks whose rows point the same way.

Source: Ghilardi et al. 2024, "Accelerating Sparse Autoencoder Training via Layer-Wise Transfer Learning" (Group-SAE),
arXiv:2410.21508. Differs: the mean that is taken out is that of the cache, not a running one.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from activations.cache import CachedActivations
from activations.errors import InputError
from activations.joined import Joined
from activations.run import Run

LIMIT = 0.2
"""Largest mean over groups of the largest distance inside each."""


def layer_groups(
    run: Run, hooks: Sequence[str], *, limit: float = LIMIT, n_tokens: int = 100_000
) -> list[tuple[str, ...]]:
    """The fewest groups of `hooks` (in their order) whose mean largest distance is below `limit`.

    Distances are those of `angular_distances`, on the first n_tokens ordinary tokens. Train one dictionary a group with
    `hooks=group`. Raises InputError for hooks that are not cached, or of other widths.
    """
    distances = angular_distances([run.activations(hook) for hook in hooks], n_tokens=n_tokens)
    for n in range(1, len(hooks)):
        groups = complete_linkage(distances, n)
        if sum(float(distances[group][:, group].max()) for group in groups) / n < limit:
            break
    else:
        groups = [[i] for i in range(len(hooks))]
    return [tuple(hooks[i] for i in group) for group in groups]


@torch.no_grad()
def angular_distances(
    caches: Sequence[CachedActivations], *, n_tokens: int = 100_000
) -> Float[Tensor, "n_hooks n_hooks"]:
    """Mean over tokens of the angle between centred rows at two hooks, in half turns: 0 the same, 1 opposite."""
    if len({cache.d_in for cache in caches}) > 1:
        raise InputError("Angles are between rows of one width: leave out the hooks of another.")
    rows = Joined(caches)
    means = torch.stack([cache.mean for cache in caches])
    total, seen, i = torch.zeros(len(caches), len(caches), dtype=torch.float64), 0, 0
    while seen < n_tokens and rows.has(i):
        for part in rows.rows(i)[rows.mask(i)][: n_tokens - seen].split(4096):
            centred = part.float().unflatten(1, (len(caches), -1)) - means
            unit = torch.nn.functional.normalize(centred, dim=2)
            total += (unit @ unit.mT).clamp(-1, 1).arccos().double().sum(dim=0)
            seen += len(part)
        i += 1
    distances = total / (max(seen, 1) * math.pi)
    return distances.fill_diagonal_(0.0).float()


def complete_linkage(distances: Float[Tensor, "m m"], n: int) -> list[list[int]]:
    """n groups: the two whose farthest members are nearest are joined, again and again. In order of first members."""
    groups = [[i] for i in range(len(distances))]
    while len(groups) > n:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a + 1, len(groups))]
        a, b = min(pairs, key=lambda pair: float(distances[groups[pair[0]]][:, groups[pair[1]]].max()))
        groups[a] = sorted(groups[a] + groups.pop(b))
    return sorted(groups)
