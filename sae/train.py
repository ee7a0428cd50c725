"""Training: cached activations in, dictionaries out. `train_together` is the loop, told in order; start reading there.

Exact resume: all state is in the checkpoints (weights, optimiser, counters, the number of steps and a cursor into the
order of the rows); batches and schedules are functions of the seed and those. On a CPU a killed and resumed run ends in
the same bytes.
"""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

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
from sae.stack import Together
from sae.statistics import latent_statistics
from sae.stepper import Stepper

BEGUN = "train.json"
"""All settings of a dictionary, written when its training begins."""
LOG_EVERY = 20
"""Steps between log lines and counts of dead latents: the only times at which the host waits for the device."""
SHARED = ("n_tokens", "batch", "order", "rows_seed", "roles")
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
    )[name or default_name(settings)].folder


class Outcome(NamedTuple):
    """What `train_together` did for one dictionary."""

    folder: Path
    n_tokens: int = 0
    """Rows visited now: 0 when it was finished before, fewer than the settings say when it was resumed."""
    seconds: float = 0.0
    """In which they were, beside the others of its pass."""


def train_together(
    run: Run,
    wanted: Mapping[str, Training],
    *,
    device: str = "auto",
    checkpoint_seconds: float = 60.0,
    keep: int = 2,
    sources: Mapping[str, Activations] | None = None,
    track: Sequence[str] = (),
) -> dict[str, Outcome]:
    """Train dictionaries (ID: settings), those of a hook in one pass over its activations.

    Those that are finished are passed over, begun ones go on from the last checkpoint that they have in common, new
    ones are trained after them. What a dictionary becomes does not depend on those beside it.
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
        unfinished = {name: plan for name, plan in plans.items() if not _is_finished(folders[name], plan)}
        _check_shared(list(unfinished.values()))
        rows_at = dict(sources or {})
        for plan in unfinished.values():
            if plan.hook not in rows_at:
                rows_at[plan.hook] = run.activations(plan.hook, roles=plan.roles)
            plan.config(rows_at[plan.hook].d_in)  # refuses what cannot be
        for source in rows_at.values():
            if isinstance(source, CachedActivations):
                source.check()
        for name, plan in unfinished.items():
            if not (folders[name] / BEGUN).exists():
                write_json(folders[name] / BEGUN, _facts(plan))
        outcomes = {name: Outcome(folder) for name, folder in folders.items()}
        for start, names in _passes(unfinished, folders):
            together = {name: unfinished[name] for name in names}
            source = rows_at[together[names[0]].hook]
            outcomes |= _train_pass(run, together, source, start, where, checkpoint_seconds, keep, track)
    return outcomes


def _train_pass(
    run: Run,
    plans: Mapping[str, Training],
    source: Activations,
    start: int,
    where: torch.device,
    checkpoint_seconds: float,
    keep: int,
    track: Sequence[str],
) -> dict[str, Outcome]:
    """Train dictionaries of one hook from step `start` on, of which all have a checkpoint if it is not 0."""
    folders = {name: run.dictionary(name) for name in plans}
    common = next(iter(plans.values()))
    batches = Shuffled(source, batch=common.batch, seed=common.rows_seed, order=common.order, device=where)
    began = time.monotonic()
    with ExitStack() as stack:
        if start:
            _, cursor, scale = checkpoint.read_place(next(iter(folders.values())), start)
        else:
            cursor, scale = START, _scale(source, common.order)
            first = _first_rows(batches, source.hook) * scale
        steppers: dict[str, Stepper] = {}
        for name, plan in plans.items():
            sae = REGISTRY[plan.architecture].sae(plan.config(source.d_in))
            if not start:
                sae.initialise(first, plan.seed)
            steppers[name] = stepper = Stepper(sae.to(where), plan, scale)
            if start:
                checkpoint.restore(folders[name], start, stepper.tensors)
            stepper.restored(start)
            checkpoint.forget(folders[name], (step for step in checkpoint.steps_of(folders[name]) if step > start))
        together = Together(list(steppers.values()))

        logs = {name: stack.enter_context(closing(Monitor(folders[name], plans[name], start, track))) for name in plans}
        bar = stack.enter_context(closing(Bar(common.n_steps * common.batch, start * common.batch)))
        saved = time.monotonic()
        feed = stack.enter_context(closing(batches.batches(cursor)))
        for step, (rows, cursor) in zip(range(start + 1, common.n_steps + 1), feed, strict=False):
            together.step(rows[source.hook])
            for stepper in steppers.values():
                if stepper.settings.resamples_at(step - 1):
                    stepper.resample(rows[source.hook])
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
                        checkpoint.save(folders[name], stepper.tensors, place, _facts(stepper.settings))
                    for folder in folders.values():  # after all have saved, so that they keep a step in common
                        checkpoint.forget(folder, checkpoint.steps_of(folder)[:-keep])
                    saved = time.monotonic()
        seconds = time.monotonic() - began

        for name, stepper in steppers.items():
            sae = stepper.finish()
            sae.metadata = _metadata(run, stepper.settings)
            sae.statistics = latent_statistics(sae, source)
            save_sae(sae, folders[name])
            logs[name].finish()
    n_tokens = (common.n_steps - start) * common.batch
    return {name: Outcome(folder, n_tokens, seconds) for name, folder in folders.items()}


def _with_matmul(settings: Training, where: torch.device) -> Training:
    matmul = settings.matmul or str(fast_dtype(where)).removeprefix("torch.")
    return dataclasses.replace(settings, matmul=matmul)


def _check_shared(plans: list[Training]) -> None:
    for other in plans[1:]:
        for key in SHARED:
            if getattr(other, key) != getattr(plans[0], key):
                raise InputError(
                    f"Dictionaries trained together share {key}: expected one, not {getattr(plans[0], key)!r} and "
                    f"{getattr(other, key)!r}."
                )


def _passes(plans: Mapping[str, Training], folders: Mapping[str, Path]) -> Iterator[tuple[int, list[str]]]:
    """(step that it goes on from, the dictionaries) of each pass.

    A hook has its own, since which rows are ordinary differs between hooks. At a hook, the step that most of the
    dictionaries have a checkpoint of comes first, of those the newest; new ones are at step 0.
    """
    for hook in dict.fromkeys(plan.hook for plan in plans.values()):
        names = [name for name, plan in plans.items() if plan.hook == hook]
        left = {name: set(checkpoint.steps_of(folders[name])) or {0} for name in names}
        while left:
            counts = Counter(step for steps in left.values() for step in steps)
            start = max(counts, key=lambda step: (counts[step], step))
            there = [name for name in left if start in left[name]]
            yield start, there
            left = {name: steps for name, steps in left.items() if name not in there}


def _scale(source: Activations, order: str) -> float:
    """What rows are multiplied by, so that their mean norm is sqrt(d_in)."""
    if order == "shuffled" and isinstance(source, CachedActivations):
        return scale_of(source.moments)
    return scale_of(source.opening_moments)  # whether or not the other shards are there by now


def _first_rows(batches: Shuffled, hook: str) -> Tensor:
    """At least 4,096 training rows to initialise from, in float32, on the CPU."""
    parts: list[Tensor] = []
    for rows, _ in batches.batches():
        parts.append(rows[hook].float().cpu())
        if sum(map(len, parts)) >= 4096:
            break
    return torch.cat(parts)


def _facts(settings: Training) -> dict[str, Any]:
    return {**dataclasses.asdict(settings), "versions": versions(), "threads": torch.get_num_threads()}


def begun_with(folder: Path) -> Training | None:
    """The settings that the dictionary in `folder` was begun with; None when it was not. Raises InputError."""
    path = folder / BEGUN
    if not path.exists():
        return None
    begun = read_json(path)
    known = {field.name: begun[field.name] for field in dataclasses.fields(Training) if field.name in begun}
    try:
        return Training(**{**known, "roles": tuple(known.get("roles", ()))})
    except (TypeError, InputError) as error:
        raise InputError(f"{path} is damaged or of another version ({error}): train with --overwrite.") from None


def _is_finished(folder: Path, settings: Training) -> bool:
    """True when the dictionary is there already. Raises InputError when it was begun with other settings."""
    if not (folder / BEGUN).exists():
        return False
    begun = read_json(folder / BEGUN)
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
