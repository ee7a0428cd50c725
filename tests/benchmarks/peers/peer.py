"""What `tests.benchmarks.train` asks of a trainer: ours, the dense reference, and each peer has a `Trainer`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training, the same for all."""

    arch: str
    d_in: int
    d_sae: int
    k: int
    """Active latents a row; JumpReLU: on average, where a trainer can be told."""
    batch: int
    n_steps: int
    dtype: str
    """"float32", or "autocast": float32 weights, products in bfloat16."""
    device: str
    lr: float | None
    """Of every trainer; None leaves each its own default."""
    seed: int

    def autocast(self) -> Any:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == "autocast")


class Peer(ABC):
    """One full step a call of `step`: loss, backward, optimiser, and all that the trainer does beside them."""

    architectures: ClassVar[tuple[str, ...]] = ("topk", "jumprelu")
    matmul_precision: ClassVar[str] = "highest"
    """Of float32 products, as torch.set_float32_matmul_precision takes it."""
    package: ClassVar[str | None] = None
    """Its name in the package index; None for our own."""
    note: str = ""
    """What a reader of the figures has to know."""

    @abstractmethod
    def __init__(self, setting: Setting, x: Tensor) -> None:
        """x: rows (n, d_in) to initialise from; their mean norm is sqrt(d_in), as that of all rows."""

    @abstractmethod
    def step(self, x: Tensor) -> None: ...

    @abstractmethod
    def recon(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x_hat (n, d_in), z (n, d_sae)), both float32. Called without gradient."""

    @abstractmethod
    def kill(self, n: int) -> None:
        """Make the first n latents dead, as far as the trainer can tell, so that reviving them costs what it costs."""
