"""What TopK and AbsTopK share: k latents a row, chosen without gradient, trained through the sparse form."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import sparse
from sae.base import SAE, Config, ConfigError, Loss, State
from sae.losses import Selection, auxk, fvu


@dataclass(frozen=True, kw_only=True)
class KSparseConfig(Config):
    k: int
    """Active latents for each token."""
    auxk_weight: float = 1 / 32
    """Weight of the loss that revives dead latents; 0 turns it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(
                f"k={self.k} is out of range: expected 0 < k <= d_sae={self.d_sae}. Lower k or raise d_sae."
            )


def pre_activations(sae: SAE, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    """(x - b_dec) W_enc + b_enc. Under autocast the product and its result are in the lower precision."""
    return torch.addmm(sae.b_enc, x - sae.b_dec, sae.W_enc)


def encode(
    sae: SAE, x: Float[Tensor, "n d_in"], k: int, select: Selection
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k latents of each row that `select` chooses. No gradient."""
    with torch.no_grad():
        return select(pre_activations(sae, x), k)


def loss(
    sae: SAE,
    x: Float[Tensor, "n d_in"],
    target: Float[Tensor, "n d_out"],
    state: State,
    k: int,
    select: Selection,
    auxk_weight: float,
) -> Loss:
    """FVU of the batch + auxk_weight * AuxK, with gradient only where latents were chosen."""
    with torch.no_grad():
        pre = pre_activations(sae, x) if state.pre is None else state.pre
        chosen, indices = select(pre, state.k or k)
    with torch.autocast(x.device.type, enabled=False):
        values = sparse.selected(chosen, indices, x, sae.W_enc, sae.b_enc, sae.b_dec)
        error = target - sparse.decode(values, indices, sae.W_dec) - sae.b_dec
        main = fvu(error, target)
        aux = error.new_zeros(())
        if auxk_weight and state.dead is not None:
            aux = auxk(sae, error, pre, x, state.dead, select)
    terms = {"fvu": main.detach(), "auxk": aux.detach(), "l0": (chosen != 0).sum(dim=1).float().mean()}
    return Loss(main + auxk_weight * aux, terms, sparse.fired(chosen, indices, sae.d_sae))
