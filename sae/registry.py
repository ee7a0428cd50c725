"""The table of architectures: name -> class, config, and how it is trained."""

from typing import NamedTuple

from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.boost import BoostConfig, BoostSAE
from sae.architectures.clt import CLT, CLTConfig
from sae.architectures.crosscoder import CrosscoderConfig, CrosscoderSAE
from sae.architectures.gsae import GSAE, GSAEConfig
from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from sae.architectures.mlsae import MLSAE, MLSAEConfig
from sae.architectures.skip_transcoder import SkipTranscoderSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.architectures.transcoder import TranscoderConfig, TranscoderSAE
from sae.base import SAE, Config


class Entry(NamedTuple):
    """A row of the table."""

    sae: type[SAE]
    config: type[Config]
    saelens: str | None
    """SAELens' name of the same architecture, if its loader can read what we save."""
    sparsity: str
    """The config's field that `-k` sets."""
    lr: float
    """Peak learning rate at 4,608 latents; it falls with the square root of the width."""
    betas: tuple[float, float] = (0.9, 0.999)


REGISTRY: dict[str, Entry] = {
    "topk": Entry(TopKSAE, TopKConfig, "topk", sparsity="k", lr=1e-3),
    "abstopk": Entry(AbsTopKSAE, AbsTopKConfig, "abstopk", sparsity="k", lr=1e-3),
    "jumprelu": Entry(JumpReLUSAE, JumpReLUConfig, "jumprelu", sparsity="target_l0", lr=2e-3),
    "transcoder": Entry(TranscoderSAE, TranscoderConfig, None, sparsity="k", lr=1e-3),
    "skip_transcoder": Entry(SkipTranscoderSAE, TranscoderConfig, None, sparsity="k", lr=1e-3),
    "crosscoder": Entry(CrosscoderSAE, CrosscoderConfig, None, sparsity="k", lr=1e-3),
    "mlsae": Entry(MLSAE, MLSAEConfig, None, sparsity="k", lr=1e-3),
    "boost": Entry(BoostSAE, BoostConfig, None, sparsity="k", lr=1e-3),
    "gsae": Entry(GSAE, GSAEConfig, None, sparsity="k", lr=1e-3),
    "clt": Entry(CLT, CLTConfig, None, sparsity="k", lr=1e-3),
}
