"""How often latents fire, from the statistics that are saved with a dictionary."""

import torch

from sae.base import SAE
from sae.evals.metric import Metric

DENSE, ULTRA_LOW = 0.1, 1e-5


def density(sae: SAE) -> dict[str, Metric]:
    """Dead, dense and ultra-low latents, and quantiles over the living of the share of tokens on which they fire."""
    assert sae.statistics is not None, "a dictionary without statistics"
    each, n_tokens = sae.statistics.density.float().cpu(), sae.statistics.n_tokens
    tokens = "ordinary cached tokens, training tokens among them"

    def share(of_latents: torch.Tensor, definition: str) -> Metric:
        return Metric(value=float(of_latents.float().mean()), n=n_tokens, of=tokens, definition=definition)

    found = {
        "dead": share(each == 0, "share of latents that were 0 on all of them"),
        "density.dense": share(each > DENSE, f"share of latents that fire on more than {DENSE:.0%} of them"),
        "density.ultra_low": share(
            (each > 0) & (each < ULTRA_LOW), f"share of latents that fire, on fewer than {ULTRA_LOW:g} of them"
        ),
    }
    alive = each[each > 0]
    for percent in (5, 25, 50, 75, 95) if len(alive) else ():
        found[f"density.q{percent:02}"] = Metric(
            # `torch.quantile` takes no more than 2**24 numbers.
            value=float(alive.kthvalue(round(percent / 100 * (len(alive) - 1)) + 1).values),
            n=len(alive),
            of=f"living latents, on {n_tokens:,} {tokens}",
            definition=f"share of tokens on which a latent fires: {percent} % quantile",
        )
    return found
