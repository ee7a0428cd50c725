"""Cheap stand-ins for whether latents can be explained, without a language model that reads: proxies, no more.

Random dictionaries come near trained ones on such figures (2602.14111), so that they stand beside. Means are over
latents that fire on at least 10 of the tokens read.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.cache import CachedActivations
from activations.model import Model
from sae.base import SAE
from sae.evals.controls import random_dictionary
from sae.evals.metric import Metric, mean_of
from sae.evals.subject import Subject
from sae.sparse import nonzero

MOST_ROWS = 100_000
FEWEST = 10


def explainability(subject: Subject) -> dict[str, Metric]:
    """token_share, repeats and, with a model, logit_kurtosis, of the dictionary and of a random one."""
    seed = subject.options.seed
    control = random_dictionary(subject.sae, subject.cache.mean, k=subject.l0, seed=seed)
    return {
        f"{prefix}explainability.{name}": metric
        for prefix, sae in (("", subject.sae), ("control.random.", control))
        for name, metric in proxies(sae, subject.cache, subject.model, seed=seed).items()
    }


@torch.no_grad()
def proxies(
    sae: SAE, cache: CachedActivations, model: Model | None, *, n_rows: int = MOST_ROWS, seed: int = 0
) -> dict[str, Metric]:
    """Of the first n_rows ordinary tokens; nothing where no latent fires often enough."""
    latents, tokens, sequences, sizes = firings(sae, cache, n_rows)
    count = torch.bincount(latents, minlength=sae.d_sae)
    often = count >= FEWEST
    if not bool(often.any()):
        return {}
    mass = torch.zeros(sae.d_sae, dtype=torch.float64).index_add_(0, latents, sizes)
    pairs, place = (latents * (int(tokens.max()) + 1) + tokens).unique(return_inverse=True)
    each = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, place, sizes)
    owner = pairs // (int(tokens.max()) + 1)
    most = torch.zeros(sae.d_sae, dtype=torch.float64).scatter_reduce_(0, owner, each, "amax")
    met = (latents * (int(sequences.max()) + 1) + sequences).unique() // (int(sequences.max()) + 1)
    n_sequences = torch.bincount(met, minlength=sae.d_sae)
    of = f"latents that fire on {FEWEST} or more of the first {n_rows:,} ordinary tokens"

    def mean(values: Tensor, definition: str) -> Metric:
        return mean_of(values[often].double().numpy(), of=of, definition=definition, seed=seed)

    found = {
        "token_share": mean(
            most / mass.clamp(min=1e-30), "share of a latent's summed size on the token that has most of it, mean"
        ),
        "repeats": mean(
            count / n_sequences.clamp(min=1), "firings of a latent in a sequence where it fires at all, mean"
        ),
    }
    if model is not None and model.d_model == sae.d_in:
        found["logit_kurtosis"] = mean(
            kurtosis(sae, model.unembed()), "excess kurtosis of a latent's logits W_dec W_U over the vocabulary, mean"
        )
    return found


def firings(
    sae: SAE, cache: CachedActivations, n_rows: int, batch: int = 4096
) -> tuple[Int[Tensor, " f"], Int[Tensor, " f"], Int[Tensor, " f"], Float[Tensor, " f"]]:
    """(latent, token id, number of the sequence, size) of each firing on the first ordinary tokens; on the CPU."""
    parts: list[tuple[Tensor, ...]] = []
    seen = n_sequences = 0
    for i in range(cache.n_shards):
        tokens, mask = cache.tokens(i), cache.mask(i)
        sequence = n_sequences + (tokens.positions == 0).long().cumsum(0)
        n_sequences = int(sequence[-1])
        columns = [x[mask][: n_rows - seen].split(batch) for x in (cache.rows(i), tokens.ids.long(), sequence)]
        for rows, ids, numbers in zip(*columns, strict=True):
            values, indices = (part.cpu() for part in sae.encode_sparse(rows.to(sae.W_dec.device, torch.float32)))
            at = nonzero(values != 0)
            row = at // values.shape[1]
            parts.append((indices.flatten()[at], ids[row], numbers[row], values.flatten()[at].abs().double()))
            seen += len(rows)
        if seen >= n_rows:
            break
    latents, ids, numbers, sizes = (torch.cat(column) for column in zip(*parts, strict=True))
    return latents, ids, numbers, sizes


def kurtosis(sae: SAE, unembed: Float[Tensor, "d_in vocab"], chunk: int = 512) -> Float[Tensor, " d_sae"]:
    """Excess kurtosis of each latent's logits: 0 for a Gaussian, large where a few tokens stand out."""
    parts = []
    for rows in sae.W_dec.float().split(chunk):
        logits = rows @ unembed.to(rows.device)
        logits = logits - logits.mean(dim=1, keepdim=True)
        variance = logits.square().mean(dim=1)
        parts.append(logits.pow(4).mean(dim=1) / variance.square().clamp(min=1e-30) - 3)
    return torch.cat(parts).cpu()
