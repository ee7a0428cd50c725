"""BatchAbsTopK: a batch of n rows keeps its n * k latents of largest magnitude, with their sign.

    p = (x - b_dec) W_enc + b_enc        x_hat = z W_dec + b_dec
    training: z = p where |p| is among the n * k largest of the batch        else: z = p * 1[|p| > threshold]

BatchTopK's freedom of each row with AbsTopK's latents, which stand for a direction and its opposite. Loss: FVU of the
batch + 1/32 AuxK.
Source: arXiv:2510.00404 for the signed codes and arXiv:2412.06410 for the batch; ours to combine. SAELens has none like
it.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sae import ksparse
from sae.base import Loss, State
from sae.batchwise import BatchwiseConfig, BatchwiseSAE, choose


@dataclass(frozen=True, kw_only=True)
class BatchAbsTopKConfig(BatchwiseConfig):
    """As BatchTopK's; k counts latents of either sign."""


class BatchAbsTopKSAE(BatchwiseSAE):
    architecture = "batchabstopk"
    signed = True
    cfg: BatchAbsTopKConfig

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        u, codes, dead, at_cap = choose(self, x, state)
        made = ksparse.loss_of(self, u, target, codes, dead, self.cfg.auxk_weight, self.cfg.tilt)
        return made._replace(terms=made.terms | {"at_cap": at_cap})
