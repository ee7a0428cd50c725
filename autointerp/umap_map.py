"""A UMAP of the decoder rows: each lies near its nearest rows, and far is not to be read.

The graph is that of the neighbours that the index has found, exact and by |cosine| for signed latents: so a row and its
opposite are the same, as everywhere here, and nothing of the dictionary's size is made again. The layout starts from
the principal components; one thread, since with several it differs from run to run.
Source: McInnes et al. 2018, arXiv:1802.03426, by umap-learn. Differs: 10 exact neighbours, not 15 approximate ones.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from activations import InputError
from autointerp.scratch import batches

MIN_DIST = 0.1
FEWEST = 3
"""Latents that a map takes at least."""


def check_umap() -> None:
    """Raise InputError where umap-learn is not installed."""
    if importlib.util.find_spec("umap") is None:
        raise InputError("The map 'umap' needs umap-learn: pip install 'sae-workbench[maps]', or take --map pca.")


def umap_places(
    start: Float[np.ndarray, "d_sae 2"], decoder: Sequence[Path], *, signed: bool, seed: int = 0
) -> Float[np.ndarray, "d_sae 2"]:
    """Coordinates of all latents, from these on; no unit, the same for the same `seed`.

    decoder: parts of the index's scratch with the column `neighbours`.
    """
    if len(start) < FEWEST:
        raise InputError(f"A UMAP of {len(start)} latents is none: it takes {FEWEST} or more. Take --map pca.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # of a part that needs Tensorflow
        from umap.umap_ import find_ab_params, fuzzy_simplicial_set, simplicial_set_embedding
    nearest, distances = nearest_of(decoder, signed=signed)
    graph, _, _ = fuzzy_simplicial_set(
        start,
        nearest.shape[1],
        np.random.RandomState(seed),
        "cosine",
        knn_indices=nearest,
        knn_dists=distances,
    )
    a, b = find_ab_params(1.0, MIN_DIST)
    places, _ = simplicial_set_embedding(
        start,
        graph,
        n_components=2,
        initial_alpha=1.0,
        a=a,
        b=b,
        gamma=1.0,
        negative_sample_rate=5,
        n_epochs=500 if len(start) <= 10_000 else 200,
        init=start,
        random_state=np.random.RandomState(seed),
        metric="cosine",
        metric_kwds={},
        densmap=False,
        densmap_kwds={},
        output_dens=False,
    )
    return np.asarray(places)


def nearest_of(
    decoder: Sequence[Path], *, signed: bool
) -> tuple[Int[np.ndarray, "d_sae k"], Float[np.ndarray, "d_sae k"]]:
    """(the nearest latents of each, itself first; 1 less the cosine, the |cosine| of signed latents)."""
    features, nearest, cosines = [], [], []
    for batch in batches(decoder, ["feature", "neighbours"]):
        flat = batch["neighbours"].flatten()
        features.append(batch["feature"].to_numpy())
        nearest.append(flat.field("feature").to_numpy().reshape(len(batch), -1))
        cosines.append(flat.field("cosine").to_numpy().reshape(len(batch), -1))
    found = np.concatenate(cosines)
    distances = np.clip(1 - (np.abs(found) if signed else found), 0, None)
    itself = np.concatenate(features)[:, None]
    return (
        np.concatenate([itself, np.concatenate(nearest)], axis=1),
        np.concatenate([np.zeros_like(distances[:, :1]), distances], axis=1),
    )
