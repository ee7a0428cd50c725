"""What a dictionary's latents do on the cached tokens: density, largest and smallest value."""

import torch

from activations.cache import Activations
from sae.base import SAE, Statistics


@torch.no_grad()
def latent_statistics(sae: SAE, cache: Activations, *, n_tokens: int = 1_000_000, batch: int = 4096) -> Statistics:
    """Density, max and min of each latent over the first `n_tokens` ordinary tokens of the cache.

    On a mesh all processes call this together, and the leader's are whole.
    """
    device = sae.W_dec.device
    count = torch.zeros(sae.n_held, device=device)
    high, low = torch.zeros_like(count), torch.zeros_like(count)
    seen = 0
    i = 0
    while seen < n_tokens and cache.has(i):
        for rows in cache.rows(i)[cache.mask(i)][: n_tokens - seen].split(batch):
            values, indices = sae.encode_sparse(rows.to(device, torch.float32))
            flat, where = values.flatten(), indices.flatten()
            count.index_add_(0, where, (flat != 0).to(count.dtype))
            high.scatter_reduce_(0, where, flat, "amax")
            low.scatter_reduce_(0, where, flat, "amin")
            seen += len(rows)
        i += 1
    return Statistics(
        density=sae.mesh.whole(count / max(seen, 1)),
        max=sae.mesh.whole(high),
        min=sae.mesh.whole(low),
        n_tokens=seen,
        median_norm=cache.median_norm,
        sink_threshold=cache.sink_threshold,
    )
