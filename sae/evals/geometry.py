"""Directions of the latents: how near they lie to each other, and whether encoder and decoder agree. Weights alone."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sae.base import SAE
from sae.evals.metric import Metric

DUPLICATE = 0.95


@torch.no_grad()
def geometry(sae: SAE, *, chunk: int = 1024) -> dict[str, Metric]:
    """Cosines of decoder rows with each other and with the encoder's columns.

    Where latents have a sign, a row and its opposite are the same latent: sizes of cosines are meant. chunk: rows
    compared with all others at a time.
    """
    rows = normalize(sae.W_dec.float(), dim=1)
    nearest, total = off_diagonal(rows, sae.signed, chunk)
    d_sae = len(rows)
    cosine = "|cosine|" if sae.signed else "cosine"
    of = "latents"
    found = {
        "geometry.nearest": Metric(
            value=float(nearest.mean()),
            n=d_sae,
            of=of,
            definition=f"largest {cosine} of a decoder row with another one, mean over latents",
        ),
        "geometry.nearest_max": Metric(
            value=float(nearest.max()), n=d_sae, of=of, definition=f"largest {cosine} of two decoder rows"
        ),
        "geometry.duplicates": Metric(
            value=float((nearest > DUPLICATE).float().mean()),
            n=d_sae,
            of=of,
            definition=f"share of latents with another decoder row at a {cosine} above {DUPLICATE:g}",
        ),
        "geometry.mean_abs_cosine": Metric(
            value=total / max(d_sae * (d_sae - 1), 1), n=d_sae, of=of, definition="mean |cosine| of two decoder rows"
        ),
    }
    if sae.has_encoder_rows and sae.target == "x":
        agree = cosine_similarity(sae.W_enc.T.float(), rows, dim=1)
        found["geometry.encoder_decoder"] = Metric(
            value=float(agree.mean()),
            n=d_sae,
            of=of,
            definition="cosine of a latent's encoder column and decoder row, mean over latents",
        )
    return found


def off_diagonal(rows: Float[Tensor, "n d"], signed: bool, chunk: int = 1024) -> tuple[Float[Tensor, " n"], float]:
    """The largest product of each row with another (signed: by size), and the sum of sizes over all pairs.

    A single row has no other: its largest is 0.
    """
    largest, total = rows.new_zeros(len(rows)), 0.0
    for first in range(0, len(rows) if len(rows) > 1 else 0, chunk):
        products = rows[first : first + chunk] @ rows.T
        own = torch.arange(first, first + len(products), device=rows.device)[:, None]
        total += float(products.scatter_(1, own, 0.0).abs().sum(dtype=torch.float64))
        products = (products.abs_() if signed else products).scatter_(1, own, -torch.inf)
        largest[first : first + chunk] = products.amax(dim=1)
    return largest, total
