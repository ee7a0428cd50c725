"""How much of a dictionary comes back in another one, trained with another seed: weights alone.

Shared latents: matched one to one by decoder rows and, apart from that, by encoder columns; shared are those whose
partner is the same in both, at a cosine of at least 0.7 in both. Where latents have a sign, sizes of cosines are meant.
Source: Paulo & Belrose 2025, arXiv:2501.16615 (shared); Sharkey et al. 2022 (MMCS); Song et al. 2025, arXiv:2505.20254
(PW-MCC).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from activations.errors import InputError
from sae.base import SAE
from sae.evals.matching import match, nearest
from sae.evals.metric import Metric

SHARED = 0.7


@torch.no_grad()
def stability(sae: SAE, other: SAE, name: str, *, seed: int = 0) -> dict[str, Metric]:
    """Shares and cosines, over the latents of `sae`, and the same with a random dictionary of the other's size.

    name: of the other, for the definitions. Raises InputError when the two are of different widths d_in.
    """
    if (sae.d_in, sae.d_out) != (other.d_in, other.d_out):
        raise InputError(
            f"Dictionaries of activations of {sae.d_in} and {other.d_in} numbers have no rows to compare: "
            "expected two of one hook; use --metric universality."
        )
    signed = sae.signed or other.signed
    mine, theirs = (normalize(each.W_dec.float(), dim=1) for each in (sae, other))
    by_decoder, cosines = match(mine, theirs, signed=signed)
    encoders = [encoder_rows(each) for each in (sae, other)]
    by_encoder, encoder_cosines = match(*(normalize(each, dim=1) for each in encoders), signed=signed)
    shared = (by_decoder == by_encoder) & (cosines >= SHARED) & (encoder_cosines >= SHARED)
    generator = torch.Generator().manual_seed(seed)
    random = normalize(torch.randn(theirs.shape, generator=generator), dim=1).to(mine.device)

    def metric(value: float, definition: str, of_seed: int | None = None) -> Metric:
        return Metric(value=value, n=sae.d_sae, of=f"latents, against {name}", definition=definition, seed=of_seed)

    cosine = "|cosine|" if signed else "cosine"
    return {
        "stability.shared": metric(
            float(shared.mean()),
            f"share of latents matched with the same one by decoder and by encoder, at {cosine} >= {SHARED} in both",
        ),
        "stability.decoder_shared": metric(
            float((cosines >= SHARED).mean()), f"share of latents matched by decoder at a {cosine} >= {SHARED}"
        ),
        "stability.mmcs": metric(
            float(nearest(mine, theirs, signed).mean()),
            f"MMCS: {cosine} of a decoder row with the nearest of the other, mean",
        ),
        "stability.pw_mcc": metric(float(cosines.mean()), f"PW-MCC: {cosine} of decoder rows matched one to one, mean"),
        "control.random.stability.mmcs": metric(
            float(nearest(mine, random, signed).mean()), "MMCS with random unit rows instead of the other", seed
        ),
    }


def encoder_rows(sae: SAE) -> Float[Tensor, "d_sae _d"]:
    """What latents are read by, a row a latent: the decoder's where the encoder is tied to it, or has no rows."""
    return (sae.W_enc.T if sae.has_encoder_rows else sae.W_dec).float()
