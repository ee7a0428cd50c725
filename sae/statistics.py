"""What dictionaries' latents do on the cached tokens: density, largest and smallest value."""

from collections.abc import Sequence

import torch

from activations.cache import Activations
from sae.base import SAE, Statistics


@torch.no_grad()
def latent_statistics(
    saes: Sequence[SAE], cache: Activations, *, n_tokens: int = 1_000_000, batch: int = 4096
) -> list[Statistics]:
    """Density, max and min of each dictionary's latents over the first `n_tokens` ordinary tokens of the cache.

    Rows may go on behind what the dictionaries read (`sae.rows`). The cache is read once for all.
    On a mesh all processes call this together, and the leader's are whole.
    """
    device = saes[0].W_dec.device
    counts = [torch.zeros(sae.n_held, device=device) for sae in saes]
    highs, lows = [[torch.zeros_like(count) for count in counts] for _ in range(2)]
    seen = i = 0
    while seen < n_tokens and cache.has(i):
        for rows in cache.rows(i)[cache.mask(i)][: n_tokens - seen].split(batch):
            x = rows.to(device, torch.float32)
            for sae, count, high, low in zip(saes, counts, highs, lows, strict=True):
                values, indices = sae.encode_sparse(x[:, : sae.d_in])
                flat, where = values.flatten(), indices.flatten()
                count.index_add_(0, where, (flat != 0).to(count.dtype))
                high.scatter_reduce_(0, where, flat, "amax")
                low.scatter_reduce_(0, where, flat, "amin")
            seen += len(rows)
        i += 1
    return [
        Statistics(
            density=sae.mesh.whole(count / max(seen, 1)),
            max=sae.mesh.whole(high),
            min=sae.mesh.whole(low),
            n_tokens=seen,
            median_norm=cache.median_norm,
            sink_threshold=cache.sink_threshold,
        )
        for sae, count, high, low in zip(saes, counts, highs, lows, strict=True)
    ]
