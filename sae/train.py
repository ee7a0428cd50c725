"""Training: cached activations in, dictionaries out. `train_together` is the loop, told in order; start reading there.

Exact resume: all state is in the checkpoints (weights, optimiser, counters, the number of steps and a cursor into the
order of the rows); batches and schedules are functions of the seed and those. On a CPU a killed and resumed run ends in
the same bytes.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.cache import Activations, CachedActivations, scale_of
from activations.errors import InputError
from activations.files import lock, read_json, write_json, writing
from activations.model import fast_dtype, pick_device
from activations.run import Run, versions
from activations.shuffle import START, Shuffled
from sae import checkpoint
from sae.checkpoint import Place
from sae.files import CFG, save_sae
from sae.monitor import Bar, Monitor
from sae.registry import REGISTRY
from sae.settings import Training, default_name
from sae.statistics import latent_statistics
from sae.stepper import Stepper

LOG_EVERY = 20
"""Steps between log lines and counts of dead latents: the only times at which the host waits for the device."""
SHARED = ("n_tokens", "batch", "order", "roles")
"""Settings that dictionaries trained together have in common."""


def train(
    run: Run,
    settings: Training,
    *,
    name: str | None = None,
    device: str = "auto",
    checkpoint_seconds: float = 60.0,
    keep: int = 2,
    source: Activations | None = None,
    track: Sequence[str] = (),
) -> Path:
    """Train one dictionary on the run's activations; returns its folder. See `train_together`.

    name: the dictionary's ID, by default `default_name`. source: where the rows come from, in the order "stream": the
    model itself (`LiveActivations`), or a cache that is still growing; None takes the run's complete cache.
    """
    together = {name or default_name(settings): settings}
    sources = None if source is None else {settings.hook: source}
    return train_together(
        run, together, device=device, checkpoint_seconds=checkpoint_seconds, keep=keep, sources=sources, track=track
    )[0]


def train_together(
    run: Run,
    wanted: Mapping[str, Training],
    *,
    device: str = "auto",
    checkpoint_seconds: float = 60.0,
    keep: int = 2,
    sources: Mapping[str, Activations] | None = None,
    track: Sequence[str] = (),
) -> list[Path]:
    """Train dictionaries (ID: settings) in one pass over the activations; returns their folders.

    Each goes on from the last checkpoint that all of them have; those that are finished are passed over.
    checkpoint_seconds: time between checkpoints; the last `keep` stay. sources: by hook, as `train` says. track: who
    else draws the curves, "wandb" or "tensorboard".
    Raises InputError when activations are missing or damaged, sizes cannot be, a folder holds a dictionary that was
    trained with other settings or cannot be written to, they cannot be trained together, the disk is full, or a loss
    is no longer finite. The checkpoints stay, and training goes on from the last one.
    """
    where = pick_device(device)
    folders = {name: run.dictionary(name) for name in wanted}
    with ExitStack() as stack:
        stack.enter_context(writing(run.path / "dictionaries"))
        for folder in folders.values():
            stack.enter_context(lock(folder / ".train.lock"))
        plans = {name: _with_matmul(settings, where) for name, settings in wanted.items()}
        plans = {name: plan for name, plan in plans.items() if not _is_finished(folders[name], plan)}
        if not plans:
            return list(folders.values())
        common = _common(plans)
        hooks = list(dict.fromkeys(plan.hook for plan in plans.values()))
        rows_at = {hook: (sources or {}).get(hook) or run.activations(hook, roles=common.roles) for hook in hooks}
        for source in rows_at.values():
            if isinstance(source, CachedActivations):
                source.check()
        seed = common.seed if common.order_seed is None else common.order_seed
        batches = Shuffled(list(rows_at.values()), batch=common.batch, seed=seed, order=common.order, device=where)

        start = _newest_common([folders[name] for name in plans])
        places = {name: checkpoint.read_place(folders[name], start) for name in plans} if start else {}
        first = {} if start else _first_rows(batches)
        steppers: dict[str, Stepper] = {}
        for name, plan in plans.items():
            source = rows_at[plan.hook]
            scale = places[name].scale if start else _scale(source, plan.order)
            sae = REGISTRY[plan.architecture].sae(plan.config(source.d_in))
            if not start:
                sae.initialise(first[plan.hook] * scale, plan.seed)
            steppers[name] = stepper = Stepper(sae.to(where), plan, scale)
            if start:
                checkpoint.restore(folders[name], start, stepper.tensors)
            stepper.restored(start)
        cursor = next(iter(places.values())).cursor if start else START

        logs = {name: stack.enter_context(closing(Monitor(folders[name], plans[name], start, track))) for name in plans}
        bar = stack.enter_context(closing(Bar(common.n_steps * common.batch, start * common.batch)))
        saved = time.monotonic()
        feed = stack.enter_context(closing(batches.batches(cursor)))
        for step, (rows, cursor) in zip(range(start + 1, common.n_steps + 1), feed, strict=False):
            for stepper in steppers.values():
                stepper.step(rows[stepper.settings.hook])
                if stepper.settings.resamples_at(step - 1):
                    stepper.resample(rows[stepper.settings.hook])
            bar.step(common.batch)

            if step % LOG_EVERY == 0 or step == common.n_steps:
                shown = []
                for name, stepper in steppers.items():
                    stepper.recount()
                    figures = stepper.figures()
                    _check_finite(figures, step, folders[name])
                    logs[name].line(step, step * common.batch, figures)
                    shown.append({**figures, "dead": stepper.n_dead / stepper.sae.d_sae})
                bar.figures(shown)
                # Only here, where the dead were just counted: a resumed run counts the same ones.
                if time.monotonic() - saved > checkpoint_seconds:
                    for name, stepper in steppers.items():
                        place = Place(step, cursor, stepper.scale)
                        checkpoint.save(folders[name], stepper.tensors, place, _facts(stepper.settings), keep)
                    saved = time.monotonic()

        for name, stepper in steppers.items():
            sae = stepper.finish()
            sae.metadata = _metadata(run, stepper.settings)
            sae.statistics = latent_statistics(sae, rows_at[stepper.settings.hook])
            save_sae(sae, folders[name])
            logs[name].finish()
    return list(folders.values())


def _with_matmul(settings: Training, where: torch.device) -> Training:
    matmul = settings.matmul or str(fast_dtype(where)).removeprefix("torch.")
    return dataclasses.replace(settings, matmul=matmul)


def _common(plans: Mapping[str, Training]) -> Training:
    """The first of the plans, once all are seen to agree on what they share. Raises InputError."""
    first, *others = plans.values()
    for other in others:
        for key in SHARED:
            if getattr(other, key) != getattr(first, key):
                raise InputError(
                    f"Dictionaries trained together share {key}: {getattr(first, key)!r} and {getattr(other, key)!r}."
                )
    return first


def _newest_common(folders: list[Path]) -> int:
    """The last step that all have a checkpoint of; 0 when there is none."""
    return max(set.intersection(*(set(checkpoint.steps_of(folder)) for folder in folders)), default=0)


def _scale(source: Activations, order: str) -> float:
    """What rows are multiplied by, so that their mean norm is sqrt(d_in)."""
    if order == "shuffled" and isinstance(source, CachedActivations):
        return scale_of(source.moments)
    return scale_of(source.opening_moments)  # whether or not the other shards are there by now


def _first_rows(batches: Shuffled) -> dict[str, Tensor]:
    """At least 4,096 training rows of each hook to initialise from, in float32, on the CPU."""
    parts: list[dict[str, Tensor]] = []
    for rows, _ in batches.batches():
        parts.append({hook: part.float().cpu() for hook, part in rows.items()})
        if sum(len(next(iter(part.values()))) for part in parts) >= 4096:
            break
    return {hook: torch.cat([part[hook] for part in parts]) for hook in parts[0]}


def _facts(settings: Training) -> dict[str, Any]:
    return {**dataclasses.asdict(settings), "versions": versions(), "threads": torch.get_num_threads()}


def begun_with(folder: Path) -> Training | None:
    """The settings that the dictionary in `folder` was begun with; None when it was not. Raises InputError."""
    path = folder / "train.json"
    if not path.exists():
        return None
    begun = read_json(path)
    known = {field.name: begun[field.name] for field in dataclasses.fields(Training) if field.name in begun}
    try:
        return Training(**{**known, "roles": tuple(known.get("roles", ()))})
    except (TypeError, InputError) as error:
        raise InputError(f"{path} is damaged or of another version ({error}): train with --overwrite.") from None


def _is_finished(folder: Path, settings: Training) -> bool:
    """Compare with what the folder was begun with, or begin it. True when the dictionary is there already."""
    path = folder / "train.json"
    if not path.exists():
        write_json(path, _facts(settings))
        return False
    begun = read_json(path)
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))  # as it reads back: tuples are lists
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
    if all(math.isfinite(value) for value in figures.values()):
        return
    kept = checkpoint.steps_of(folder)
    last = f"Last good checkpoint: {checkpoint.path_of(folder, kept[-1])}" if kept else "There is no checkpoint yet"
    wrong = ", ".join(f"{key}={value:g}" for key, value in figures.items() if not math.isfinite(value))
    raise InputError(f"Training is not finite at step {step} ({wrong}): lower --lr. {last}.")
