"""What the language model loses when its activations are replaced by the dictionary's reconstruction.

Position 0 and sinks keep their activations in every variant, so the numbers are about ordinary tokens. Delta CE in nats
leads; the CE score is against mean ablation, since zero ablation breaks the model so badly that every dictionary scores
near 1 (it is given too, for comparison with what others print).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, nll_loss
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from activations.cache import Activations, CachedActivations, held_out
from activations.model import Model
from activations.splice import Where, read, replace
from sae.base import SAE
from sae.evals.metric import Metric, bootstrap, over_hooks
from sae.rows import parts_given_back, parts_read

_PADDING = -1

Change = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_out"]]
"""From the rows that are read, side by side, to those that take the place of what is given back."""


class Losses(NamedTuple):
    """What `splice_losses` found, an entry a context: cross-entropies in nats a token, KL(clean | variant)."""

    clean: np.ndarray
    ce: dict[str, np.ndarray]
    kl: dict[str, np.ndarray]
    n_tokens: int


def splice_loss(
    sae: SAE, model: Model, rows: Activations, *, n_contexts: int = 64, batch: int = 8, seed: int = 0
) -> dict[str, Metric]:
    """CE of the clean, spliced, mean-ablated and zero-ablated model, and KL(clean | spliced), per predicted token.

    rows: as the dictionary was trained on (`sae.rows`). Of a dictionary that gives back several hooks, each is spliced
    by itself, and the mean is given too.
    n_contexts: how many contexts, drawn with `seed`, those that begin in a held-out document first.
    """
    reads, gives = parts_read(sae, rows), parts_given_back(sae, rows)
    mean = torch.cat([part.mean for part in gives]).to(model.device)
    changes: dict[str, Change] = {
        "spliced": sae.reconstruct,
        "mean": lambda x: mean.expand(len(x), -1),
        "zero": lambda x: x.new_zeros(len(x), len(mean)),
    }
    losses = splice_losses(changes, model, reads, gives, n_contexts=n_contexts, batch=batch, seed=seed)
    return over_hooks({hook: _metrics(each, seed) for hook, each in losses.items()})


@torch.inference_mode()
def splice_losses(
    changes: Mapping[str, Change],
    model: Model,
    reads: Sequence[CachedActivations],
    gives: Sequence[CachedActivations],
    *,
    n_contexts: int = 64,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, Losses]:
    """The model's losses with the ordinary rows of one hook changed, in each of several ways, on the same contexts; by
    hook.

    reads: the hooks that changes are made from, as the clean model has them. gives: those that they are of.
    n_contexts, seed: of `splice_loss`.
    """
    contexts = contexts_of(reads[0], n_contexts, seed)
    clean_ce: list[Tensor] = []
    ce: dict[str, dict[str, list[Tensor]]] = {part.hook: {name: [] for name in changes} for part in gives}
    kl: dict[str, dict[str, list[Tensor]]] = {part.hook: {name: [] for name in changes} for part in gives}
    for first in tqdm(range(0, len(contexts), batch), desc="splice", unit="batch", disable=None):
        ids = pad_sequence(contexts[first : first + batch], batch_first=True, padding_value=_PADDING).to(model.device)
        target = ids[:, 2:]
        # Padding stands on the right, where a causal model does not see it from the tokens that count.
        ids = ids.clamp(min=0)
        with read(model, [part.hook for part in reads]) as got:
            clean = log_softmax(model(ids)[:, 1:-1].float(), -1)
        clean_ce.append(_ce(clean, target))
        rows = [got[part.hook].float() for part in reads]
        sinks = [x.norm(dim=-1) > part.sink_threshold for x, part in zip(rows, reads, strict=True)]
        keep, x = torch.stack(sinks).any(dim=0), torch.cat(rows, dim=-1).flatten(0, 1)
        for name, change in changes.items():
            new = change(x).unflatten(0, ids.shape)
            for part, own in zip(gives, new.split([part.d_in for part in gives], dim=-1), strict=True):
                with replace(model, part.hook, _on_ordinary(own, part.sink_threshold, keep)):
                    changed = log_softmax(model(ids)[:, 1:-1].float(), -1)
                ce[part.hook][name].append(_ce(changed, target))
                divergence = kl_div(changed, clean, reduction="none", log_target=True).sum(-1)
                kl[part.hook][name].append(_mean_of_real(divergence, target))
    return {
        part.hook: Losses(
            clean=torch.cat(clean_ce).numpy(),
            ce={name: torch.cat(parts).numpy() for name, parts in ce[part.hook].items()},
            kl={name: torch.cat(parts).numpy() for name, parts in kl[part.hook].items()},
            n_tokens=sum(len(ids) - 2 for ids in contexts),
        )
        for part in gives
    }


def delta_ce(losses: Losses, name: str, seed: int) -> Metric:
    """CE with that change spliced in - CE of the clean model, with a bootstrap interval over contexts."""
    return _metric(
        losses,
        "CE with the reconstruction spliced in - CE of the clean model, nats",
        lambda drawn: float((losses.ce[name] - losses.clean)[drawn].mean()),
        seed,
    )


def _on_ordinary(
    new: Float[Tensor, "batch time d"], sink_threshold: float, keep: Bool[Tensor, "batch time"]
) -> Callable[[Tensor, Where], Tensor]:
    """The edit that puts `new` in the place of ordinary rows. keep: rows that are no ordinary ones elsewhere."""

    def edit(x: Tensor, where: Where) -> Tensor:
        rows = x.float()
        stay = keep | (where.positions <= 0) | (rows.norm(dim=-1) > sink_threshold)
        return torch.where(stay[..., None], rows, new)

    return edit


def _ce(log_p: Float[Tensor, "batch time vocab"], target: Int[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Mean cross-entropy of each context, in nats."""
    each = nll_loss(log_p.flatten(0, 1), target.flatten(), reduction="none", ignore_index=_PADDING)
    return _mean_of_real(each.view_as(target), target)


def _mean_of_real(each: Float[Tensor, "batch time"], target: Int[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Mean over the tokens of each context that are no padding."""
    real = (target != _PADDING).float()
    return ((each * real).sum(dim=1) / real.sum(dim=1)).cpu()


def contexts_of(cache: CachedActivations, n: int, seed: int) -> list[Int[Tensor, " context"]]:
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


def _metric(losses: Losses, definition: str, value: Callable[[np.ndarray], float], seed: int) -> Metric:
    """A value of the contexts drawn, with a bootstrap interval over contexts."""
    n = len(losses.clean)
    lo, hi = bootstrap(n, value, seed)
    return Metric(
        value=value(np.arange(n)),
        n=losses.n_tokens,
        of=f"predicted tokens in {n} contexts",
        definition=definition,
        lo=lo,
        hi=hi,
        seed=seed,
    )


def _share(won: float, to_win: float) -> float:
    return won / to_win if to_win else 0.0  # there is nothing to win


def _metrics(losses: Losses, seed: int) -> dict[str, Metric]:
    def mean(definition: str, each: np.ndarray) -> Metric:
        return _metric(losses, definition, lambda drawn: float(each[drawn].mean()), seed)

    def score(definition: str, against: str) -> Metric:
        def value(drawn: np.ndarray) -> float:
            clean, spliced, ablated = (
                float(each[drawn].mean()) for each in (losses.clean, losses.ce["spliced"], losses.ce[against])
            )
            return _share(ablated - spliced, ablated - clean)

        return _metric(losses, definition, value, seed)

    kl = losses.kl
    return {
        "delta_ce": delta_ce(losses, "spliced", seed),
        "kl": mean("KL(clean | spliced) of next-token distributions, nats", kl["spliced"]),
        "ce_clean": mean("cross-entropy of the clean model, nats", losses.clean),
        "ce_spliced": mean("cross-entropy with the reconstruction spliced in, nats", losses.ce["spliced"]),
        "ce_mean_ablated": mean("cross-entropy with every ordinary row set to the mean, nats", losses.ce["mean"]),
        "ce_zero_ablated": mean("cross-entropy with every ordinary row set to 0, nats", losses.ce["zero"]),
        "ce_score": score("(CE mean-ablated - CE spliced) / (CE mean-ablated - CE clean)", "mean"),
        "ce_score_zero": score("the same against zero ablation", "zero"),
        "kl_score": _metric(
            losses,
            "(KL mean-ablated - KL spliced) / KL mean-ablated",
            lambda drawn: _share(*(float(each[drawn].mean()) for each in (kl["mean"] - kl["spliced"], kl["mean"]))),
            seed,
        ),
    }
