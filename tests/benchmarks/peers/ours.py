"""Our own step, beside the peers': what `sae.train` does with one batch, and nothing that it would not do."""

from typing import ClassVar

import torch
from torch import Tensor

from sae.registry import REGISTRY
from sae.settings import Training
from sae.stepper import Stepper
from sae.train import LOG_EVERY
from tests.benchmarks.peers.peer import Peer, Setting


def training(setting: Setting, matmul: str | None = None) -> Training:
    """The settings with which `sae train` would train this."""
    return Training(
        architecture=setting.arch,
        hook="",
        sizes={"d_sae": setting.d_sae, REGISTRY[setting.arch].sparsity: setting.k},
        n_tokens=setting.n_steps * setting.batch,
        batch=setting.batch,
        seed=setting.seed,
        lr=setting.lr,
        matmul=matmul or ("bfloat16" if setting.dtype == "autocast" else "float32"),
    )


class Trainer(Peer):
    matmul: ClassVar[str | None] = None

    def __init__(self, setting: Setting, x: Tensor) -> None:
        settings = training(setting, self.matmul)
        self.sae = REGISTRY[setting.arch].sae(settings.config(setting.d_in))
        self.sae.initialise(x.cpu(), setting.seed)
        self.stepper = Stepper(self.sae.to(setting.device), settings, scale=1.0)

    def step(self, x: Tensor) -> None:
        self.stepper.step(x)
        if self.stepper.n_steps_done % LOG_EVERY == 0:
            self.stepper.recount()
            self.stepper.figures()

    def recon(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, self.sae.low = self.sae.low, {}  # in float32, as all are judged
        x_hat, z = self.sae.reconstruct(x), self.sae.encode(x)
        self.sae.low = low
        return x_hat, z

    def kill(self, n: int) -> None:
        with torch.no_grad():
            self.sae.b_enc[:n] = -50.0
        self.stepper.tensors["last_fired"][:n] = -(10**12)
        self.stepper.recount()
