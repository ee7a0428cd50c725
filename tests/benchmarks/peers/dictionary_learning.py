"""dictionary_learning: what `trainSAE(normalize_activations=True)` does for a batch."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.peers.imports import without_init
from tests.benchmarks.peers.peer import Peer, Setting

without_init("dictionary_learning")  # it would import nnsight, for its buffer of activations

from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402


class Trainer(Peer):
    package = "dictionary-learning"

    def __init__(self, setting: Setting, x: Tensor) -> None:
        del x
        self.setting, self.done = setting, 0
        self.norm = setting.d_in**0.5  # it wants a mean squared norm of 1
        common: dict[str, Any] = {
            "steps": setting.n_steps,
            "activation_dim": setting.d_in,
            "dict_size": setting.d_sae,
            "layer": 0,
            "lm_name": "",
            "warmup_steps": setting.n_steps // 20,
            "decay_start": setting.n_steps * 4 // 5,
            "seed": setting.seed,
            "device": setting.device,
        }
        if setting.lr is not None:
            common["lr"] = setting.lr
        if setting.arch == "topk":
            self.trainer: Any = TopKTrainer(k=setting.k, threshold_start_step=10**9, **common)
        else:
            torch.manual_seed(setting.seed)  # this one does not use its seed
            ramp = max(setting.n_steps // 4, 1)
            self.trainer = JumpReluTrainer(target_l0=float(setting.k), sparsity_warmup_steps=ramp, **common)
        self.autocast = setting.dtype == "autocast" and setting.device != "cpu"
        if setting.dtype == "autocast" and not self.autocast:
            self.note = "it has no autocast on a CPU"

    def step(self, x: Tensor) -> None:
        x = x.to(torch.bfloat16 if self.autocast else torch.float32) / self.norm
        with self.setting.autocast() if self.autocast else contextlib.nullcontext():
            self.trainer.update(self.done, x)
        self.done += 1

    def recon(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ae = self.trainer.ae
        if self.setting.arch == "topk":
            z = ae.encode(x / self.norm)
            return ae.decode(z) * self.norm, z
        x_hat, z = ae(x / self.norm, output_features=True)
        return x_hat * self.norm, z

    def kill(self, n: int) -> None:
        ae = self.trainer.ae
        (ae.encoder.bias if self.setting.arch == "topk" else ae.b_enc).data[:n] = -50.0
        self.trainer.num_tokens_since_fired[:n] = 10**9
