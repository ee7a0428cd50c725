"""SAELens' synthetic worlds, its trainers on them, and its own evaluation: what judges ours too."""

import contextlib
import io
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from data.planted import World, WorldConfig
from tests.benchmarks.peers import saelens  # noqa: F401  (lets its modules be imported one by one)
from tests.benchmarks.peers.imports import placeholders

with placeholders("datasets", "wandb", "requests", "pandas", "plotly", "dotenv"):
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import register_sae_class
    from sae_lens.saes import (
        abstopk_sae,
        batchtopk_sae,
        gated_sae,
        jumprelu_sae,
        matching_pursuit_sae,
        matryoshka_batchtopk_sae,
        standard_sae,
        topk_sae,
    )
    from sae_lens.synthetic import (
        FoldedNormalMagnitudeConfig,
        HierarchyConfig,
        LinearMagnitudeConfig,
        LowRankCorrelationConfig,
        OrthogonalizationConfig,
        SyntheticModel,
        SyntheticModelConfig,
        ZipfianFiringProbabilityConfig,
        eval_sae_on_synthetic_data,
    )
    from sae_lens.training.sae_trainer import SAETrainer

MODULES: dict[str, tuple[Any, str]] = {
    "topk": (topk_sae, "TopK"),
    "abstopk": (abstopk_sae, "AbsTopK"),
    "batchtopk": (batchtopk_sae, "BatchTopK"),
    "matryoshka": (matryoshka_batchtopk_sae, "MatryoshkaBatchTopK"),
    "jumprelu": (jumprelu_sae, "JumpReLU"),
    "gated": (gated_sae, "Gated"),
    "standard": (standard_sae, "Standard"),
    "mp": (matching_pursuit_sae, "MatchingPursuit"),
}
for module, stem in MODULES.values():  # as its __init__ does
    if hasattr(module, f"{stem}SAE"):
        made, config = getattr(module, f"{stem}SAE"), getattr(module, f"{stem}SAEConfig")
        with contextlib.suppress(ValueError):  # it is there already
            register_sae_class(config.architecture(), made, config)


def synthetic_model(config: WorldConfig, device: str) -> SyntheticModel:
    """SAELens' world of the same recipe. It depends on the kind of device."""
    first, last = config.sizes
    tree = HierarchyConfig(
        total_root_nodes=config.n_trees,
        branching_factor=config.n_children,
        max_depth=config.depth,
        mutually_exclusive_portion=float(config.exclusive),
        mutually_exclusive_min_depth=0,
        compensate_probabilities=True,
        scale_children_by_parent=config.scale_by_parent,
    )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        return SyntheticModel(
            SyntheticModelConfig(
                num_features=config.n_features,
                hidden_dim=config.d_in,
                firing_probability=ZipfianFiringProbabilityConfig(
                    max_prob=config.max_prob, min_prob=config.min_prob, exponent=config.exponent
                ),
                hierarchy=tree,
                mean_firing_magnitudes=LinearMagnitudeConfig(start=first, end=last),
                std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=config.spread, std=config.spread),
                correlation=LowRankCorrelationConfig(correlation_scale=config.correlation, rank=config.rank),
                orthogonalization=OrthogonalizationConfig(num_steps=config.orthogonal_steps, lr=3e-4),
                bias=config.bias,
                seed=config.seed,
            ),
            device=device,
        )


def as_world(model: SyntheticModel, config: WorldConfig) -> World:
    """SAELens' world as ours: the same features, frequencies and trees, with our sampler."""
    generator, features = model.activation_generator, model.feature_dict
    parent = torch.full((config.n_features,), -1)

    def walk(node: Any) -> None:
        for child in node.children:
            parent[child.feature_index] = node.feature_index
            walk(child)

    for root in model.hierarchy.roots if model.hierarchy else ():
        walk(root)
    return World(
        directions=features.feature_vectors.detach(),
        bias=features.bias.detach(),
        chance=generator.firing_probabilities,
        size=generator.mean_firing_magnitudes,
        spread=generator.std_firing_magnitudes,
        factors=generator.low_rank_correlation[0],
        parent=parent.to(generator.firing_probabilities.device),
        exclusive=config.exclusive,
        scale_by_parent=config.scale_by_parent,
    )


class _Replay:
    """True features drawn before, in the form of SAELens' generator of them."""

    def __init__(self, z: Iterable[Tensor]) -> None:
        self.z = iter(z)

    def sample(self, n: int) -> Tensor:
        z = next(self.z)
        assert len(z) == n
        return z


METRICS = {
    "f1": "classification/f1_score",
    "precision": "classification/precision",
    "recall": "classification/recall",
    "mcc": "mcc",
    "ev": "explained_variance",
    "l0": "sae_l0",
    "true_l0": "true_l0",
    "uniqueness": "uniqueness",
    "shrinkage": "shrinkage",
    "dead": "dead_latents",
}


def judge(sae: Any, model: SyntheticModel, z: Iterable[Tensor], n: int, batch: int) -> dict[str, float]:
    """SAELens' metrics of anything with eval, encode, decode and W_dec, over batches of n true features in all."""
    found = eval_sae_on_synthetic_data(sae, model.feature_dict, _Replay(z), num_samples=n, batch_size=batch)
    flat = found.to_log_dict()
    return {ours: float(flat[theirs]) for ours, theirs in METRICS.items()}


class Peer:
    """One of SAELens' dictionaries and its trainer, driven as `SyntheticSAERunner` drives it."""

    def __init__(self, arch: str, sizes: dict[str, Any], *, n_steps: int, batch: int, lr: float, seed: int) -> None:
        """sizes: fields of SAELens' config; device in them. The rest is as in SyntheticSAERunnerConfig."""
        torch.manual_seed(seed)
        module, stem = MODULES[arch]
        config = getattr(module, f"{stem}TrainingSAEConfig")(dtype="float32", **sizes)
        self.sae: Any = getattr(module, f"{stem}TrainingSAE")(config)
        device = sizes["device"]
        self.sae.to(device)
        trainer = SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=n_steps * batch,
            device=device,
            autocast=device != "cpu",
            lr=lr,
            lr_end=lr / 10,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            train_batch_size_samples=batch,
            dead_feature_window=1000,
            feature_sampling_window=n_steps + 1,  # of a log that nobody reads
            logger=LoggingConfig(log_to_wandb=False),
            n_batches_for_norm_estimate=1000,
        )
        self.trainer: Any = SAETrainer(cfg=trainer, sae=self.sae, data_provider=iter(()))

    def step(self, x: Tensor) -> None:
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def saved(self) -> Any:
        """What it saves and loads for inference: BatchTopK as JumpReLU with one threshold."""
        with tempfile.TemporaryDirectory() as folder:
            self.sae.save_inference_model(folder)
            device = str(self.sae.W_dec.device)
            return jumprelu_sae.JumpReLUSAE.load_from_disk(folder, device=device).requires_grad_(False)
