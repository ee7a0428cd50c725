"""What a dictionary's weights alone say of each latent: its logit lens and its nearest latents.

- logit lens: W_dec @ W_U, with W_U centred over the vocabulary and the final norm's gain folded in;
- neighbours: the decoder rows of largest cosine, of largest |cosine| for signed latents, whose sign is a convention.

The surprise: both are products with the whole vocabulary or the whole dictionary, so they are made a few rows at a
time, and nothing of the dictionary's own size is made beside it.
Source of the lens: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from activations import Model
from sae import SAE

N_LOGITS = 10
N_NEIGHBOURS = 10
N_BINS = 40
ROWS = 4096
"""Latents in one part of the index's scratch."""
_CELLS = 1 << 23
"""Entries of a dense product that are held at once (32 MiB of float32, and a few times that around it)."""
_GROUP = 128


class Lens(NamedTuple):
    """What some decoder rows write to the vocabulary. n rows; ids are token ids."""

    top_ids: np.ndarray
    top_values: np.ndarray
    bottom_ids: np.ndarray
    bottom_values: np.ndarray
    edges: np.ndarray
    counts: np.ndarray


class Unembedding(NamedTuple):
    """What the lens looks through."""

    W_U: Float[Tensor, "d vocab"]
    """Centred over the vocabulary; of entries that have text (others are padding of the matrix)."""
    ids: np.ndarray
    """The token id of each column."""


def unembedding(sae: SAE, model: Model, vocab: list[bytes]) -> Unembedding | None:
    """None for a dictionary whose decoder does not write to the residual stream (another width than the model's)."""
    if sae.W_dec.shape[1] != model.d_model:
        return None
    W_U = model.unembed().to(sae.W_dec.device)
    ids = np.array([id for id, entry in enumerate(vocab) if entry and id < W_U.shape[1]], dtype=np.int32)
    if len(ids) < W_U.shape[1]:
        W_U = W_U[:, torch.from_numpy(ids).long().to(W_U.device)]
    W_U.sub_(W_U.mean(dim=1, keepdim=True))  # in place: with a large vocabulary it is the largest thing in memory
    return Unembedding(W_U, ids)


@torch.inference_mode()
def decoder_tables(sae: SAE, through: Unembedding | None, part: int) -> Iterator[pa.Table]:
    """The columns of latents `part * ROWS` and on that `build_store` takes; without a lens when there is none."""
    W_dec = sae.W_dec.detach().float()
    end = min((part + 1) * ROWS, sae.d_sae)
    norms = torch.linalg.vector_norm(W_dec, dim=1)
    step = max(_CELLS // max(sae.d_sae, len(through.ids) if through else 0), 1)
    for first in range(part * ROWS, end, step):
        last = min(first + step, end)
        found, cosines = neighbours(W_dec, norms, first, last, signed=sae.signed)
        columns = {
            "feature": pa.array(range(first, last), pa.int32()),
            "neighbours": _structs("feature", found, "cosine", cosines),
        }
        if through is not None:
            lens = logit_lens(W_dec[first:last], through.W_U, through.ids)
            columns |= {
                "top_logits": _structs("id", lens.top_ids, "value", lens.top_values),
                "bottom_logits": _structs("id", lens.bottom_ids, "value", lens.bottom_values),
                "logit_edges": _lists(lens.edges),
                "logit_counts": _lists(lens.counts),
            }
        yield pa.table(columns)


def logit_lens(W_dec: Float[Tensor, "n d"], W_U: Float[Tensor, "d vocab"], ids: np.ndarray) -> Lens:
    """The tokens that each decoder row raises and lowers most, and a histogram of all its logits.

    W_U: unembedding, centred over the vocabulary. ids: the token id of each column.
    """
    logits = W_dec @ W_U
    n = min(N_LOGITS, logits.shape[1])
    top, bottom = largest(logits, n), largest(-logits, n)
    top_values, bottom_values = logits.gather(1, top), logits.gather(1, bottom)
    low, high = logits.amin(dim=1, keepdim=True), logits.amax(dim=1, keepdim=True)
    width = torch.where(high > low, high - low, 1.0)  # a row of zeros has all its logits in the first bar
    bins = logits.sub_(low).div_(width).mul_(N_BINS).to(torch.int32).clamp_(max=N_BINS - 1)
    bins += torch.arange(len(bins), device=bins.device, dtype=torch.int32)[:, None] * N_BINS
    counts = torch.bincount(bins.flatten(), minlength=len(bins) * N_BINS).view(-1, N_BINS)
    edges = low + width * torch.linspace(0, 1, N_BINS + 1, device=low.device)
    return Lens(
        ids[top.cpu().numpy()],
        top_values.cpu().numpy(),
        ids[bottom.cpu().numpy()],
        bottom_values.cpu().numpy(),
        edges.cpu().numpy(),
        counts.cpu().numpy(),
    )


def neighbours(
    W_dec: Float[Tensor, "d_sae d"], norms: Float[Tensor, " d_sae"], first: int, last: int, *, signed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(features, cosines) of the nearest rows to rows `first` to `last`, nearest first, each (last - first, n).

    norms: of the rows. signed: nearest by |cosine|, which keeps its sign.
    """
    cosines = torch.nn.functional.normalize(W_dec[first:last], dim=1) @ W_dec.T
    cosines /= norms.clamp(min=1e-12)
    closeness = cosines.abs() if signed else cosines
    closeness[torch.arange(last - first), torch.arange(first, last)] = -torch.inf  # itself
    found = largest(closeness, min(N_NEIGHBOURS, len(W_dec) - 1))
    return found.cpu().numpy().astype(np.int32), cosines.gather(1, found).cpu().numpy()


def largest(x: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n k"]:
    """Columns of the k largest entries of each row, the largest first.

    They lie in the k groups of neighbouring columns of largest maximum; ranking whole rows takes ten times as long.
    """
    if x.shape[1] <= _GROUP * k:
        return x.topk(k, dim=1).indices
    short = -x.shape[1] % _GROUP
    groups = (pad(x, (0, short), value=-torch.inf) if short else x).unflatten(1, (-1, _GROUP))
    best = groups.amax(dim=2).topk(k, dim=1).indices
    place = groups.gather(1, best[:, :, None].expand(-1, -1, _GROUP)).flatten(1).topk(k, dim=1).indices
    return best.gather(1, place // _GROUP) * _GROUP + place % _GROUP


def _lists(values: np.ndarray) -> pa.Array:
    """A matrix as a column of lists."""
    n, width = values.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * width), pa.array(values.ravel()))


def _structs(first: str, firsts: np.ndarray, second: str, seconds: np.ndarray) -> pa.Array:
    """Two matrices of the same shape as a column of lists of structs."""
    n, width = firsts.shape
    items = pa.StructArray.from_arrays([pa.array(firsts.ravel()), pa.array(seconds.ravel())], [first, second])
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * width), items)
