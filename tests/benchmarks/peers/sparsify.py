"""sparsify: what its `Trainer.fit` does for a batch at one hook, with its default optimiser, written out here since
that method runs a language model. Its AuxK, off by default, is on as everybody's."""

import os
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.peers.imports import placeholders, without_init
from tests.benchmarks.peers.peer import Peer, Setting

if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # where triton is installed it takes it, GPU or not
without_init("sparsify")
with placeholders("accelerate"):
    from schedulefree import ScheduleFreeWrapper
    from sparsify.config import SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from sparsify.sparse_coder import SparseCoder

AUXK_WEIGHT = 1 / 32
DEAD_ROWS = 10_000_000  # its default


class Trainer(Peer):
    package = "eai-sparsify"
    architectures = ("topk",)
    matmul_precision = "high"  # `fit` sets it
    note = "on a GPU its forward is always in bfloat16, its float32 products in TF32"

    def __init__(self, setting: Setting, x: Tensor) -> None:
        torch.manual_seed(setting.seed)
        config = SparseCoderConfig(num_latents=setting.d_sae, k=setting.k)
        self.coder: Any = SparseCoder(setting.d_in, config, device=setting.device, dtype=torch.float32)
        self.coder.b_dec.data = x.mean(dim=0)
        lr = setting.lr or 5e-3 / (setting.d_sae / 2**14) ** 0.5
        groups = [{"params": self.coder.parameters(), "lr": lr}]
        self.optimizer: Any = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
        self.optimizer.train()
        self.since_fired = torch.zeros(setting.d_sae, dtype=torch.long, device=setting.device)
        self.fired = torch.zeros(setting.d_sae, dtype=torch.bool, device=setting.device)
        self.mask = torch.ones(setting.batch, dtype=torch.bool, device=setting.device)

    def step(self, x: Tensor) -> None:
        x = x[self.mask]
        self.coder.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        out = self.coder(x=x, y=x, dead_mask=self.since_fired > DEAD_ROWS, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # its running means
        float(out.auxk_loss.detach())
        (out.fvu + AUXK_WEIGHT * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.since_fired += len(x)
            self.since_fired[self.fired] = 0
            self.fired.zero_()

    def recon(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.eval()  # the averaged weights, which it would save
        values, indices, _ = self.coder.encode(x)
        x_hat = self.coder.decode(values, indices)
        self.optimizer.train()
        return x_hat, values.new_zeros(len(x), self.coder.num_latents).scatter(1, indices, values)

    def kill(self, n: int) -> None:
        self.coder.encoder.bias.data[:n] = -50.0
        self.since_fired[:n] = 10**9
