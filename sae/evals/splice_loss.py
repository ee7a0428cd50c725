"""What the language model loses when its activations are replaced by the dictionary's reconstruction.

Position 0 and sinks keep their activations in every variant, so the numbers are about ordinary tokens. Delta CE in nats
leads; the CE score is against mean ablation, since zero ablation breaks the model so badly that every dictionary scores
near 1 (it is given too, for comparison with what others print).
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from activations.cache import Activations, CachedActivations, held_out
from activations.model import Model
from activations.splice import Where, read, replace
from sae.base import SAE
from sae.evals.metric import Metric, over_hooks
from sae.rows import parts_given_back, parts_read

_PADDING = -1


@torch.inference_mode()
def splice_loss(
    sae: SAE, model: Model, rows: Activations, *, n_contexts: int = 64, batch: int = 8, seed: int = 0
) -> dict[str, Metric]:
    """CE of the clean, spliced, mean-ablated and zero-ablated model, and KL(clean | spliced), per predicted token.

    rows: as the dictionary was trained on (`sae.rows`). Of a dictionary that gives back several hooks, each is spliced
    by itself, and the mean is given too; what it reads is always the clean model's.
    n_contexts: how many contexts, drawn with `seed`, those that begin in a held-out document first.
    """
    reads, gives = ([_cached(part) for part in parts(sae, rows)] for parts in (parts_read, parts_given_back))
    contexts = _contexts(reads[0], n_contexts, seed)
    losses: dict[str, dict[str, list[Tensor]]] = {
        part.hook: {name: [] for name in ("clean", *_VARIANTS, "kl")} for part in gives
    }
    for first in tqdm(range(0, len(contexts), batch), desc="splice", unit="batch", disable=None):
        ids = pad_sequence(contexts[first : first + batch], batch_first=True, padding_value=_PADDING).to(model.device)
        target = ids[:, 2:]
        # Padding stands on the right, where a causal model does not see it from the tokens that count.
        ids = ids.clamp(min=0)
        with read(model, [part.hook for part in reads]) as got:
            clean = model(ids)[:, 1:-1].float()
        read_here = [got[part.hook].float() for part in reads]
        x_hat = sae.reconstruct(torch.cat(read_here, dim=-1).flatten(0, 1)).unflatten(0, ids.shape)
        sinks = [x.norm(dim=-1) > part.sink_threshold for x, part in zip(read_here, reads, strict=True)]
        keep = torch.stack(sinks).any(dim=0)
        for part, own in zip(gives, x_hat.split([part.d_in for part in gives], dim=-1), strict=True):
            at_hook = losses[part.hook]
            at_hook["clean"].append(_ce(clean, target))
            for name, rows_of in _VARIANTS.items():
                edit = _on_ordinary(rows_of(own, part), part.sink_threshold, keep)
                with replace(model, part.hook, edit):
                    changed = model(ids)[:, 1:-1].float()
                at_hook[name].append(_ce(changed, target))
                if name == "spliced":
                    kl = kl_div(log_softmax(changed, -1), log_softmax(clean, -1), reduction="none", log_target=True)
                    at_hook["kl"].append(_mean_of_real(kl.sum(-1), target))
    n_predicted = sum(len(ids) - 2 for ids in contexts)

    def metrics(at_hook: dict[str, list[Tensor]]) -> dict[str, Metric]:
        return _metrics({name: torch.cat(parts).numpy() for name, parts in at_hook.items()}, n_predicted, seed)

    return over_hooks({hook: metrics(at_hook) for hook, at_hook in losses.items()})


def _on_ordinary(
    new: Float[Tensor, "batch time d"], sink_threshold: float, keep: Bool[Tensor, "batch time"]
) -> Callable[[Tensor, Where], Tensor]:
    """The edit that puts `new` in the place of ordinary rows. keep: rows that are no ordinary ones elsewhere."""

    def edit(x: Tensor, where: Where) -> Tensor:
        rows = x.float()
        stay = keep | (where.positions <= 0) | (rows.norm(dim=-1) > sink_threshold)
        return torch.where(stay[..., None], rows, new)

    return edit


_VARIANTS: dict[str, Callable[[Tensor, CachedActivations], Tensor]] = {
    "spliced": lambda x_hat, _: x_hat,
    "mean": lambda x_hat, part: part.mean.to(x_hat.device).expand_as(x_hat),
    "zero": lambda x_hat, _: torch.zeros_like(x_hat),
}
"""What takes the place of rows (batch, time, d), from the reconstruction and the cache."""


def _cached(part: Activations) -> CachedActivations:
    assert isinstance(part, CachedActivations), f"{part.hook} is not cached"
    return part


def _ce(logits: Float[Tensor, "batch time vocab"], target: Int[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Mean cross-entropy of each context, in nats."""
    each = cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none", ignore_index=_PADDING)
    return _mean_of_real(each.view_as(target), target)


def _mean_of_real(each: Float[Tensor, "batch time"], target: Int[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Mean over the tokens of each context that are no padding."""
    real = (target != _PADDING).float()
    return ((each * real).sum(dim=1) / real.sum(dim=1)).cpu()


def _contexts(cache: CachedActivations, n: int, seed: int) -> list[Int[Tensor, " context"]]:
    """Whole sequences of at least three tokens from the cache, those of held-out documents first."""
    everything: list[Tensor] = []
    outside: list[Tensor] = []
    for i in range(cache.n_shards):
        tokens = cache.tokens(i)
        starts = (tokens.positions == 0).nonzero().flatten()
        each = tokens.ids.long().tensor_split(starts[1:])
        long_enough = [number for number, ids in enumerate(each) if len(ids) > 2]
        everything += [each[number] for number in long_enough]
        outside.append(held_out(tokens.docs[starts[long_enough]]))
    held = torch.cat(outside).numpy()
    order = np.random.default_rng(seed).permutation(len(everything))
    order = np.concatenate([order[held[order]], order[~held[order]]])
    return [everything[number] for number in order[:n]]


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
            return (ablated - spliced) / (ablated - clean) if ablated != clean else 0.0  # there is nothing to win

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
