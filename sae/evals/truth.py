"""A dictionary against the truth: how well its latents are the features that a planted world is made of.

A latent is read as a detector of the feature whose direction is nearest to its decoder row, by |cosine|; several
latents may have the same one. It detects where it is not 0.
Source: MCC, precision, recall, F1, uniqueness and shrinkage as SAELens defines them for its synthetic worlds
(`eval_sae_on_synthetic_data`). Absorption is exact, since which child fires is known: no probe is trained.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from activations.errors import InputError
from sae.evals.metric import Metric
from sae.evals.subject import Subject

SAMPLES = 50_000
SEED = 1 << 31
"""Added to the seed, so that no row is one that was planted to train on."""


@runtime_checkable
class Codec(Protocol):
    """What is asked of a dictionary: an SAE, or anything that has these."""

    @property
    def W_dec(self) -> Tensor: ...
    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, z: Tensor) -> Tensor: ...


class Matches(NamedTuple):
    """Latents and features by the |cosine| of decoder rows and directions."""

    feature: Int[Tensor, " d_sae"]
    """Nearest to each latent."""
    latent: Int[Tensor, " n_features"]
    """Nearest to each feature."""
    found: Bool[Tensor, " n_features"]
    """Features that are nearest to their nearest latent."""
    mcc: float
    """Mean |cosine| of the best pairing of latents and features, one to one (Hungarian)."""


@torch.no_grad()
def truth(
    sae: Codec,
    directions: Float[Tensor, "n_features d_in"],
    samples: Iterable[tuple[Float[Tensor, "n d_in"], Float[Tensor, "n n_features"]]],
    parent: Int[Tensor, " n_features"] | None = None,
) -> dict[str, Metric]:
    """Every metric of `sae` against the true features, by name.

    samples: batches of rows and what their features were, on the dictionary's device; rows as the dictionary takes
    them. parent: of each feature, -1 for none; adds absorption and splitting where there are trees.
    """
    matches = match(sae.W_dec, directions)
    counts, tree = _Counts(len(sae.W_dec), sae.W_dec.device), None
    if parent is not None and bool((parent >= 0).any()):
        tree = _Tree(matches, parent)
    for x, z in samples:
        codes = sae.encode(x)
        fires, on = codes != 0, z != 0
        counts.add(x, sae.decode(codes), fires, on, on[:, matches.feature])
        if tree is not None:
            tree.add(fires, on)
    return {**_metrics(counts, matches), **(tree.metrics(counts) if tree is not None else {})}


def against_the_truth(subject: Subject) -> dict[str, Metric]:
    """`truth` on new rows of the world in the options, drawn with the seed there."""
    sae, seed, given = subject.sae, subject.options.seed, subject.options.world
    assert given is not None
    if given.directions.shape[1] != sae.d_in:
        raise InputError(
            f"The world's rows have {given.directions.shape[1]} numbers and the dictionary reads {sae.d_in}: "
            "give the --world that the run was collected from."
        )
    world = given.to(str(sae.W_dec.device))
    found = truth(sae, world.directions, world.batches(SAMPLES, SEED + seed), world.parent)
    return {name: replace(each, seed=seed) if "samples" in each.of else each for name, each in found.items()}


def match(W_dec: Float[Tensor, "d_sae d_in"], directions: Float[Tensor, "n_features d_in"]) -> Matches:
    """Compare all decoder rows with all directions; takes d_sae * n_features floats."""
    from scipy.optimize import linear_sum_assignment

    cosines = (normalize(W_dec.float(), dim=1) @ normalize(directions.float(), dim=1).T).abs()
    feature, latent = cosines.argmax(dim=1), cosines.argmax(dim=0)
    pairs = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    mcc = float(cosines[tuple(torch.as_tensor(places, device=cosines.device) for places in pairs)].mean())
    return Matches(feature, latent, feature[latent] == torch.arange(len(latent), device=latent.device), mcc)


class _Counts:
    """Sums over samples."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.n, self.n_normed = 0, 0
        self.hits, self.fires, self.on = (torch.zeros(d_sae, dtype=torch.long, device=device) for _ in range(3))
        self.true_l0, self.error, self.power, self.shrinkage = (0.0 for _ in range(4))
        self.total: Tensor | None = None

    def add(self, x: Tensor, x_hat: Tensor, fires: Tensor, on: Tensor, on_matched: Tensor) -> None:
        self.n += len(x)
        self.hits += (fires & on_matched).sum(dim=0)
        self.fires += fires.sum(dim=0)
        self.on += on_matched.sum(dim=0)
        self.true_l0 += float(on.sum())
        self.error += float((x - x_hat).double().square().sum())
        self.power += float(x.double().square().sum())
        self.total = x.double().sum(dim=0) + (0.0 if self.total is None else self.total)
        norms = x.norm(dim=1)
        normed = norms > 1e-6
        self.n_normed += int(normed.sum())
        self.shrinkage += float((x_hat.norm(dim=1)[normed] / norms[normed]).double().sum())


def _metrics(counts: _Counts, matches: Matches) -> dict[str, Metric]:
    assert counts.total is not None, "no samples"
    d_sae, n_features = len(matches.feature), len(matches.latent)
    precision = counts.hits / counts.fires.clamp(min=1)
    recall = counts.hits / counts.on.clamp(min=1)
    f1 = 2 * counts.hits / (counts.fires + counts.on).clamp(min=1)
    alive = counts.fires > 0
    tracked = matches.feature[alive].unique().numel()
    variance = counts.power - float(counts.total.square().sum()) / counts.n

    def of_latents(value: float, definition: str) -> Metric:
        return Metric(value=value, n=d_sae, of=f"latents, over {counts.n:,} samples", definition=definition)

    def of_samples(value: float, definition: str) -> Metric:
        return Metric(value=value, n=counts.n, of="samples", definition=definition)

    mean = "mean over latents, 0 for dead ones; a latent detects its nearest feature"
    return {
        "truth.f1": of_latents(float(f1.mean()), f"harmonic mean of a latent's precision and recall, {mean}"),
        "truth.precision": of_latents(float(precision.mean()), f"share of a latent's firings that are right, {mean}"),
        "truth.recall": of_latents(float(recall.mean()), f"share of the feature's firings that are seen, {mean}"),
        "truth.mcc": Metric(
            value=matches.mcc,
            n=min(d_sae, n_features),
            of="pairs",
            definition="mean |cosine| of decoder rows and true directions paired one to one (Hungarian)",
        ),
        "truth.uniqueness": of_latents(
            matches.feature.unique().numel() / d_sae, "different nearest features, over the number of latents"
        ),
        "truth.latents_per_feature": of_latents(
            int(alive.sum()) / max(tracked, 1), "living latents over their different nearest features; 1: no splitting"
        ),
        "truth.dead": of_latents(1 - float(alive.float().mean()), "share of latents that never fired"),
        "truth.l0": of_samples(float(counts.fires.sum()) / counts.n, "mean number of latents that are not 0"),
        "truth.true_l0": of_samples(counts.true_l0 / counts.n, "mean number of features that are not 0"),
        "truth.ev": of_samples(1 - counts.error / variance, "1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2"),
        "truth.shrinkage": of_samples(
            counts.shrinkage / max(counts.n_normed, 1), "mean of |x_hat| / |x|; below 1 it shrinks"
        ),
    }


class _Tree:
    """Sums over samples for parents and their children."""

    def __init__(self, matches: Matches, parent: Tensor) -> None:
        self.matches, self.parent = matches, parent
        self.child = (parent >= 0).nonzero().squeeze(1)
        self.above = parent[self.child]
        # Rows in which a parent fires: with a child, of those seen, of those unseen while a child is; alone, seen.
        self.with_child, self.seen, self.absorbed, self.alone, self.seen_alone = (
            torch.zeros(len(parent), dtype=torch.long, device=parent.device) for _ in range(5)
        )

    def add(self, fires: Tensor, on: Tensor) -> None:
        seen = fires[:, self.matches.latent] & self.matches.found & on
        child_on = self._any_child(on)
        self.with_child += (on & child_on).sum(dim=0)
        self.seen += (seen & child_on).sum(dim=0)
        self.absorbed += (on & ~seen & self._any_child(seen)).sum(dim=0)
        self.alone += (on & ~child_on).sum(dim=0)
        self.seen_alone += (seen & ~child_on).sum(dim=0)

    def _any_child(self, of: Tensor) -> Tensor:
        counts = torch.zeros(of.shape, dtype=torch.int32, device=of.device)
        return counts.index_add_(1, self.above, of[:, self.child].int()) > 0

    def metrics(self, counts: _Counts) -> dict[str, Metric]:
        parents = self.above.unique()
        found = self.matches.found
        child_found = torch.zeros_like(found)
        child_found[self.above[found[self.child]]] = True
        known = parents[found[parents] | child_found[parents]]
        own = parents[found[parents]]

        def mean_share(part: Tensor, whole: Tensor, definition: str) -> Metric:
            there = own[whole[own] > 0]
            share = part[there] / whole[there]
            return Metric(
                value=float(share.mean()) if len(there) else float("nan"),
                n=len(there),
                of=f"parents with a latent of their own, over {counts.n:,} samples",
                definition=f"{definition}; mean over parents",
            )

        return {
            "truth.absorption": mean_share(
                self.absorbed,
                self.with_child,
                "share of rows with the parent and a child of it in which the parent's latent is silent and that of a "
                "firing child is not",
            ),
            "truth.recall_with_child": mean_share(
                self.seen, self.with_child, "share of rows with the parent and a child of it that its latent sees"
            ),
            "truth.recall_alone": mean_share(
                self.seen_alone, self.alone, "share of rows with the parent and no child of it that its latent sees"
            ),
            "truth.split": Metric(
                value=float((~found[known]).float().mean()) if len(known) else float("nan"),
                n=len(known),
                of="parents of which a latent tracks the parent or a child",
                definition="share without a latent of their own: only children are tracked. A latent is a feature's "
                "own when each is the other's nearest",
            ),
        }
