"""What the language model loses when its activations are replaced by the dictionary's reconstruction.

Position 0 and sinks keep their activations in every variant, so the numbers are about ordinary tokens. Delta CE in nats
leads; the CE score is against mean ablation, since zero ablation breaks the model so badly that every dictionary scores
near 1 (it is given too, for comparison with what others print).
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from tqdm import tqdm

from activations.model import Model
from activations.shards import CachedActivations, held_out
from activations.splice import Where, replace
from sae.base import SAE
from sae.evals.metric import Metric

Change = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]]


@torch.inference_mode()
def splice_loss(
    sae: SAE, model: Model, cache: CachedActivations, *, n_contexts: int = 64, batch: int = 8, seed: int = 0
) -> dict[str, Metric]:
    """CE of the clean, spliced, mean-ablated and zero-ablated model, and KL(clean | spliced), per predicted token.

    n_contexts: how many contexts, drawn with `seed`, those that begin in a held-out document first.
    """
    contexts = _contexts(cache, n_contexts, seed).to(model.device)
    mean = cache.mean.to(model.device)
    variants: dict[str, Change] = {
        "spliced": lambda x: sae.reconstruct(x),
        "mean": lambda x: mean.expand_as(x),
        "zero": torch.zeros_like,
    }
    losses: dict[str, list[Tensor]] = {name: [] for name in ("clean", *variants, "kl")}
    for ids in tqdm(contexts.split(batch), desc="splice", unit="batch", disable=None):
        clean = model(ids)[:, 1:-1].float()
        target = ids[:, 2:]
        losses["clean"].append(_ce(clean, target))
        for name, change in variants.items():
            with replace(model, cache.hook, _on_ordinary(change, cache.sink_threshold)):
                changed = model(ids)[:, 1:-1].float()
            losses[name].append(_ce(changed, target))
            if name == "spliced":
                kl = kl_div(log_softmax(changed, -1), log_softmax(clean, -1), reduction="none", log_target=True)
                losses["kl"].append(kl.sum(-1).mean(dim=1).cpu())
    return _metrics({name: torch.cat(parts).numpy() for name, parts in losses.items()}, contexts[:, 2:].numel(), seed)


def _on_ordinary(change: Change, sink_threshold: float) -> Callable[[Tensor, Where], Tensor]:
    def edit(x: Tensor, where: Where) -> Tensor:
        rows = x.float()
        keep = (where.positions <= 0) | (rows.norm(dim=-1) > sink_threshold)
        return torch.where(keep[..., None], rows, change(rows.flatten(0, 1)).view_as(rows))

    return edit


def _ce(logits: Float[Tensor, "batch time vocab"], target: Int[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Mean cross-entropy of each context, in nats."""
    each = cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return each.view_as(target).mean(dim=1).cpu()


def _contexts(cache: CachedActivations, n: int, seed: int) -> Int[Tensor, "n context"]:
    """Whole contexts from the cache, held-out ones first."""
    ids, outside = [], []
    for i in range(cache.n_shards):
        tokens = cache.tokens(i)
        context = int(tokens.positions.max()) + 1
        ids.append(tokens.ids.view(-1, context))
        outside.append(held_out(tokens.docs).view(-1, context)[:, 0])
    everything, held = torch.cat(ids).long(), torch.cat(outside)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(everything)))
    order = torch.cat([order[held[order]], order[~held[order]]])
    return everything[order[:n]]


def _metrics(losses: dict[str, np.ndarray], n_tokens: int, seed: int) -> dict[str, Metric]:
    def metric(definition: str, value: Callable[[dict[str, np.ndarray]], float]) -> Metric:
        """The value with a bootstrap interval over contexts."""
        rng = np.random.default_rng(seed)
        n = len(losses["clean"])
        drawn = [rng.integers(n, size=n) for _ in range(1000)]
        again = [value({name: each[pick] for name, each in losses.items()}) for pick in drawn]
        lo, hi = np.quantile(again, [0.025, 0.975])
        text = f"predicted tokens in {n} contexts"
        return Metric(value=value(losses), n=n_tokens, of=text, definition=definition, lo=float(lo), hi=float(hi))

    def mean(name: str) -> Callable[[dict[str, np.ndarray]], float]:
        return lambda each: float(each[name].mean())

    def score(against: str) -> Callable[[dict[str, np.ndarray]], float]:
        def value(each: dict[str, np.ndarray]) -> float:
            clean, spliced, ablated = (float(each[name].mean()) for name in ("clean", "spliced", against))
            return (ablated - spliced) / (ablated - clean)

        return value

    return {
        "delta_ce": metric(
            "CE with the reconstruction spliced in - CE of the clean model, nats",
            lambda each: float((each["spliced"] - each["clean"]).mean()),
        ),
        "kl": metric("KL(clean | spliced) of next-token distributions, nats", mean("kl")),
        "ce_clean": metric("cross-entropy of the clean model, nats", mean("clean")),
        "ce_spliced": metric("cross-entropy with the reconstruction spliced in, nats", mean("spliced")),
        "ce_mean_ablated": metric("cross-entropy with every ordinary row set to the mean, nats", mean("mean")),
        "ce_zero_ablated": metric("cross-entropy with every ordinary row set to 0, nats", mean("zero")),
        "ce_score": metric("(CE mean-ablated - CE spliced) / (CE mean-ablated - CE clean)", score("mean")),
        "ce_score_zero": metric("the same against zero ablation", score("zero")),
    }
