"""The table of architectures: name -> class, config, and how it is trained."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.batchabstopk import BatchAbsTopKConfig, BatchAbsTopKSAE
from sae.architectures.batchtopk import BatchTopKConfig, BatchTopKSAE
from sae.architectures.boost import BoostConfig, BoostSAE
from sae.architectures.clt import CLT, CLTConfig
from sae.architectures.codebook import CodebookConfig, CodebookSAE
from sae.architectures.crosscoder import CrosscoderConfig, CrosscoderSAE
from sae.architectures.featurechoice import FeatureChoiceConfig, FeatureChoiceSAE
from sae.architectures.gated import GatedConfig, GatedSAE
from sae.architectures.gba import GBASAE, GBAConfig
from sae.architectures.groupmax import GroupMaxConfig, GroupMaxSAE
from sae.architectures.gsae import GSAE, GSAEConfig
from sae.architectures.itda import ITDASAE, ITDAConfig
from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from sae.architectures.kron import KronConfig, KronSAE
from sae.architectures.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from sae.architectures.matryoshka import MatryoshkaConfig, MatryoshkaSAE
from sae.architectures.mlsae import MLSAE, MLSAEConfig
from sae.architectures.msae import MSAE, MSAEConfig
from sae.architectures.mutualchoice import MutualChoiceConfig, MutualChoiceSAE
from sae.architectures.skip_transcoder import SkipTranscoderSAE
from sae.architectures.standard import StandardConfig, StandardSAE
from sae.architectures.structured import StructuredConfig, StructuredSAE
from sae.architectures.topafa import TopAFAConfig, TopAFASAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.architectures.transcoder import TranscoderConfig, TranscoderSAE
from sae.base import SAE, Config


class Entry(NamedTuple):
    """A row of the table."""

    sae: type[SAE]
    config: type[Config]
    saelens: str | None
    """SAELens' name of what we save, if its loader can read that."""
    sparsity: str
    """The config's field that `-k` sets."""
    lr: float
    """Peak learning rate at 4,608 latents; it falls with the square root of the width. A `FittedSAE` has none."""
    betas: tuple[float, float] = (0.9, 0.999)
    resamplings: int = 0
    """How often dead latents are resampled in the first half of a run that does not say."""
    k_from: float = 1.0
    """k of the first step, in units of k, of a run that does not say."""
    k_anneal: float = 0.1
    """Share of a run over which k falls to its own, where it starts higher."""
    sparsity_warmup: float = 0.0
    """Share of a run over which L0 falls to its target, unless the penalty has a fixed weight."""
    renamed: Mapping[str, str] = MappingProxyType({})
    """Fields of the config that SAELens has under another name: cfg.json has both."""


REGISTRY: dict[str, Entry] = {
    "topk": Entry(TopKSAE, TopKConfig, "topk", sparsity="k", lr=1e-3),
    "abstopk": Entry(AbsTopKSAE, AbsTopKConfig, "abstopk", sparsity="k", lr=1e-3, k_from=3.0, k_anneal=1.0),
    "groupmax": Entry(GroupMaxSAE, GroupMaxConfig, None, sparsity="k", lr=1e-3),
    "batchtopk": Entry(BatchTopKSAE, BatchTopKConfig, "jumprelu", sparsity="k", lr=1e-3),
    "batchabstopk": Entry(BatchAbsTopKSAE, BatchAbsTopKConfig, None, sparsity="k", lr=1e-3),
    "matryoshka": Entry(MatryoshkaSAE, MatryoshkaConfig, "jumprelu", sparsity="k", lr=1e-3, k_from=3.0, k_anneal=0.5),
    "jumprelu": Entry(JumpReLUSAE, JumpReLUConfig, "jumprelu", sparsity="target_l0", lr=1.4e-3, sparsity_warmup=0.8),
    "msae": Entry(MSAE, MSAEConfig, None, sparsity="k", lr=1e-3),
    "mutualchoice": Entry(MutualChoiceSAE, MutualChoiceConfig, "jumprelu", sparsity="k", lr=1e-3),
    "featurechoice": Entry(FeatureChoiceSAE, FeatureChoiceConfig, "jumprelu", sparsity="k", lr=1e-3),
    "topafa": Entry(TopAFASAE, TopAFAConfig, None, sparsity="k", lr=1e-3),
    "codebook": Entry(CodebookSAE, CodebookConfig, None, sparsity="k", lr=3e-3, resamplings=20),
    "itda": Entry(ITDASAE, ITDAConfig, None, sparsity="k", lr=0.0),
    "kron": Entry(KronSAE, KronConfig, None, sparsity="k", lr=2e-3),
    "matching_pursuit": Entry(
        MatchingPursuitSAE,
        MatchingPursuitConfig,
        "matching_pursuit",
        sparsity="k",
        lr=2e-4,
        renamed={"k": "max_iterations"},
    ),
    "standard": Entry(StandardSAE, StandardConfig, "standard", sparsity="target_l0", lr=3e-4),
    "gated": Entry(GatedSAE, GatedConfig, "gated", sparsity="target_l0", lr=1e-3, sparsity_warmup=0.8),
    "gba": Entry(GBASAE, GBAConfig, None, sparsity="target_l0", lr=1e-3),
    "transcoder": Entry(TranscoderSAE, TranscoderConfig, None, sparsity="k", lr=1e-3),
    "skip_transcoder": Entry(SkipTranscoderSAE, TranscoderConfig, None, sparsity="k", lr=1e-3),
    "crosscoder": Entry(CrosscoderSAE, CrosscoderConfig, None, sparsity="k", lr=1e-3),
    "mlsae": Entry(MLSAE, MLSAEConfig, None, sparsity="k", lr=1e-3),
    "boost": Entry(BoostSAE, BoostConfig, None, sparsity="k", lr=1e-3),
    "gsae": Entry(GSAE, GSAEConfig, None, sparsity="k", lr=1e-3),
    "clt": Entry(CLT, CLTConfig, None, sparsity="k", lr=1e-3),
    "structured": Entry(StructuredSAE, StructuredConfig, None, sparsity="k", lr=1e-3),
}
