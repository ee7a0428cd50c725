"""Feature families: trees of latents that fire together, a general one above the special ones that fire inside it.

Of the pairs that fire together (`sae.coactivation`) the maximum spanning forest is kept, and each of its edges is
turned from the denser latent to the rarer. A latent that nothing points to, with more than 2 below it, is the parent of
a family: all that is reached from it. Without it, each of its children may be the parent of a smaller family. Then all
parents are taken away, and all is done again on the latents left, 3 times, so that what a parent outshone is seen. Of
two families that are nearly the same the larger stays.

Source: O'Neill et al. 2024, arXiv:2408.00657, sec. 4, and its code (saerch, family.py and matrix.py). Differs: latents
enter by how often they fire, not by the scores of their labels; what fires together by chance is left out; one
threshold for all rounds (there .1, then .07 by default); of two equal families one stays (there none).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import minimum_spanning_tree

from sae.coactivation import Edges, edges

MIN_CHILDREN = 3
"""Latents right below a parent."""
MIN_SIZE = 4
"""Latents below it in all."""
OVERLAP = 0.6
"""Families whose children overlap by more (intersection over union) are one."""


@dataclass(frozen=True, kw_only=True)
class FamilySettings:
    """Which latents enter, and what joins them."""

    threshold: float = 0.1
    """Least share of the rarer latent's firings on which the denser one fires too."""
    chance: float = 0.05
    """Pairs of which so many or more would be expected by chance, all pairs considered, are not joined; a huge number
    leaves the threshold alone to decide, as in the paper."""
    max_density: float = 0.2
    """Latents that fire on this share of the rows or more are left out: they fire with everything."""
    min_firings: int = 10
    """Latents that fire on fewer rows are left out: their shares are noise."""
    rounds: int = 3
    """How often the parents are taken away and families are looked for again."""


@dataclass(frozen=True, kw_only=True)
class Family:
    parent: int
    children: tuple[int, ...]
    """All latents below the parent, depth first, the denser ones first."""
    under: tuple[int, ...]
    """For each of them: the latent that it hangs from."""
    round: int
    """How often parents had been taken away before it was found."""


Tree = dict[int, list[int]]
"""Latent -> those right below it, the denser ones first; in the order in which they are visited."""


def entering(fires: csr_matrix, settings: FamilySettings) -> Int[np.ndarray, " m"]:
    """The latents that may be in a family."""
    each = fires.getnnz(axis=0)
    return np.flatnonzero((each >= settings.min_firings) & (each < settings.max_density * fires.shape[0]))


def families(fires: csr_matrix, settings: FamilySettings = FamilySettings()) -> list[Family]:  # noqa: B008  (immutable)
    """The families of latents, by round and then the densest parents first.

    fires: rows by latents, 1 where the latent is not 0. The same rows give the same families.
    """
    each = fires.getnnz(axis=0)
    found: list[Family] = []
    pairs = edges(fires, entering(fires, settings), settings.threshold, settings.chance)
    for number in range(settings.rounds + 1):
        here = [Family(round=number, **parts) for parts in _families(forest(pairs, each))]
        if not here:
            break
        found += here
        gone = np.isin(pairs.a, parents := [family.parent for family in here]) | np.isin(pairs.b, parents)
        pairs = Edges(*(column[~gone] for column in pairs))
    kept = _different([family for family in found if len(family.children) >= MIN_SIZE])
    return sorted(kept, key=lambda family: (family.round, -each[family.parent], family.parent))


def forest(pairs: Edges, firings: Int[np.ndarray, " d_sae"]) -> Tree:
    """The maximum spanning forest, each edge from its denser latent to the rarer one. firings: of each latent.

    Of equal shares the pair with the rarer latent above wins: what lies wholly inside a child hangs from the child, not
    from the parent around both.
    """
    n = len(firings)
    rank = np.empty(len(pairs.share))
    rank[np.lexsort((firings[pairs.a], -pairs.share))] = np.arange(1, len(rank) + 1)  # stable, the same everywhere
    kept = minimum_spanning_tree(csr_matrix((rank, (pairs.a, pairs.b)), shape=(n, n))).tocoo()
    order = np.lexsort((kept.col, -firings[kept.col]))
    tree: Tree = {}
    for above, below in zip(kept.row[order].tolist(), kept.col[order].tolist(), strict=True):
        tree.setdefault(above, []).append(below)
    return tree


def _families(tree: Tree) -> Iterator[Mapping[str, Any]]:
    """The families of a forest whose latents may hang from several others."""
    hanging = {below for children in tree.values() for below in children}
    for root in sorted(set(tree) - hanging):
        yield from _within(reached(tree, root), root)


def _within(tree: Tree, root: int) -> Iterator[Mapping[str, Any]]:
    """The family of a root and, if it is one, those of its children without it."""
    if len(tree[root]) < MIN_CHILDREN:
        return
    below = reached(tree, root)
    pairs = [(child, above) for above, children in below.items() for child in children]
    place = {latent: i for i, latent in enumerate(below)}
    children, under = zip(*sorted(pairs, key=lambda pair: place[pair[0]]), strict=True)
    yield {"parent": root, "children": children, "under": under}
    for child in tree[root]:
        yield from _within(tree, child)


def reached(tree: Tree, root: int) -> Tree:
    """The tree of what is below `root`, visited depth first; a latent that hangs from several stays at the first."""
    found: Tree = {}
    stack, seen = [(root, iter(tree.get(root, ())))], {root}
    found[root] = []
    while stack:
        above, rest = stack[-1]
        below = next((child for child in rest if child not in seen), None)
        if below is None:
            stack.pop()
            continue
        seen.add(below)
        found[above].append(below)
        found[below] = []
        stack.append((below, iter(tree.get(below, ()))))
    return found


def _different(found: Sequence[Family]) -> list[Family]:
    """Those of which no larger one, or an earlier one as large, has the same parent or nearly the same children."""
    kept: list[Family] = []
    for family in sorted(found, key=lambda family: -len(family.children)):
        mine = set(family.children)
        if not any(
            other.parent == family.parent or len(mine & set(other.children)) > OVERLAP * len(mine | set(other.children))
            for other in kept
        ):
            kept.append(family)
    return kept
