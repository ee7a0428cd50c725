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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from activations.cache import Activations, CachedActivations
from activations.errors import InputError
from activations.files import lock, read_json, write_json, writing
from activations.joined import Pooled, Several
from activations.model import fast_dtype, pick_device
from activations.run import Run, versions
from activations.shuffle import START, Shuffled
from sae import checkpoint
from sae.base import SAE, FittedSAE, fields_from
from sae.checkpoint import Place
from sae.files import CFG, load_sae, save_sae
from sae.fit import fit
from sae.frozen import FrozenBase
from sae.monitor import Bar, Monitor
from sae.parallel import ALONE, Mesh
from sae.plan import check_memory
from sae.registry import REGISTRY
from sae.rows import columns_of, rows_for, scales_of, width_read
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
    source: Activations | Mapping[str, Activations] | None = None,
    track: Sequence[str] = (),
    mesh: Mesh = ALONE,
) -> Path:
    """Train one dictionary on the run's activations; returns its folder. See `train_together`.

    name: the dictionary's ID, by default `default_name`. source: where the rows come from, in the order "stream": the
    model itself (`LiveActivations`), or a cache that is still growing; by hook where there are several. What is not
    given is the run's complete cache.
    """
    together = {name or default_name(settings): settings}
    sources = {settings.hook: source} if isinstance(source, Activations) else source
    done = train_together(
        run,
        together,
        device=device,
        checkpoint_seconds=checkpoint_seconds,
        keep=keep,
        sources=sources,
        track=track,
        mesh=mesh,
    )
    return done[name or default_name(settings)].folder


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
    mesh: Mesh = ALONE,
) -> dict[str, Outcome]:
    """Train dictionaries (ID: settings), those of a hook in one pass over its activations.

    Those that are finished are passed over, begun ones go on from the last checkpoint that they have in common, new
    ones are trained after them. What a dictionary becomes does not depend on those beside it.
    checkpoint_seconds: time between checkpoints; the last `keep` stay. sources: by hook, as `train` says. track: who
    else draws the curves, "wandb" or "tensorboard". mesh: the processes that train together, each of which calls this;
    the leader writes.
    Raises InputError when activations are missing or damaged, sizes cannot be, a folder holds a dictionary that was
    trained with other settings or cannot be written to, they cannot be trained together or need more memory than is
    free, the disk is full, or a loss is no longer finite. The checkpoints stay, and training goes on from the last one.
    """
    where, ranks = pick_device(device), mesh.ranks
    folders = {name: run.dictionary(name) for name in wanted}
    plans = {name: _with_matmul(settings, where) for name, settings in wanted.items()}
    with ExitStack() as stack:
        stack.enter_context(writing(run.path / "dictionaries"))
        ranks.agree(_described(run, plans))

        def unfinished() -> list[str]:
            for folder in folders.values():
                stack.enter_context(lock(folder / ".train.lock"))
            left = [name for name, plan in plans.items() if not _is_finished(folders[name], plan)]
            _check_shared([plans[name] for name in left])
            return left

        def begin() -> list[tuple[int, list[str]]]:
            passes = list(_passes({name: plan for name, plan in left.items() if name not in fitted}, folders))
            for _, names in [*passes, *((0, [name]) for name in fitted)]:
                cells = [left[name] for name in names]
                d_in = width_read(cells[0], rows_at[cells[0].rows])
                for cell in cells:
                    _check_float8(cell, d_in, where, mesh)
                check_memory(cells, d_in, where, shards=mesh.n_latents, rows=mesh.n_rows)
            for name, plan in left.items():
                if not (folders[name] / BEGUN).exists():
                    write_json(folders[name] / BEGUN, _facts(plan))
            return passes

        left = {name: plans[name] for name in ranks.by_leader(unfinished)}
        rows_at = ranks.together(lambda: _opened(run, left, sources or {}, mesh))
        fitted = [name for name, plan in left.items() if issubclass(REGISTRY[plan.architecture].sae, FittedSAE)]
        passes = ranks.by_leader(begin)
        ranks.together(lambda: _check_one_folder(folders[name] for name in left))
        outcomes = {name: Outcome(folder) for name, folder in folders.items()}
        for name in fitted:
            source = rows_at[left[name].rows]
            outcomes[name] = _fit(run, name, left[name], source, where, checkpoint_seconds, keep, track, mesh)
        for start, names in passes:
            together = {name: left[name] for name in names}
            source = rows_at[together[names[0]].rows]
            outcomes |= _train_pass(run, together, source, start, where, checkpoint_seconds, keep, track, mesh)
        ranks.barrier()  # the files are there for whoever goes on
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
    mesh: Mesh,
) -> dict[str, Outcome]:
    """Train dictionaries of the same rows from step `start` on, of which all have a checkpoint if it is not 0."""
    folders = {name: run.dictionary(name) for name in plans}
    common, ranks = next(iter(plans.values())), mesh.ranks
    batches = Shuffled(
        source,
        batch=common.batch,
        seed=common.rows_seed,
        order=common.order,
        rank=mesh.row,
        world=mesh.n_rows,
        device=where,
    )
    began = time.monotonic()
    with ExitStack() as stack:
        if start:
            folder = next(iter(folders.values()))
            cursor, scales = ranks.by_leader(lambda: checkpoint.read_place(folder, start))[1:]
            scales = scales[: len(source.parts)]
        else:
            cursor, scales = START, tuple(ranks.by_leader(lambda: scales_of(source, common.order)))
        scale = columns_of(source, scales)
        first = None if start else _first_rows(batches, source.hook, mesh) * scale
        steppers: dict[str, Stepper] = {}
        for name, plan in plans.items():
            d_in = width_read(plan, source)
            sae = REGISTRY[plan.architecture].sae(plan.config(d_in), mesh)
            base = _base(run, plan, folders[name], scales[0], first, start)
            if first is not None:
                _initialise(sae, plan.seed, first, base)
            steppers[name] = stepper = Stepper(sae.to(where), plan, scale, base and base.to(where))
            if start:
                ranks.together(partial(checkpoint.restore, folders[name], start, stepper.tensors))
            stepper.restored(start)
            if mesh.leads:
                checkpoint.forget(folders[name], [step for step in checkpoint.steps_of(folders[name]) if step > start])
        together = Together(list(steppers.values()))

        logs = {
            name: stack.enter_context(closing(Monitor(folders[name], plans[name], start, track)))
            for name in plans
            if mesh.leads
        }
        bar = stack.enter_context(closing(Bar(common.n_steps * common.batch, start * common.batch, shown=mesh.leads)))
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
                    _check_finite(figures, step, folders[name], mesh)
                    if mesh.leads:
                        logs[name].line(step, step * common.batch, figures)
                    shown.append({**figures, "dead": stepper.n_dead / stepper.sae.d_sae})
                bar.figures(shown)
                # Only here, where the dead were just counted: a resumed run counts the same ones.
                if ranks.from_leader(time.monotonic() - saved > checkpoint_seconds):
                    for name, stepper in steppers.items():
                        factor = () if stepper.base is None else (stepper.base.factor,)
                        place = Place(step, cursor, (*scales, *factor))
                        checkpoint.save(folders[name], stepper.tensors, place, _facts(stepper.settings), mesh)
                    if mesh.leads:  # after all have saved: a step in common stays
                        for folder in folders.values():
                            checkpoint.forget(folder, checkpoint.steps_of(folder)[:-keep])
                    saved = time.monotonic()
        seconds = time.monotonic() - began

        finished = [stepper.finish() for stepper in steppers.values()]
        for name, sae, statistics in zip(steppers, finished, latent_statistics(finished, source), strict=True):
            sae.metadata, sae.statistics = _metadata(run, plans[name], source), statistics
            save_sae(sae, folders[name])
            if mesh.leads:
                logs[name].finish()
    n_tokens = (common.n_steps - start) * common.batch
    return {name: Outcome(folder, n_tokens, seconds) for name, folder in folders.items()}


def _fit(
    run: Run,
    name: str,
    plan: Training,
    source: Activations,
    where: torch.device,
    checkpoint_seconds: float,
    keep: int,
    track: Sequence[str],
    mesh: Mesh,
) -> Outcome:
    """Fit a dictionary that has no gradient, in a pass of its own."""
    began, folder = time.monotonic(), run.dictionary(name)
    (scale,) = scales_of(source, plan.order)
    empty = REGISTRY[plan.architecture].sae(plan.config(width_read(plan, source)), mesh).to(where)
    assert isinstance(empty, FittedSAE)
    sae, n_tokens = fit(
        empty,
        plan,
        source,
        scale,
        folder,
        _facts(plan),
        checkpoint_seconds=checkpoint_seconds,
        keep=keep,
        track=track,
    )
    sae.metadata, (sae.statistics,) = _metadata(run, plan, source), latent_statistics([sae], source)
    save_sae(sae, folder)
    return Outcome(folder, n_tokens, time.monotonic() - began)


def _initialise(sae: SAE, seed: int, first: Tensor, base: FrozenBase | None) -> None:
    """The first weights. first: rows as the pass has them, scaled: what is read, then what is predicted."""
    x = first[:, : sae.d_in]
    sae.initialise(x, seed)
    if sae.target != "x":
        sae.initialise_output(x, first[:, sae.d_in : sae.d_in + sae.d_out] if base is None else base.error(x))


def _with_matmul(settings: Training, where: torch.device) -> Training:
    matmul = settings.matmul or str(fast_dtype(where)).removeprefix("torch.")
    return dataclasses.replace(settings, matmul=matmul)


def _check_float8(settings: Training, d_in: int, where: torch.device, mesh: Mesh) -> None:
    if settings.matmul != "float8":
        return
    if where.type != "cuda" or torch.cuda.get_device_capability(where) < (8, 9):
        raise InputError('matmul="float8" needs a GPU of compute capability 8.9 or more: take "bfloat16".')
    if d_in % 16 or settings.config(d_in).d_sae % (16 * mesh.n_latents):
        raise InputError(f'matmul="float8" needs multiples of 16: {d_in} and the latents of a process are not.')


def _described(run: Run, plans: Mapping[str, Training]) -> dict[str, Any]:
    """What ranks that train together have in common."""
    facts = {f"the run's {key}": value for key, value in run.meta.items()}
    for i, plan in enumerate(plans.values()):
        facts |= {key if i == 0 else f"{key} of dictionary {i}": v for key, v in dataclasses.asdict(plan).items()}
    return {**facts, "dictionaries": list(plans)}


def _check_shared(plans: list[Training]) -> None:
    for other in plans[1:]:
        for key in SHARED:
            if getattr(other, key) != getattr(plans[0], key):
                raise InputError(
                    f"Dictionaries trained together share {key}: expected one, not {getattr(plans[0], key)!r} and "
                    f"{getattr(other, key)!r}."
                )


def _opened(
    run: Run, plans: Mapping[str, Training], sources: Mapping[str, Activations], mesh: Mesh
) -> dict[str, Activations]:
    """The rows of each pass by `Training.rows`, once all sizes are seen to fit. Raises InputError."""
    rows_at: dict[str, Activations] = {}
    for plan in plans.values():
        if plan.rows not in rows_at:
            at = partial(_at, run, sources, plan.roles)
            rows_at[plan.rows] = rows_for(plan, at)
        held = mesh.part(plan.config(width_read(plan, rows_at[plan.rows])).d_sae)
        n_held = held.stop - held.start
        if plan.largest_k > n_held:
            raise InputError(
                f"k={plan.largest_k:g} is more than the {n_held} latents of a part: share them between fewer GPUs."
            )
        if plan.batch % mesh.n_rows:
            raise InputError(f"A batch of {plan.batch} rows cannot be shared by {mesh.n_rows} ranks: change --batch.")
    checked = {id(each): each for source in rows_at.values() for each in _caches(source)}
    for each in checked.values():
        if isinstance(each, CachedActivations):
            each.check()
    return rows_at


def _caches(rows: Activations) -> list[Activations]:
    return rows.sources if isinstance(rows, Several) else [rows]


def _at(run: Run, sources: Mapping[str, Activations], roles: Sequence[str], hook: str) -> Activations:
    return sources[hook] if hook in sources else run.activations(hook, roles=roles)


def _base(run: Run, plan: Training, folder: Path, scale: float, first: Tensor | None, start: int) -> FrozenBase | None:
    """Of a boost in `folder`; from step `start` on, or with the first rows, scaled. Raises InputError."""
    if plan.base is None:
        return None
    sae = load_sae(run.dictionary(plan.base))
    if (hook := sae.only_hook("A boost")) != plan.hook:
        raise InputError(f"{plan.base} is a dictionary of {hook}: expected one of {plan.hook}.")
    if first is None:
        return FrozenBase(sae, scale, checkpoint.read_place(folder, start).scales[-1])
    return FrozenBase(sae, scale, x=first)


def _check_one_folder(folders: Iterable[Path]) -> None:
    for folder in folders:
        if not (folder / BEGUN).exists():  # the leader has just made it
            raise InputError(f"{folder} is not one folder for all ranks: put the run on a disk that every host sees.")


def _passes(plans: Mapping[str, Training], folders: Mapping[str, Path]) -> Iterator[tuple[int, list[str]]]:
    """(step that it goes on from, the dictionaries) of each pass.

    Each make of rows has its own, since which are ordinary differs between hooks. In it, the step that most of the
    dictionaries have a checkpoint of comes first, of those the newest; new ones are at step 0.
    """
    for rows in dict.fromkeys(plan.rows for plan in plans.values()):
        names = [name for name, plan in plans.items() if plan.rows == rows]
        left = {name: set(checkpoint.steps_of(folders[name])) or {0} for name in names}
        while left:
            counts = Counter(step for steps in left.values() for step in steps)
            start = max(counts, key=lambda step: (counts[step], step))
            there = [name for name in left if start in left[name]]
            yield start, there
            left = {name: steps for name, steps in left.items() if name not in there}


def _first_rows(batches: Shuffled, hook: str, mesh: Mesh) -> Tensor:
    """At least 4,096 training rows to initialise from, in float32, on the CPU; the same on all ranks."""
    parts: list[Tensor] = []
    for rows, _ in batches.batches():
        parts.append(mesh.all_rows(rows[hook].float().cpu()))
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
        return Training(**fields_from(known))
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


def _metadata(run: Run, settings: Training, rows: Activations) -> dict[str, Any]:
    known: dict[str, Any] = {
        "model_name": run.meta["model"],
        "model_revision": run.meta["revision"],
        "hook_name": settings.hook,
        "dataset_path": run.meta["corpus"],
        "context_size": run.meta["context"],
        "prepend_bos": False,
        "sae_workbench_version": run.meta.get("sae-workbench", ""),
    }
    if isinstance(rows, CachedActivations) and rows.heads:
        known["heads"] = rows.heads
    if settings.hooks:
        known["hook_names"] = list(settings.hooks)
    if isinstance(rows, Pooled):
        known["hook_factors"] = rows.factors
    if settings.target_hooks:
        known |= {"hook_name_out": settings.target_hooks[0], "hook_names_out": list(settings.target_hooks)}
    if settings.base is not None:
        known["base"] = settings.base
    return known


def _check_finite(figures: dict[str, float], step: int, folder: Path, mesh: Mesh) -> None:
    if all(math.isfinite(value) for value in figures.values()):
        return
    if not mesh.leads:  # the figures are the same everywhere
        raise SystemExit(1)
    kept = checkpoint.steps_of(folder)
    last = f"Last good checkpoint: {checkpoint.path_of(folder, kept[-1])}" if kept else "There is no checkpoint yet"
    wrong = ", ".join(f"{key}={value:g}" for key, value in figures.items() if not math.isfinite(value))
    raise InputError(f"Training is not finite at step {step} ({wrong}): lower --lr. {last}.")
