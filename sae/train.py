"""Training: cached activations in, a dictionary out. `train` is the loop, told in order; start reading there.

Exact resume: all state is in the checkpoint (weights, optimiser, counters, the number of steps and a cursor into the
order of the rows); batches and schedules are functions of the seed and those. On a CPU a killed and resumed run ends in
the same bytes.
"""

import dataclasses
import json
import math
import shutil
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from activations.cache import Activations, CachedActivations, scale_of
from activations.errors import InputError
from activations.files import lock, read_json, write_aside, write_json
from activations.model import fast_dtype, pick_device
from activations.run import Run, versions
from activations.shuffle import START, Cursor, Shuffled
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
    order: str = "shuffled"
    """Of the rows: "shuffled" over a complete cache, or "stream", as they come (`activations.shuffle`)."""
    roles: tuple[str, ...] = ()
    """Of a chat: train on the tokens of these alone; () for all."""
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


class Place(NamedTuple):
    """Where a training is, beside its weights."""

    step: int
    """Steps done."""
    cursor: Cursor
    """The next row."""
    scale: float
    """What rows are multiplied by; of a stream, its first rows are needed to find it."""


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
    source: Activations | None = None,
) -> Path:
    """Train one dictionary on the run's activations; returns its folder. Goes on from the last checkpoint.

    name: the dictionary's ID, by default `default_name`. checkpoint_seconds: time between checkpoints; the last `keep`
    stay. source: where the rows come from, in the order "stream": the model itself (`LiveActivations`), or a cache that
    is still growing; None takes the run's complete cache.
    Raises InputError when activations are missing or damaged, sizes cannot be, the folder holds a dictionary that was
    trained with other settings, or the loss is no longer finite.
    """
    source = source or run.activations(settings.hook, roles=settings.roles)
    where = pick_device(device)
    folder = run.dictionary(name or default_name(settings))
    matmul = getattr(torch, settings.matmul) if settings.matmul else fast_dtype(where)
    settings = dataclasses.replace(settings, matmul=str(matmul).removeprefix("torch."))

    with ExitStack() as stack:
        stack.enter_context(lock(folder / ".train.lock"))
        if _is_finished(folder, settings):
            return folder
        if isinstance(source, CachedActivations):
            source.check()
        sae = REGISTRY[settings.architecture].sae(settings.config(source.d_in))
        batches = Shuffled(source, batch=settings.batch, seed=settings.seed, order=settings.order, device=where)
        scale = _scale(folder, source, settings)
        if _newest_checkpoint(folder) is None:
            sae.initialise(_first_rows(batches, source.hook) * scale, settings.seed)
        sae.to(where)
        betas = REGISTRY[settings.architecture].betas
        adam = torch.optim.Adam(sae.parameters(), lr=0.0, betas=betas, fused=True)
        last_fired = torch.zeros(sae.d_sae, dtype=torch.long, device=where)
        start, cursor = _load_checkpoint(folder, sae, adam, last_fired)
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

        feed = stack.enter_context(closing(batches.batches(cursor)))
        for step, (rows, cursor) in zip(range(start, settings.n_steps), feed, strict=False):
            state = state._replace(step=step)
            x = rows[source.hook].float() * scale
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
                    _save_checkpoint(folder, sae, adam, last_fired, Place(step + 1, cursor, scale), keep)
                    saved = time.monotonic()

        sae.unscale(scale)
        sae.metadata = _metadata(run, settings)
        sae.statistics = latent_statistics(sae, source)
        save_sae(sae, folder)
    return folder


def _scale(folder: Path, source: Activations, settings: Training) -> float:
    """What rows are multiplied by: of a stream that is being resumed, what it began with (its rows cost a pass)."""
    if (newest := _newest_checkpoint(folder)) is not None:
        return float(read_json(newest / "state.json")["scale"])
    if settings.order == "shuffled" and isinstance(source, CachedActivations):
        return scale_of(source.moments)
    return scale_of(source.opening_moments)  # whether or not the other shards are there by now


def _newest_checkpoint(folder: Path) -> Path | None:
    return max((folder / "checkpoints").glob("step-*"), default=None)


def _first_rows(batches: Shuffled, hook: str) -> Tensor:
    """At least 4,096 training rows to initialise from, in float32, on the CPU."""
    parts: list[Tensor] = []
    for rows, _ in batches.batches():
        parts.append(rows[hook].float().cpu())
        if sum(len(part) for part in parts) >= 4096:
            break
    return torch.cat(parts)


def _dead(last_fired: Tensor, step: int, settings: Training) -> tuple[Tensor, int]:
    dead = last_fired < step - settings.dead_steps
    return dead, int(dead.sum())


def _is_finished(folder: Path, settings: Training) -> bool:
    """Compare with what the folder was begun with, or begin it. True when the dictionary is there already."""
    path = folder / "train.json"
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))  # as it reads back: tuples are lists
    if not path.exists():
        write_json(path, {**wanted, "versions": versions(), "threads": torch.get_num_threads()})
        return False
    begun = read_json(path)
    for key, value in wanted.items():
        if begun.get(key, getattr(Training, key, None)) != value:
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
        last = _newest_checkpoint(folder)
        raise InputError(
            f"The loss is not finite at step {step + 1} ({figures}): lower --lr. Last good checkpoint: {last}."
        )


def _open_log(path: Path, start: int) -> Any:
    """train.jsonl, cut back to the lines up to the step that training starts from."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    with write_aside(path) as aside:
        aside.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= start), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def _save_checkpoint(
    folder: Path, sae: SAE, adam: torch.optim.Adam, last_fired: Tensor, place: Place, keep: int
) -> None:
    tensors = {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()}
    for name, parameter in sae.named_parameters():
        tensors |= {f"adam.{name}.{key}": value for key, value in adam.state[parameter].items()}
    tensors["last_fired"] = last_fired
    checkpoints = folder / "checkpoints"
    with write_aside(checkpoints / f"step-{place.step:09d}") as aside:
        aside.mkdir()
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside / "state.safetensors"
        )
        write_json(aside / "state.json", place._asdict())
    for old in sorted(checkpoints.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def _load_checkpoint(folder: Path, sae: SAE, adam: torch.optim.Adam, last_fired: Tensor) -> tuple[int, Cursor]:
    """Restore the newest checkpoint; returns the number of steps done and the place of the next row."""
    newest = _newest_checkpoint(folder)
    if newest is None:
        return 0, START
    tensors = load_file(newest / "state.safetensors")
    sae.load_state_dict({name: tensors[f"sae.{name}"] for name in sae.state_dict()})
    last_fired.copy_(tensors["last_fired"])
    for name, parameter in sae.named_parameters():
        saved = {key: tensors[f"adam.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        # empty_like keeps the parameter's memory layout, which decides the order of sums
        adam.state[parameter] = {
            key: value if key == "step" else torch.empty_like(parameter).copy_(value) for key, value in saved.items()
        }
    state = read_json(newest / "state.json")
    return int(state["step"]), Cursor(*state["cursor"])
