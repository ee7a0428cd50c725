"""Training: cached activations in, a dictionary out. `train` is the loop, told in order; start reading there.

Exact resume: all state is in the checkpoint (weights, optimiser, counters) and a cursor, the number of steps; batches
and schedules are functions of the seed and that number. On a CPU a killed and resumed run ends in the same bytes.
"""

import dataclasses
import json
import math
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from activations.errors import InputError
from activations.files import lock, read_json, write_aside, write_json
from activations.model import fast_dtype, pick_device
from activations.run import Run, versions
from activations.shuffle import Shuffled
from sae.base import SAE, Config, ConfigError, State
from sae.files import CFG, save_sae
from sae.registry import REGISTRY
from sae.statistics import latent_statistics

LOG_EVERY = 20
"""Steps between log lines and counts of dead latents: the only times at which the host waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """All settings of one training run; saved as train.json."""

    architecture: str
    hook: str
    sizes: dict[str, Any]
    """Fields of the architecture's config but d_in."""
    n_tokens: int
    """Rows visited; more than the cache holds means several epochs."""
    batch: int = 2048
    """Rows in a step."""
    seed: int = 0
    lr: float | None = None
    """Peak learning rate; None takes the registry's for the architecture and width."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    decay: float = 0.2
    """Share of the steps over which it falls to 0 at the end."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    matmul: str | None = None
    """Precision of the encoder's product: "float32" or "bfloat16"; None takes the faster of this machine."""

    def __post_init__(self) -> None:
        if self.architecture not in REGISTRY:
            raise InputError(f"Architecture {self.architecture!r} is unknown: expected one of {', '.join(REGISTRY)}.")
        if self.batch < 1 or self.n_tokens < self.batch:
            raise InputError(f"{self.n_tokens} tokens make no batch of {self.batch}: raise --tokens or lower --batch.")

    @property
    def n_steps(self) -> int:
        return self.n_tokens // self.batch

    @property
    def dead_steps(self) -> int:
        """A latent that has not fired in so many steps is dead: min(10 M tokens, a tenth of the run)."""
        return max(min(10_000_000, self.n_tokens // 10) // self.batch, 1)

    def config(self, d_in: int) -> Config:
        """The architecture's config. Raises InputError for sizes that cannot be."""
        try:
            return REGISTRY[self.architecture].config(d_in=d_in, **self.sizes)
        except (TypeError, ConfigError) as error:
            raise InputError(f"{self.architecture}: {error}") from None

    def lr_at(self, step: int, d_sae: int) -> float:
        peak = self.lr or REGISTRY[self.architecture].lr * math.sqrt(4608 / d_sae)
        rise = (step + 1) / max(self.warmup * self.n_steps, 1)
        fall = (self.n_steps - step) / max(self.decay * self.n_steps, 1)
        return peak * min(1.0, rise, fall)


def default_name(settings: Training) -> str:
    """HOOK-ARCH-dN-kK-sSEED, the name of a dictionary that is given none."""
    sparsity = settings.sizes[REGISTRY[settings.architecture].sparsity]
    return f"{settings.hook}-{settings.architecture}-d{settings.sizes['d_sae']}-k{sparsity:g}-s{settings.seed}"


def train(
    run: Run,
    settings: Training,
    *,
    name: str | None = None,
    device: str = "auto",
    checkpoint_seconds: float = 60.0,
    keep: int = 2,
) -> Path:
    """Train one dictionary on the run's cached activations; returns its folder. Goes on from the last checkpoint.

    name: the dictionary's ID, by default `default_name`. checkpoint_seconds: time between checkpoints; the last `keep`
    stay.
    Raises InputError when activations are missing or damaged, sizes cannot be, the folder holds a dictionary that was
    trained with other settings, or the loss is no longer finite.
    """
    cache = run.activations(settings.hook)
    if cache.n_training == 0:
        raise InputError(f"{run.path} has no training tokens at {settings.hook}: collect more text.")
    where = pick_device(device)
    folder = run.dictionary(name or default_name(settings))
    matmul = getattr(torch, settings.matmul) if settings.matmul else fast_dtype(where)
    settings = dataclasses.replace(settings, matmul=str(matmul).removeprefix("torch."))

    with ExitStack() as stack:
        stack.enter_context(lock(folder / ".train.lock"))
        if _is_finished(folder, settings):
            return folder
        cache.check()
        sae = REGISTRY[settings.architecture].sae(settings.config(cache.d_in))
        batches = Shuffled(cache, batch=settings.batch, seed=settings.seed)
        sae.initialise(_first_rows(batches) * cache.scale, settings.seed)
        sae.to(where)
        betas = REGISTRY[settings.architecture].betas
        adam = torch.optim.Adam(sae.parameters(), lr=0.0, betas=betas, fused=True)
        last_fired = torch.zeros(sae.d_sae, dtype=torch.long, device=where)
        start = _load_checkpoint(folder, sae, adam, last_fired)
        log = stack.enter_context(_open_log(folder / "train.jsonl", start))
        bar = stack.enter_context(
            tqdm(
                total=settings.n_tokens,
                initial=start * settings.batch,
                unit="token",
                unit_scale=True,
                desc="train",
                disable=None,
            )
        )
        state, saved = State(start, settings.n_steps, *_dead(last_fired, start, settings)), time.monotonic()

        for step, rows in zip(range(start, settings.n_steps), batches.batches(start), strict=False):
            state = state._replace(step=step)
            x = rows.to(where, torch.float32, non_blocking=True) * cache.scale
            with torch.autocast(where.type, dtype=matmul, enabled=matmul != torch.float32):
                loss = sae.loss(x, x, state)
            loss.total.backward()
            sae.before_step()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), settings.clip)
            adam.param_groups[0]["lr"] = settings.lr_at(step, sae.d_sae)
            adam.step()
            adam.zero_grad()
            sae.after_step(state)
            last_fired.masked_fill_(loss.fired, step + 1)
            bar.update(settings.batch)

            if (step + 1) % LOG_EVERY == 0 or step + 1 == settings.n_steps:
                dead, n_dead = _dead(last_fired, step + 1, settings)
                state = state._replace(dead=dead, n_dead=n_dead)
                figures = {key: round(float(value), 6) for key, value in loss.terms.items()}
                _check_finite(figures, step, folder)
                log.write(json.dumps({"step": step + 1, **figures, "n_dead": state.n_dead}) + "\n")
                bar.set_postfix(fvu=f"{figures['fvu']:.3f}", l0=f"{figures['l0']:.1f}", dead=state.n_dead)
                # Only here, where the dead were just counted: a resumed run counts the same ones.
                if time.monotonic() - saved > checkpoint_seconds:
                    log.flush()
                    _save_checkpoint(folder, sae, adam, last_fired, step + 1, keep)
                    saved = time.monotonic()

        sae.unscale(cache.scale)
        sae.metadata = _metadata(run, settings)
        sae.statistics = latent_statistics(sae, cache)
        save_sae(sae, folder)
    return folder


def _first_rows(batches: Shuffled) -> Tensor:
    """At least 4,096 training rows to initialise from, in float32."""
    parts: list[Tensor] = []
    for rows in batches.batches():
        parts.append(rows.float())
        if sum(len(part) for part in parts) >= 4096:
            break
    return torch.cat(parts)


def _dead(last_fired: Tensor, step: int, settings: Training) -> tuple[Tensor, int]:
    dead = last_fired < step - settings.dead_steps
    return dead, int(dead.sum())


def _is_finished(folder: Path, settings: Training) -> bool:
    """Compare with what the folder was begun with, or begin it. True when the dictionary is there already."""
    path = folder / "train.json"
    wanted = dataclasses.asdict(settings)
    if not path.exists():
        write_json(path, {**wanted, "versions": versions(), "threads": torch.get_num_threads()})
        return False
    begun = read_json(path)
    for key, value in wanted.items():
        if begun.get(key) != value:
            raise InputError(
                f"{folder} was begun with {key}={begun.get(key)!r}, not {value!r}: "
                "use the same, another --name, or --overwrite."
            )
    return (folder / CFG).exists()


def _metadata(run: Run, settings: Training) -> dict[str, Any]:
    return {
        "model_name": run.meta["model"],
        "model_revision": run.meta["revision"],
        "hook_name": settings.hook,
        "dataset_path": run.meta["corpus"],
        "context_size": run.meta["context"],
        "prepend_bos": False,
        "sae_workbench_version": run.meta.get("sae-workbench", ""),
    }


def _check_finite(figures: dict[str, float], step: int, folder: Path) -> None:
    if not all(math.isfinite(value) for value in figures.values()):
        last = max((folder / "checkpoints").glob("step-*"), default=None)
        raise InputError(
            f"The loss is not finite at step {step + 1} ({figures}): lower --lr. Last good checkpoint: {last}."
        )


def _open_log(path: Path, start: int) -> Any:
    """train.jsonl, cut back to the lines up to the step that training starts from."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    with write_aside(path) as aside:
        aside.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= start), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def _save_checkpoint(folder: Path, sae: SAE, adam: torch.optim.Adam, last_fired: Tensor, step: int, keep: int) -> None:
    tensors = {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()}
    for name, parameter in sae.named_parameters():
        tensors |= {f"adam.{name}.{key}": value for key, value in adam.state[parameter].items()}
    tensors["last_fired"] = last_fired
    checkpoints = folder / "checkpoints"
    with write_aside(checkpoints / f"step-{step:09d}") as aside:
        aside.mkdir()
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside / "state.safetensors"
        )
        write_json(aside / "state.json", {"step": step})
    for old in sorted(checkpoints.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def _load_checkpoint(folder: Path, sae: SAE, adam: torch.optim.Adam, last_fired: Tensor) -> int:
    """Restore the newest checkpoint; returns the number of steps that were done, 0 when there is none."""
    newest = max((folder / "checkpoints").glob("step-*"), default=None)
    if newest is None:
        return 0
    tensors = load_file(newest / "state.safetensors")
    sae.load_state_dict({name: tensors[f"sae.{name}"] for name in sae.state_dict()})
    last_fired.copy_(tensors["last_fired"])
    for name, parameter in sae.named_parameters():
        saved = {key: tensors[f"adam.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        # empty_like keeps the parameter's memory layout, which decides the order of sums
        adam.state[parameter] = {
            key: value if key == "step" else torch.empty_like(parameter).copy_(value) for key, value in saved.items()
        }
    return int(read_json(newest / "state.json")["step"])
