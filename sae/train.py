"""Training: cached activations in, dictionaries out. `train_together` is the loop, told in order; start reading there.

Exact resume: all state is in the checkpoints (weights, optimiser, counters, the number of steps and a cursor into the
order of the rows); batches and schedules are functions of the seed and those. On a CPU a killed and resumed run ends in
the same bytes.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.cache import Activations, CachedActivations, scale_of
from activations.errors import InputError
from activations.files import lock, read_json, write_json
from activations.model import fast_dtype, pick_device
from activations.run import Run, versions
from activations.shuffle import START, Shuffled
from sae import checkpoint
from sae.checkpoint import Place
from sae.files import CFG, save_sae
from sae.monitor import Monitor, progress
from sae.parallel import ALONE, Mesh
from sae.registry import REGISTRY
from sae.settings import Training, default_name
from sae.statistics import latent_statistics
from sae.stepper import Stepper

BEGUN = "train.json"
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
    mesh: Mesh = ALONE,
) -> Path:
    """Train one dictionary on the run's activations; returns its folder. See `train_together`.

    name: the dictionary's ID, by default `default_name`. source: where the rows come from, in the order "stream": the
    model itself (`LiveActivations`), or a cache that is still growing; None takes the run's complete cache.
    """
    together = {name or default_name(settings): settings}
    sources = None if source is None else {settings.hook: source}
    return train_together(
        run, together, device=device, checkpoint_seconds=checkpoint_seconds, keep=keep, sources=sources, mesh=mesh
    )[0]


def train_together(
    run: Run,
    wanted: Mapping[str, Training],
    *,
    device: str = "auto",
    checkpoint_seconds: float = 60.0,
    keep: int = 2,
    sources: Mapping[str, Activations] | None = None,
    mesh: Mesh = ALONE,
) -> list[Path]:
    """Train dictionaries (ID: settings) in one pass over the activations; returns their folders.

    Each goes on from the last checkpoint that all of them have; those that are finished are passed over.
    checkpoint_seconds: time between checkpoints; the last `keep` stay. sources: by hook, as `train` says. mesh:
    the processes that train together, each of which calls this; the leader writes.
    Raises InputError when activations are missing or damaged, sizes cannot be, a folder holds a dictionary that was
    trained with other settings, they cannot be trained together, or a loss is no longer finite.
    """
    where = pick_device(device)
    folders = {name: run.dictionary(name) for name in wanted}
    ranks = mesh.ranks
    with ExitStack() as stack:
        plans = {name: _with_matmul(settings, where) for name, settings in wanted.items()}
        ranks.agree(_described(run, plans))

        def unfinished() -> list[str]:
            for folder in folders.values():
                stack.enter_context(lock(folder / ".train.lock"))
            return [name for name, plan in plans.items() if not _is_finished(folders[name], plan)]

        left = ranks.by_leader(unfinished)
        plans = {name: plans[name] for name in left}
        if not plans:
            return list(folders.values())
        common = _common(plans)
        rows_at, batches = ranks.together(lambda: _opened(run, plans, sources or {}, where, mesh))
        start = ranks.by_leader(lambda: _newest_common([folders[name] for name in plans]))
        places = ranks.by_leader(lambda: {name: checkpoint.read_place(folders[name], start) for name in plans if start})
        first = {} if start else _first_rows(batches, mesh)
        steppers: dict[str, Stepper] = {}
        for name, plan in plans.items():
            source = rows_at[plan.hook]
            scale = places[name].scale if start else ranks.by_leader(partial(_scale, source, plan.order))
            sae = REGISTRY[plan.architecture].sae(plan.config(source.d_in), mesh)
            if not start:
                sae.initialise(first[plan.hook] * scale, plan.seed)
            steppers[name] = stepper = Stepper(sae.to(where), plan, scale)
            if start:
                ranks.together(partial(checkpoint.restore, folders[name], start, stepper.tensors))
            stepper.restored(start)
        cursor = next(iter(places.values())).cursor if start else START

        logs = {name: stack.enter_context(closing(Monitor(folders[name], start))) for name in plans if mesh.leads}
        bar = stack.enter_context(progress(common.n_tokens, start * common.batch, shown=mesh.leads))
        saved = time.monotonic()
        feed = stack.enter_context(closing(batches.batches(cursor)))
        for step, (rows, cursor) in zip(range(start + 1, common.n_steps + 1), feed, strict=False):
            for stepper in steppers.values():
                stepper.step(rows[stepper.settings.hook])
                if stepper.settings.resamples_at(step - 1):
                    stepper.resample(rows[stepper.settings.hook])
            bar.update(common.batch)

            if step % LOG_EVERY == 0 or step == common.n_steps:
                for name, stepper in steppers.items():
                    stepper.recount()
                    figures = stepper.figures()
                    _check_finite(figures, step, folders[name], mesh)
                    if mesh.leads:
                        logs[name].line(step, step * common.batch, figures)
                bar.set_postfix(fvu=f"{figures['fvu']:.3f}", l0=f"{figures['l0']:.1f}", dead=int(figures["n_dead"]))
                # Only here, where the dead were just counted: a resumed run counts the same ones.
                if ranks.from_leader(time.monotonic() - saved > checkpoint_seconds):
                    for name, stepper in steppers.items():
                        place = Place(step, cursor, stepper.scale)
                        checkpoint.save(folders[name], stepper.tensors, place, _facts(stepper.settings), keep, mesh)
                    saved = time.monotonic()

        for name, stepper in steppers.items():
            sae = stepper.finish()
            sae.metadata = _metadata(run, stepper.settings)
            sae.statistics = latent_statistics(sae, rows_at[stepper.settings.hook])
            save_sae(sae, folders[name])
        ranks.barrier()  # the files are there for whoever goes on
    return list(folders.values())


def _with_matmul(settings: Training, where: torch.device) -> Training:
    matmul = settings.matmul or str(fast_dtype(where)).removeprefix("torch.")
    return dataclasses.replace(settings, matmul=matmul)


def _described(run: Run, plans: Mapping[str, Training]) -> dict[str, Any]:
    """What ranks that train together have in common."""
    facts = {f"the run's {key}": value for key, value in run.meta.items()}
    for i, plan in enumerate(plans.values()):
        facts |= {key if i == 0 else f"{key} of dictionary {i}": v for key, v in dataclasses.asdict(plan).items()}
    return {**facts, "dictionaries": list(plans)}


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


def _opened(
    run: Run, plans: Mapping[str, Training], sources: Mapping[str, Activations], where: torch.device, mesh: Mesh
) -> tuple[dict[str, Activations], Shuffled]:
    """The rows at each hook, and their batches, once all sizes are seen to fit. Raises InputError."""
    common = _common(plans)
    hooks = dict.fromkeys(plan.hook for plan in plans.values())
    rows_at = {hook: sources.get(hook) or run.activations(hook, roles=common.roles) for hook in hooks}
    for source in rows_at.values():
        if isinstance(source, CachedActivations):
            source.check()
    for name, plan in plans.items():
        held = mesh.part(plan.config(rows_at[plan.hook].d_in).d_sae)
        if (k := max(plan.sizes.get("k", 0), plan.k_from or 0)) > held.stop - held.start:
            raise InputError(
                f"k={k} is more than the {held.stop - held.start} latents of a part: share them between fewer GPUs."
            )
        if not (run.dictionary(name) / BEGUN).exists():  # the leader has just made it
            raise InputError(f"{run.path} is not one folder for all ranks: put it on a disk that every host sees.")
    return rows_at, Shuffled(
        list(rows_at.values()),
        batch=common.batch,
        seed=common.seed if common.order_seed is None else common.order_seed,
        order=common.order,
        rank=mesh.row,
        world=mesh.n_rows,
        device=where,
    )


def _newest_common(folders: list[Path]) -> int:
    """The last step that all have a checkpoint of; 0 when there is none."""
    return max(set.intersection(*(set(checkpoint.steps_of(folder)) for folder in folders)), default=0)


def _scale(source: Activations, order: str) -> float:
    """What rows are multiplied by, so that their mean norm is sqrt(d_in)."""
    if order == "shuffled" and isinstance(source, CachedActivations):
        return scale_of(source.moments)
    return scale_of(source.opening_moments)  # whether or not the other shards are there by now


def _first_rows(batches: Shuffled, mesh: Mesh) -> dict[str, Tensor]:
    """At least 4,096 training rows of each hook to initialise from, in float32, on the CPU; the same on all ranks."""
    parts: list[dict[str, Tensor]] = []
    for rows, _ in batches.batches():
        parts.append({hook: mesh.all_rows(part.float().cpu()) for hook, part in rows.items()})
        if sum(len(next(iter(part.values()))) for part in parts) >= 4096:
            break
    return {hook: torch.cat([part[hook] for part in parts]) for hook in parts[0]}


def _facts(settings: Training) -> dict[str, Any]:
    return {**dataclasses.asdict(settings), "versions": versions(), "threads": torch.get_num_threads()}


def _is_finished(folder: Path, settings: Training) -> bool:
    """Compare with what the folder was begun with, or begin it. True when the dictionary is there already."""
    path = folder / BEGUN
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


def _check_finite(figures: dict[str, float], step: int, folder: Path, mesh: Mesh) -> None:
    if all(math.isfinite(value) for value in figures.values()):
        return
    if not mesh.leads:  # the figures are the same everywhere
        raise SystemExit(1)
    kept = checkpoint.steps_of(folder)
    last = f"Last good checkpoint: {checkpoint.path_of(folder, kept[-1])}" if kept else "There is no checkpoint yet"
    wrong = ", ".join(f"{key}={value:g}" for key, value in figures.items() if not math.isfinite(value))
    raise InputError(f"Training is not finite at step {step} ({wrong}): lower --lr. {last}.")
