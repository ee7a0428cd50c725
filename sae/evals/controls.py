"""Dictionaries that have learnt nothing, to be measured beside one that has: what any number is worth without training.

random: untrained, unit decoder rows, the encoder their transpose, as many latents and as many active as the measured
one. pca: the leading principal components, as many as the measured one has active latents. identity and mean: the two
ends. All are ordinary dictionaries, so that every metric takes them.
Source: Karvonen et al. 2025, arXiv:2503.09532 (PCA and identity); 2602.14111 for how near random ones come.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from activations.cache import Activations, training_mask
from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import SAE

PCA_ROWS = 200_000


def controls(sae: SAE, cache: Activations, *, k: int, seed: int = 0) -> dict[str, SAE]:
    """random, pca, identity and mean, on the device of `sae`.

    k: active latents a token, of random and pca.
    """
    mean, components = principal(cache, device=sae.W_dec.device)
    made = {
        "random": random_dictionary(sae, mean, k=k, seed=seed),
        "pca": projection(mean, components[: min(k, sae.d_in)]),
        "identity": projection(mean, torch.eye(sae.d_in)),
        "mean": projection(mean, torch.zeros(1, sae.d_in)),
    }
    return {name: each.to(sae.W_dec.device) for name, each in made.items()}


def random_dictionary(sae: SAE, mean: Float[Tensor, " d_in"], *, k: int, seed: int = 0) -> SAE:
    """An untrained TopK dictionary (AbsTopK for one with signs) of the size of `sae`, around `mean`."""
    sizes = {"d_in": sae.d_in, "d_sae": sae.d_sae, "k": min(max(k, 1), sae.d_sae)}
    made: SAE = AbsTopKSAE(AbsTopKConfig(**sizes)) if sae.signed else TopKSAE(TopKConfig(**sizes))
    made.initialise(mean.cpu()[None], seed)
    return made.to(sae.W_dec.device).requires_grad_(False)


def projection(mean: Float[Tensor, " d_in"], rows: Float[Tensor, "k d_in"]) -> SAE:
    """x_hat = mean + the projection of x - mean on orthonormal rows; a latent a row, all of them active."""
    made = AbsTopKSAE(AbsTopKConfig(d_in=rows.shape[1], d_sae=len(rows), k=len(rows)))
    with torch.no_grad():
        made.W_dec.copy_(rows)
        made.W_enc.copy_(rows.T)
        made.b_dec.copy_(mean)
    return made.requires_grad_(False)


def principal(
    cache: Activations, *, device: torch.device, n_rows: int = PCA_ROWS
) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]]:
    """(mean, all principal components, the leading first) of the first ordinary rows that are trained on."""
    d = cache.d_in
    total = torch.zeros(d, dtype=torch.float64, device=device)
    products = torch.zeros(d, d, dtype=torch.float64, device=device)
    seen = i = 0
    origin: Tensor | None = None  # the first rows' mean: sums of squares about it lose no digits
    while seen < n_rows and cache.has(i):
        for rows in cache.rows(i)[training_mask(cache, i)][: n_rows - seen].split(1 << 14):
            x = rows.to(device, torch.float32)
            origin = x.mean(dim=0) if origin is None else origin
            x = x - origin
            total += x.sum(dim=0, dtype=torch.float64)
            products += (x.T @ x).double()
            seen += len(x)
        i += 1
    assert origin is not None, "no row to fit on"
    mean = total / seen
    values, vectors = torch.linalg.eigh(products / seen - torch.outer(mean, mean))
    return origin + mean.float(), vectors[:, values.argsort(descending=True)].T.float()
