"""Where the decoder rows lie: a 2-D map of all latents, and clusters of rows that point the same way.

- Map: the two principal components of the rows at norm 1. It shows little of a space of hundreds of dimensions; how
  much is in the store's meta (`map_variance`, share of the variance). Neighbourhoods are told by clusters and cosines,
  or by the other map, a UMAP (`autointerp.umap_map`).
- Clusters: spherical k-means with sqrt(d_sae) centres, numbered from the largest.

For signed latents a row and its opposite are the same latent: the map is not centred and shows each on the side of
x >= 0, and a row belongs to the centre of largest |cosine|.
Source of the clusters: Dhillon & Modha 2001, "Concept decompositions for large sparse text data using clustering".
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from activations import InputError
from autointerp.umap_map import check_umap, umap_places

MAPS = {
    "pca": "principal components of the decoder rows",
    "umap": "UMAP of the decoder rows, from their 10 nearest by cosine",
}
"""What the store's meta says of each."""
STEPS = 10
_PIECE = 8192


def check_map(name: str) -> None:
    """Raise InputError for a map that there is not, or not without another package."""
    if name not in MAPS:
        raise InputError(f"map={name!r} is unknown: expected one of {', '.join(MAPS)}.")
    if name == "umap":
        check_umap()


def map_table(
    W_dec: Float[Tensor, "d_sae d"], name: str, decoder: Sequence[Path], *, signed: bool, seed: int = 0
) -> tuple[pa.Table, dict[str, str]]:
    """(feature, x, y and cluster of every latent, as `build_store` takes them; what the store's meta says of the map).

    name: one of `MAPS`. decoder: where the neighbours are, of which a UMAP is made.
    """
    components, share = flat(W_dec, signed=signed)
    places, facts = components.float().cpu().numpy(), {"map": MAPS[name]}
    if name == "umap":
        places = umap_places(places, decoder, signed=signed, seed=seed)
    else:
        facts["map_variance"] = f"{share:.4f}"
    numbers = clusters(W_dec, max(round(math.sqrt(len(W_dec))), 1), signed=signed, seed=seed)
    x, y = places.T
    cluster = numbers.to(torch.int32).cpu().numpy()
    return pa.table({"feature": np.arange(len(x), dtype=np.int32), "x": x, "y": y, "cluster": cluster}), facts


def flat(W_dec: Float[Tensor, "d_sae d"], *, signed: bool) -> tuple[Float[Tensor, "d_sae 2"], float]:
    """Coordinates along the two principal components, and their share of the variance.

    A component points to where its largest entry is positive.
    """
    d = W_dec.shape[1]
    total, square = W_dec.new_zeros(d, dtype=torch.float64), W_dec.new_zeros(d, d, dtype=torch.float64)
    for unit in _pieces(W_dec):
        rows = unit.double()
        total += rows.sum(dim=0)
        square += rows.T @ rows
    mean = torch.zeros_like(total) if signed else total / len(W_dec)
    variances, directions = torch.linalg.eigh(square / len(W_dec) - torch.outer(mean, mean))
    axes = directions[:, -2:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    places = torch.cat([(unit.double() - mean) @ axes for unit in _pieces(W_dec)])
    if signed:
        places = torch.where(places[:, :1] < 0, -places, places)
    if d == 1:
        places = torch.cat([places, torch.zeros_like(places)], dim=1)
    return places, float(variances[-2:].sum() / variances.sum().clamp(min=1e-30))


def clusters(W_dec: Float[Tensor, "d_sae d"], k: int, *, signed: bool, seed: int = 0) -> Int[Tensor, " d_sae"]:
    """The cluster of each row, 0 the largest. The first centres are rows, drawn with `seed`."""
    drawn = torch.randperm(len(W_dec), generator=torch.Generator().manual_seed(seed))[:k]
    centres = normalize(W_dec[drawn.to(W_dec.device)].float(), dim=1)
    for _ in range(STEPS):
        sums = torch.zeros_like(centres)
        for unit in _pieces(W_dec):
            belongs = _belongs(unit, centres, signed=signed)
            sums += belongs.T @ unit
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums, dim=1), centres)
    found = torch.cat([_belongs(unit, centres, signed=signed).abs().argmax(dim=1) for unit in _pieces(W_dec)])
    order = torch.bincount(found, minlength=k).argsort(descending=True, stable=True)
    return order.argsort()[found]


def _belongs(unit: Float[Tensor, "n d"], centres: Float[Tensor, "k d"], *, signed: bool) -> Float[Tensor, "n k"]:
    """1 (-1 for a row that points the other way) where a row belongs, 0 elsewhere: its product sums without a race."""
    cosines = unit @ centres.T
    nearest = (cosines.abs() if signed else cosines).argmax(dim=1, keepdim=True)
    side = cosines.gather(1, nearest).sign() if signed else torch.ones_like(nearest, dtype=unit.dtype)
    return torch.zeros_like(cosines).scatter_(1, nearest, torch.where(side == 0, 1.0, side))


def _pieces(W_dec: Float[Tensor, "d_sae d"]) -> Iterator[Float[Tensor, "n d"]]:
    """The rows at norm 1, some at a time."""
    for rows in W_dec.split(_PIECE):
        yield normalize(rows.float(), dim=1)
