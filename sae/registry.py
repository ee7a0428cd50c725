"""The table of architectures: name -> class, config, and how it is trained."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.codebook import CodebookConfig, CodebookSAE
from sae.architectures.itda import ITDASAE, ITDAConfig
from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from sae.architectures.kron import KronConfig, KronSAE
from sae.architectures.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from sae.architectures.structured import StructuredConfig, StructuredSAE
from sae.architectures.topk import TopKConfig, TopKSAE
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
    """Peak learning rate at 4,608 latents; it falls with the square root of the width. A `FittedSAE` has none."""
    betas: tuple[float, float] = (0.9, 0.999)
    resamplings: int = 0
    """How often dead latents are resampled in the first half of a run that does not say."""
    renamed: Mapping[str, str] = MappingProxyType({})
    """Fields of the config that SAELens has under another name: cfg.json has both."""


REGISTRY: dict[str, Entry] = {
    "topk": Entry(TopKSAE, TopKConfig, "topk", sparsity="k", lr=1e-3),
    "abstopk": Entry(AbsTopKSAE, AbsTopKConfig, "abstopk", sparsity="k", lr=1e-3),
    "jumprelu": Entry(JumpReLUSAE, JumpReLUConfig, "jumprelu", sparsity="target_l0", lr=2e-3),
    "codebook": Entry(CodebookSAE, CodebookConfig, None, sparsity="k", lr=3e-3, resamplings=20),
    "itda": Entry(ITDASAE, ITDAConfig, None, sparsity="k", lr=0.0),
    "kron": Entry(KronSAE, KronConfig, None, sparsity="k", lr=2e-3),
    "matching_pursuit": Entry(
        MatchingPursuitSAE,
        MatchingPursuitConfig,
        "matching_pursuit",
        sparsity="k",
        lr=1e-3,
        renamed={"k": "max_iterations"},
    ),
    "structured": Entry(StructuredSAE, StructuredConfig, None, sparsity="k", lr=1e-3),
}
