"""Feature Choice: in a batch each latent chooses its rows, as many as Zipf's law gives it.

    p = (x - b_dec) W_enc + b_enc        x_hat = z W_dec + b_dec
    training: z_i = ReLU(p_i) in the m_i rows of the batch where p_i is largest, sum_i m_i = n * k
    else:     z_i = p_i * 1[p_i > threshold_i], the running mean of the smallest p_i that was chosen in a batch

m_i is at least 1, so no latent dies; the rest follows the law fitted to how often each latent would fire if the batch
kept its n * k largest (Mutual Choice). While State.penalty is below 1 those are kept themselves: `sparsity_warmup` is
the share of a run that is Mutual Choice, before Feature Choice.
Loss: FVU of the batch + 1/32 aux_zipf, as Mutual Choice.
Source: arXiv:2411.02124. Differs: in what is not published: the law (`sae.zipf`) follows training instead of a run
before it. With --data-parallel each part of the rows shares out its own n * k.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sae import ksparse, zipf
from sae.base import ConfigError, Dead, Loss, State
from sae.batchwise import KEEPS, BatchwiseConfig, BatchwiseSAE
from sae.dense import product
from sae.ksparse import Bags, Codes
from sae.parallel import ALONE, Mesh
from sae.select import topk_dense
from sae.sparse import nonzero


@dataclass(frozen=True, kw_only=True)
class FeatureChoiceConfig(BatchwiseConfig):
    """As BatchTopK's without `refine` and `tilt`; auxk_weight is that of aux_zipf."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine or self.tilt:
            raise ConfigError(f"refine={self.refine}, tilt={self.tilt}: featurechoice has neither; expected 0.")


class FeatureChoiceSAE(BatchwiseSAE):
    architecture = "featurechoice"
    penalised = True
    cfg: FeatureChoiceConfig
    frequency: Tensor
    """(d_sae) running mean of the share of rows that Mutual Choice would give each latent."""

    def __init__(self, cfg: FeatureChoiceConfig, mesh: Mesh = ALONE) -> None:
        if mesh.n_latents > 1:
            raise ConfigError("featurechoice cannot share its latents among processes: use --data-parallel N.")
        super().__init__(cfg, mesh)
        self.register_buffer("frequency", torch.zeros(cfg.d_sae))

    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        u = ksparse.centred(self, x)
        codes, dying = self._choose(u, state)
        dead = dying if self.cfg.auxk_weight else None
        made = ksparse.loss_of(self, u, target, codes, dead, self.cfg.auxk_weight)
        return made._replace(terms=made.terms | {"dying": dying.n})

    @torch.no_grad()
    def _choose(self, u: Float[Tensor, "n d_in"], state: State) -> tuple[Codes, Dead]:
        """The codes of a batch, and who is dying. Moves the thresholds and the frequencies."""
        n, m = len(u), self.d_sae
        total = min(round((state.k or self.cfg.k) * n), n * m)
        pre = product(u, self.encoder.T, self.b_enc)
        dying = zipf.dying(self.frequency)
        dead_z = topk_dense(pre, min(ksparse.n_places(self), len(dying.latents)), False, dying.latents, dying.real)
        # A row a latent from here on.
        by_latent = pre.T.float().contiguous()
        mutual = (by_latent >= _largest(by_latent.flatten(), total)) & (by_latent > 0)
        share = self.mesh.mean_rows(mutual.float().mean(dim=1))
        self.frequency.copy_(torch.where(self.frequency.sum() > 0, self.frequency.lerp(share, 1 - KEEPS), share))
        own = _chosen(by_latent, zipf.quotas(zipf.expected(self.frequency), total, n))
        kept = torch.where(torch.as_tensor(state.penalty, device=u.device) < 1, mutual, own)
        least = by_latent.masked_fill(~kept, torch.inf).amin(dim=1)
        moved = torch.where(self.threshold == 0, least, self.threshold.lerp(least, 1 - KEEPS))
        self.threshold.copy_(self.mesh.mean_rows(torch.where(least.isfinite(), moved, self.threshold)))
        return _flat(pre, kept.T, total, dead_z), dying


# numpy sorts and parts float32 on a CPU in a small part of torch's time.


def _chosen(by_latent: Float[Tensor, "m n"], quotas: Int[Tensor, " m"]) -> Bool[Tensor, "m n"]:
    """Which entries above 0 are among the `quotas` largest of their latent; of equals the first."""
    n, on_cpu = by_latent.shape[1], by_latent.device.type == "cpu"
    ordered = torch.from_numpy(np.sort(by_latent.numpy())) if on_cpu else by_latent.sort().values
    least = ordered.gather(1, (n - quotas).clamp(max=n - 1)[:, None])
    above, equal = by_latent > least, by_latent == least
    left = quotas[:, None] - above.sum(dim=1, keepdim=True)
    return (above | (equal & (equal.cumsum(dim=1) <= left))) & (by_latent > 0)


def _largest(values: Float[Tensor, " size"], total: int) -> Float[Tensor, ""]:
    """The last of the `total` largest."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.partition(values.numpy(), -total)[-total : len(values) - total + 1])[0]
    return values.topk(total, sorted=False).values.amin()


def _flat(pre: Float[Tensor, "n m"], kept: Bool[Tensor, "n m"], most: int, dead_z: Float[Tensor, "n _dying"]) -> Codes:
    """The kept entries, at most so many, as a flat table. On a GPU it has `most` places, so that nothing waits."""
    if kept.is_cuda:
        places = torch.nonzero_static(kept.flatten(), size=most, fill_value=0).squeeze(1)
    else:
        places = nonzero(kept.contiguous())[:most]
    starts = pad(kept.sum(dim=1).cumsum(dim=0), (1, 0)).clamp(max=len(places))
    real = torch.arange(len(places), device=kept.device) < starts[-1]
    rows = torch.where(real, places // kept.shape[1], len(kept) - 1)
    values = pre.flatten().index_select(0, places).float() * real
    return Codes(values[:, None], (places % kept.shape[1])[:, None], dead_z, Bags(starts, rows, rows))
