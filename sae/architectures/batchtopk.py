"""BatchTopK: a batch of n rows keeps its n * k largest latents, so that a row has as many as it needs.

    p = (x - b_dec) W_enc + b_enc        x_hat = z W_dec + b_dec
    training: z = ReLU(p) where among the n * k largest of the batch        else: z = p * 1[p > threshold]

Loss: FVU of the batch + 1/32 AuxK. The threshold is the running mean of the smallest value that was kept; with it a
dictionary is a JumpReLU, as which SAELens loads it.
Source: Bussmann, Leask and Nanda 2024, arXiv:2412.06410. Differs: a row keeps at most 4 k (see `sae.batchwise`);
`refine` is an option, with evidence on planted features alone.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sae import ksparse
from sae.base import Loss, State
from sae.batchwise import BatchwiseConfig, BatchwiseSAE, choose


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(BatchwiseConfig):
    """d_in, d_sae, k and what `BatchwiseConfig` has."""


class BatchTopKSAE(BatchwiseSAE):
    architecture = "batchtopk"
    cfg: BatchTopKConfig

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        u, codes, dead, at_cap = choose(self, x, state)
        made = ksparse.loss_of(self, u, target, codes, dead, self.cfg.auxk_weight, self.cfg.tilt)
        return made._replace(terms=made.terms | {"at_cap": at_cap})
