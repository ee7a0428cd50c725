"""SAELens: what `SAETrainer.fit` does for a batch, without Weights & Biases. JumpReLU: as Anthropic's settings in its
documentation."""

import logging
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.peers.imports import placeholders, without_init
from tests.benchmarks.peers.peer import Peer, Setting

without_init("sae_lens", __version__="", logger=logging.getLogger("sae_lens"))
without_init("transformer_lens")
with placeholders("datasets", "wandb", "requests"):
    from transformer_lens.HookedRootModule import HookedRootModule

    # Where SAELens looks for it; the real module would import every model of TransformerLens.
    models = ModuleType("transformer_lens.HookedTransformer")
    models.HookedRootModule = HookedRootModule  # type: ignore[attr-defined]
    sys.modules[models.__name__] = models
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import register_sae_class
    from sae_lens.saes.jumprelu_sae import (
        JumpReLUSAE,
        JumpReLUSAEConfig,
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
    )
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer, _unwrap_item

register_sae_class("topk", TopKSAE, TopKSAEConfig)  # as its __init__ does
register_sae_class("jumprelu", JumpReLUSAE, JumpReLUSAEConfig)


class Trainer(Peer):
    package = "sae-lens"
    note = "b_dec starts at 0"

    def __init__(self, setting: Setting, x: Tensor) -> None:
        del x
        torch.manual_seed(setting.seed)
        lr, steps = setting.lr or 3e-4, setting.n_steps
        sizes = {"d_in": setting.d_in, "d_sae": setting.d_sae, "dtype": "float32", "device": setting.device}
        if setting.arch == "topk":
            self.sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(k=setting.k, **sizes))
        else:
            config = JumpReLUTrainingSAEConfig(
                jumprelu_sparsity_loss_mode="tanh",
                l0_coefficient=1.0,
                l0_warm_up_steps=steps,
                pre_act_loss_coefficient=3e-6,
                jumprelu_bandwidth=2.0,
                jumprelu_init_threshold=0.1,
                jumprelu_ste_to_input=True,
                **sizes,
            )
            self.sae = JumpReLUTrainingSAE(config)
            self.note += "; L0 follows from its coefficient, not from k"
        config = SAETrainerConfig(
            total_training_samples=steps * setting.batch,
            train_batch_size_samples=setting.batch,
            lr=lr,
            lr_end=lr / 10,
            lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 5,
            device=setting.device,
            autocast=setting.dtype == "autocast",
            dead_feature_window=max(steps // 10, 1),
            feature_sampling_window=steps + 1,  # of a log that nobody reads
        )
        self.trainer: Any = SAETrainer(cfg=config, sae=self.sae, data_provider=iter(()))
        self.sae.to(setting.device)

    def step(self, x: Tensor) -> None:
        self.trainer.maybe_reset_sparsity()
        output = self.trainer.step(x)
        self.trainer._checkpoint_if_needed()
        self.trainer.n_training_steps += 1
        if self.trainer.n_training_steps % 100 == 0:  # its progress bar
            _ = [_unwrap_item(value) for value in output.losses.values()]

    def recon(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, _ = self.sae.encode_with_hidden_pre(x)
        return self.sae.decode(z), z

    def kill(self, n: int) -> None:
        self.sae.b_enc.data[:n] = -50.0
        self.trainer.n_forward_passes_since_fired[:n] = 10**9
