"""Reconstruction, sparsity and dead latents on cached activations, without the language model."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from activations.cache import CachedActivations, held_out_mask
from sae.base import SAE
from sae.evals.metric import Metric


@torch.no_grad()
def reconstruction(sae: SAE, cache: CachedActivations, *, batch: int = 4096) -> dict[str, Metric]:
    """FVU, cosine, L0 over ordinary tokens of held-out documents (of all documents when none is held out)."""
    device = sae.W_dec.device
    part = "held-out" if any(bool(held_out_mask(cache, i).any()) for i in range(cache.n_shards)) else "all"
    totals = torch.zeros(7, dtype=torch.float64, device=device)
    mean = torch.zeros(sae.d_in, dtype=torch.float64, device=device)
    n = 0
    for rows in _rows(cache, part, batch):
        x = rows.to(device, torch.float32)
        values, indices = sae.encode_sparse(x)
        x_hat = torch.nn.functional.embedding_bag(indices, sae.W_dec, per_sample_weights=values, mode="sum") + sae.b_dec
        error, l0 = (x - x_hat).square().sum(dim=1), (values != 0).sum(dim=1)
        cosine = torch.nn.functional.cosine_similarity(x, x_hat, dim=1)
        dots = (x * x_hat).sum(dim=1)
        each = (error, x.square().sum(dim=1), cosine, l0, l0.square(), x_hat.square().sum(dim=1), dots)
        totals += torch.stack([part_.double().sum() for part_ in each])
        mean += x.double().sum(dim=0)
        n += len(x)
    error, power, cosine, l0, l0_square, hat_power, dots = totals.tolist()
    variance = power - float(mean.square().sum()) / n
    spread = max(l0_square / n - (l0 / n) ** 2, 0.0) ** 0.5
    tokens = f"ordinary tokens of {part} documents"
    return {
        "fvu": Metric(value=error / variance, n=n, of=tokens, definition="sum |x - x_hat|^2 / sum |x - mean(x)|^2"),
        "cosine": Metric(value=cosine / n, n=n, of=tokens, definition="mean cosine of x and x_hat"),
        "l0": Metric(
            value=l0 / n,
            n=n,
            of=tokens,
            definition="mean number of latents that are not 0",
            lo=l0 / n - 1.96 * spread / n**0.5,
            hi=l0 / n + 1.96 * spread / n**0.5,
        ),
        "shrinkage": Metric(
            value=hat_power / dots,
            n=n,
            of=tokens,
            definition="sum |x_hat|^2 / sum x . x_hat; 1 is unbiased, below 1 shrinks",
        ),
    }


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


def _rows(cache: CachedActivations, part: str, batch: int) -> Iterator[Float[Tensor, "n d_in"]]:
    for i in range(cache.n_shards):
        mask = held_out_mask(cache, i) if part == "held-out" else cache.mask(i)
        yield from cache.rows(i)[mask].split(batch)
