"""Reconstruction, sparsity and dead latents on cached activations, without the language model."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from activations.cache import Activations, held_out_mask
from sae.base import SAE
from sae.evals.metric import Metric, over_hooks
from sae.rows import parts_given_back


@torch.no_grad()
def reconstruction(sae: SAE, rows: Activations, *, batch: int = 4096) -> dict[str, Metric]:
    """FVU, cosine, L0 over ordinary tokens of held-out documents (of all documents when none is held out).

    rows: as the dictionary was trained on (`sae.rows`): one hook, or several side by side; then of each hook that it
    gives back, and their mean.
    """
    device = sae.W_dec.device
    shards = range(_n_shards(rows))
    part = "held-out" if any(bool(held_out_mask(rows, i).any()) for i in shards) else "all"
    hooks = [(part.hook, part.d_in) for part in parts_given_back(sae, rows)]
    totals = torch.zeros(len(hooks), 5, dtype=torch.float64, device=device)
    means = [torch.zeros(width, dtype=torch.float64, device=device) for _, width in hooks]
    l0s = torch.zeros(2, dtype=torch.float64, device=device)
    n = 0
    for row in _rows(rows, part, batch):
        row = row.to(device, torch.float32)
        x, target = row[:, : sae.d_in], row[:, sae.d_in :] if sae.target == "hook" else row
        values, indices = sae.encode_sparse(x)
        x_hat = torch.nn.functional.embedding_bag(indices, sae.W_dec, per_sample_weights=values, mode="sum")
        x_hat = x_hat + sae.offset(x)
        l0 = (values != 0).sum(dim=1).double()
        l0s += torch.stack([l0.sum(), l0.square().sum()])
        at = 0
        for j, (_, width) in enumerate(hooks):
            y, y_hat = target[:, at : at + width], x_hat[:, at : at + width]
            cosine = torch.nn.functional.cosine_similarity(y, y_hat, dim=1)
            error, power, hat = (y - y_hat).square(), y.square(), y_hat.square()
            each = (error.sum(dim=1), power.sum(dim=1), cosine, hat.sum(dim=1), (y * y_hat).sum(dim=1))
            totals[j] += torch.stack([part_.double().sum() for part_ in each])
            means[j] += y.double().sum(dim=0)
            at += width
        n += len(x)
    tokens = f"ordinary tokens of {part} documents"

    def at_hook(j: int) -> dict[str, Metric]:
        error, power, cosine, hat_power, dots = totals[j].tolist()
        variance = power - float(means[j].square().sum()) / n
        shrinkage = "sum |x_hat|^2 / sum x . x_hat; 1 is unbiased, below 1 shrinks"
        return {
            "fvu": Metric(value=error / variance, n=n, of=tokens, definition="sum |x - x_hat|^2 / sum |x - mean(x)|^2"),
            "cosine": Metric(value=cosine / n, n=n, of=tokens, definition="mean cosine of x and x_hat"),
            "shrinkage": Metric(value=hat_power / dots, n=n, of=tokens, definition=shrinkage),
        }

    made = over_hooks({hook: at_hook(j) for j, (hook, _) in enumerate(hooks)})
    mean_l0, mean_square = (l0s / n).tolist()
    spread = max(mean_square - mean_l0**2, 0.0) ** 0.5
    made["l0"] = Metric(
        value=mean_l0,
        n=n,
        of=tokens,
        definition="mean number of latents that are not 0",
        lo=mean_l0 - 1.96 * spread / n**0.5,
        hi=mean_l0 + 1.96 * spread / n**0.5,
    )
    return made


def dead_share(sae: SAE) -> Metric:
    """Latents that never fired where the dictionary's statistics were taken."""
    assert sae.statistics is not None, "a dictionary without statistics"
    dead = float((sae.statistics.density == 0).float().mean())
    return Metric(
        value=dead,
        n=sae.statistics.n_tokens,
        of="ordinary cached tokens, training tokens among them",
        definition="share of latents that were 0 on all of them",
    )


def _n_shards(rows: Activations) -> int:
    n = 0
    while rows.has(n):
        n += 1
    return n


def _rows(cache: Activations, part: str, batch: int) -> Iterator[Float[Tensor, "n columns"]]:
    for i in range(_n_shards(cache)):
        mask = held_out_mask(cache, i) if part == "held-out" else cache.mask(i)
        yield from cache.rows(i)[mask].split(batch)
