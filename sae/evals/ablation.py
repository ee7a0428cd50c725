"""How concentrated the effect of a latent is: it is taken out at one token, and the logits of the tokens from there on
are compared with the clean ones.

    spread = (|v|_1 / |v|_2)^2 / (tokens x vocabulary),   v = change of logits, less its median at each token

is the share of logits that move: 1 / (tokens x vocabulary) where a single one does, 0.64 for Gaussian noise, 1 where
all move as much. Beside: a change of the same size in a random direction.
Source: Gao et al. 2024, arXiv:2406.04093, section 4.5.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from activations.cache import CachedActivations
from activations.errors import InputError
from activations.model import Model
from activations.splice import Where, read, replace
from sae.base import SAE
from sae.evals.metric import Metric, mean_of
from sae.evals.splice_loss import contexts_of

LATENTS, TOKENS = 4, 16
"""Latents that are taken out of a context, each by itself; tokens on which the effect is looked at."""


@torch.inference_mode()
def ablation(
    sae: SAE, model: Model, cache: CachedActivations, *, n_contexts: int = 32, seed: int = 0
) -> dict[str, Metric]:
    """Mean spread over contexts: at one ordinary token of each, in its middle half, 4 of its active latents.

    Raises InputError for a model in less than float32: its rounding moves all logits, about as much as a latent does.
    """
    if model.dtype != torch.float32:
        raise InputError("The metric ablation needs a model in float32: add --model-dtype float32.")
    rng = np.random.default_rng(seed)
    found: list[tuple[float, float]] = []
    for ids in tqdm(contexts_of(cache, n_contexts, seed), desc="ablation", unit="context", disable=None):
        at = int(rng.integers(max(len(ids) // 4, 1), max(3 * len(ids) // 4, 2)))
        with read(model, [cache.hook], stop=True) as got:
            model.hf(input_ids=ids[None].to(model.device), use_cache=False)
        row = got[cache.hook][0, at].float()
        if float(row.norm()) > cache.sink_threshold:
            continue
        deltas = _deltas(sae, row, rng)
        if not len(deltas):
            continue
        random = torch.as_tensor(rng.normal(size=deltas.shape), device=row.device, dtype=row.dtype)
        random *= (deltas.norm(dim=1) / random.norm(dim=1))[:, None]
        each = spreads(model, cache.hook, ids, at, torch.cat([deltas, random]))
        found.append((float(each[: len(deltas)].mean()), float(each[len(deltas) :].mean())))
    if not found:
        return {}
    what = f"of the logits of {TOKENS} tokens that move, (L1 / L2)^2 over their number; low is concentrated"
    return {
        f"{prefix}ablation.spread": mean_of(values, of="contexts", definition=f"share {what}, {cause}", seed=seed)
        for prefix, values, cause in (
            (
                "",
                np.array([own for own, _ in found]),
                f"when an active latent is taken out, mean of {LATENTS} a context",
            ),
            ("control.random.", np.array([other for _, other in found]), "when a random direction of that size is"),
        )
    }


def _deltas(sae: SAE, row: Float[Tensor, " d"], rng: np.random.Generator) -> Float[Tensor, "m d"]:
    """The change of the row that takes each of a few active latents out."""
    values, indices = sae.encode_sparse(row[None].to(sae.W_dec.device))
    active = np.flatnonzero(values[0].cpu().numpy())
    chosen = torch.as_tensor(rng.permutation(active)[:LATENTS], device=values.device)
    return -(values[0, chosen, None] * sae.W_dec[indices[0, chosen]]).to(row.device)


def spreads(
    model: Model, hook: str, ids: Int[Tensor, " time"], at: int, deltas: Float[Tensor, "m d"]
) -> Float[Tensor, " m"]:
    """The spread of each change of the row at token `at`."""

    def edit(x: Tensor, _where: Where) -> Tensor:
        changed = x.float().clone()
        changed[:, at] += torch.cat([torch.zeros_like(deltas[:1]), deltas])
        return changed

    with replace(model, hook, edit):
        logits = model(ids.expand(len(deltas) + 1, -1))[:, at : at + TOKENS].float()
    return spread(logits[1:] - logits[:1])


def spread(change: Float[Tensor, "m time vocab"]) -> Float[Tensor, " m"]:
    """(|v|_1 / |v|_2)^2 over the number of entries, of the change less its median at each token; 0 for none at all."""
    v = (change - change.median(dim=2, keepdim=True).values).flatten(1).double()
    return (v.abs().sum(dim=1).square() / v.square().sum(dim=1).clamp(min=1e-30) / v.shape[1]).float()
