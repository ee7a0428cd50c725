"""What a collect, a train or a sweep will take, said before it starts: `sae plan`, for notebooks too.

On the machine at hand the thing itself is timed: a few real steps at the real size, a few real sequences through the
real model to the same disk. For a machine that is not at hand its built-in rates stand in, and each figure says so.
"""

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from activations.cache import CachedActivations, scale_of, training_mask
from activations.capture import MEMORY, ROWS_PER_SHARD, STORED, collect, row_bytes
from activations.errors import InputError
from activations.forward import ROWS_PER_BATCH, widths
from activations.hooks import resolve
from activations.machine import BUILT_IN, MEASURED, Machine, built_in, free_disk, memory_of, this_machine
from activations.model import Model, load_model, pick_device
from activations.run import Run
from activations.writer import MOST_SETS, SETS
from app.pipeline import middle_hook, only_hook
from app.recipe import Recipe, hooks_of, training
from app.sources import Text
from sae.calibrate import ENCODE_ROWS, StepTime, random_rows, step_time
from sae.plan import (
    DEAD,
    FILLED,
    STATISTICS_TOKENS,
    checkpoint_bytes,
    checkpoint_count,
    dictionary_bytes,
    memory,
    needed_gpus,
    step_seconds,
)
from sae.registry import REGISTRY
from sae.settings import Training

COUNTED, FITTED = "counted", "fitted"
HERE = "here"
HELD_OUT = 1 / 20
MODEL_RATE = 0.4
"""Share of a GPU's product rate that a language model's forward pass is taken to reach where it cannot be timed."""
TOKEN_BYTES = 2.1
_TRIAL_SECONDS = 2.0
_SHARED = ("token visits", "tokens to train on", "epochs", "memory free", "memory of a GPU", "GPUs", "disk free")
_IF_DEAD = f"time if {DEAD:.0%} of latents die"
CHECKPOINT_COPIES = 1
"""Checkpoints on disk beside those that are kept: the one being written."""


class Figure(NamedTuple):
    """One number of a plan."""

    value: float
    unit: str
    """"bytes", "seconds", "hours" or "" for a count."""
    basis: str
    """What it rests on: "counted" (follows from the settings), "measured", "fitted" (measured at smaller widths) or
    "built-in" (rates of a machine that is not at hand)."""


@dataclass
class Plan:
    """Figures by name, in the order in which they are shown, and what else is to be said."""

    what: str
    machine: str
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, basis: str) -> None:
        self.figures[name] = Figure(value, unit, basis)

    def __getitem__(self, name: str) -> float:
        return self.figures[name].value


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the work will be done. gpus, gpu_memory: None takes as few as hold it, and what the machine has."""

    machine: str = HERE
    device: str = "auto"
    gpus: int | None = None
    gpu_memory: int | None = None
    again: bool = False
    """Measure the machine's rates anew."""

    def resolve(self, folder: Path) -> Machine:
        """Raises InputError for an unknown machine, and for GPUs where there are none."""
        if self.machine != HERE:
            return built_in(self.machine)
        device = pick_device(self.device)
        if device.type == "cpu" and (self.gpus or 1) > 1:
            raise InputError(f"--gpus {self.gpus}, but this machine has none in use: give --machine h100, or --gpus 1.")
        return this_machine(device, _beside(folder), again=self.again)


def plan_train(
    run: Path | None,
    *,
    place: Place,
    keep: int = 2,
    d_in: int | None = None,
    model: str | None = None,
    **recipe: Unpack[Recipe],
) -> Plan:
    """What `sae train` by the same recipe will take. Without a run: its d_in, or the model whose width it is.

    Raises InputError.
    """
    start = time.process_time()  # of this process: what Python, torch and transformers take to be imported
    opened = Run.open(run) if run is not None and d_in is None and model is None else None
    hooks, cache = hooks_of(recipe), None
    if len(hooks) > 1 or "target_hook" in recipe or "base" in recipe:
        raise InputError("A plan is for a dictionary that reads and gives back one hook: leave out the others.")
    hook = hooks[0] if hooks else "hook"
    if opened is not None:
        hook = hooks[0] if hooks else only_hook(opened)
        if not recipe.get("live") or hook in opened.hooks():
            cache = opened.activations(hook, roles=recipe.get("roles", ()))
        else:
            model = opened.model_name
    width = cache.d_in if cache is not None else d_in or (_width(model) if model else None)
    if width is None:
        raise InputError("Nothing says how wide the activations are: give RUN, --d-in or --model.")
    settings = [training(recipe, hook=hook, d_in=width)]
    plan = _plan(settings, width, cache, place=place, keep=keep, folder=run, start=start)
    if cache is None:
        plan.notes.append("The time of the language model that makes the activations is not in it.")
    return plan


def plan_sweep(
    run: Path | None,
    file: Path,
    *,
    place: Place,
    keep: int = 2,
    d_in: int | None = None,
    model: str | None = None,
) -> Plan:
    """What `sae sweep` will take: the cells of `file`, those of a hook trained in one pass. Raises InputError."""
    from app.sweep import read_cells

    start = time.process_time()
    opened = Run.open(run) if run is not None and d_in is None and model is None else None
    width = d_in or (_width(model) if model else None)
    if opened is None and width is None:
        raise InputError("Nothing says how wide the activations are: give RUN, --d-in or --model.")
    cells = list(read_cells(file, opened, d_in=width).values())
    plans = []
    if any(cell.rows != cell.hook for cell in cells):
        raise InputError("A plan is for dictionaries that read and give back one hook: leave out the others.")
    for hook in dict.fromkeys(cell.hook for cell in cells):
        here = [cell for cell in cells if cell.hook == hook]
        cache = opened.activations(hook, roles=here[0].roles) if opened is not None else None
        d_in = cache.d_in if cache is not None else width
        assert d_in is not None
        plans.append(_plan(here, d_in, cache, place=place, keep=keep, folder=run, start=start))
        start = time.process_time()
    return _sum(plans) if len(plans) > 1 else plans[0]


def _plan(
    settings: Sequence[Training],
    d_in: int,
    cache: CachedActivations | None,
    *,
    place: Place,
    keep: int,
    folder: Path | None,
    start: float,
) -> Plan:
    """Of dictionaries that are trained together. start: seconds that this process had taken before."""
    folder = folder or Path.cwd() / "run"
    machine = place.resolve(folder)
    plan = Plan(_title(settings, d_in), machine.name)
    tokens = max(each.n_tokens for each in settings)
    plan.add("steps", sum(each.n_steps for each in settings), "", COUNTED)
    plan.add("token visits", tokens, "", COUNTED)
    if cache is not None:
        trained = cache.n_ordinary * (1 - HELD_OUT)
        plan.add("tokens to train on", trained, "", COUNTED)
        plan.add("epochs", tokens / max(trained, 1), "", COUNTED)
    gpus = _plan_memory(plan, settings, d_in, machine, place, cache)
    times = None
    if place.machine == HERE:
        try:
            times = _time(settings, d_in, pick_device(place.device), cache)
        except InputError as error:
            plan.notes.append(f"No step could be timed: {error}")
    if times is None:
        _plan_by_rates(plan, settings, d_in, machine, gpus)
        _suggest_batch(plan, settings, d_in, machine, place)
    else:
        _plan_by_steps(plan, settings, d_in, machine, gpus, times, cache, start)
    _plan_disk(plan, settings, d_in, keep, cache, folder)
    return plan


def _sum(plans: Sequence[Plan]) -> Plan:
    """Dictionaries at several hooks as one plan: sums, but for what is one and the same."""
    first, *others = plans
    whole = Plan(" + ".join(plan.what for plan in plans), first.machine)
    for name, figure in first.figures.items():
        values = [plan[name] for plan in plans if name in plan.figures]
        value = max(values) if name in _SHARED else sum(values)
        if name == "disk left":
            value = first["disk free"] - sum(first["disk free"] - left for left in values)
        if name == "time a step":
            value = sum(plan[name] * plan["steps"] for plan in plans) / whole["steps"]
        whole.figures[name] = figure._replace(value=value)
    whole.notes = list(dict.fromkeys(note for plan in (first, *others) for note in plan.notes))
    return whole


def plan_collect(
    run: Path | None,
    source: Text,
    *,
    place: Place,
    model: str = "smollm2-135m-instruct",
    hooks: Sequence[str] = (),
    dtype: str = "bfloat16",
    model_dtype: str | None = None,
    gradients: bool = False,
    memory: int = MEMORY,
) -> Plan:
    """What `sae collect` with the same options will take. Raises InputError, CorpusError.

    Here a few sequences go through the model to a folder beside the run, which is removed.
    """
    if dtype not in STORED:
        raise InputError(f"dtype {dtype!r} is unknown: expected one of {', '.join(STORED)}.")
    start = time.process_time()
    folder = run or Path.cwd() / "run"
    machine = place.resolve(folder)
    n_tokens = source.tokens // source.length * source.length
    began = time.perf_counter()
    loaded = load_model(model, dtype=model_dtype, device=place.device) if place.machine == HERE else _outline(model)
    start += time.perf_counter() - began
    chosen = list(dict.fromkeys(hooks)) or [middle_hook(loaded)]
    for hook in chosen:
        resolve(loaded.hf, hook)
    width = widths(loaded, chosen) if place.machine == HERE else {hook: _width_at(loaded, hook) for hook in chosen}
    each = sum(row_bytes(width[hook], dtype, gradients=gradients) for hook in chosen)
    plan = Plan(f"{model} at {', '.join(chosen)}, {n_tokens:,} tokens of {source.corpus}", machine.name)
    plan.add("tokens", n_tokens, "", COUNTED)
    gpus = place.gpus or 1
    if place.machine == HERE:
        seconds, fixed, peak = _try_collect(loaded, chosen, source, folder, dtype=dtype, gradients=gradients)
        plan.add("tokens a second", gpus / seconds, "", MEASURED)
        plan.add("time", start + fixed + seconds * n_tokens / gpus, "seconds", MEASURED)
        basis = MEASURED
    else:
        compute = _forward_flops(loaded, chosen, source.length) / (MODEL_RATE * machine.matmul["bfloat16"] * gpus)
        seconds = max(compute * (3 if gradients else 1), each / machine.write)
        peak = 2 * sum(p.numel() for p in loaded.hf.parameters())
        plan.add("tokens a second", 1 / seconds, "", BUILT_IN)
        plan.add("time", seconds * n_tokens, "seconds", BUILT_IN)
        limit = "the model" if compute * machine.write > each else "the disk"
        plan.notes.append(
            f"What limits it is {limit}; the model is taken to reach {MODEL_RATE:.0%} of the product rate."
        )
        basis = BUILT_IN
    if machine.kind == "cuda":
        plan.add("GPUs", gpus, "", COUNTED)
        plan.add("GPU-hours", gpus * plan["time"] / 3600, "hours", basis)
    rows = min(ROWS_PER_SHARD, max(memory // (SETS * each), 1))
    shards = max(min(n_tokens // rows + 1, memory // (rows * each), MOST_SETS), 1)
    plan.add("memory", peak + min(shards * rows, n_tokens) * each, "bytes", basis)
    need = n_tokens * (each + TOKEN_BYTES)
    plan.add("activations on disk", need, "bytes", COUNTED)
    _left(plan, need, folder)
    return plan


def describe(plan: Plan) -> str:
    """A short table for people."""
    rows = [(name, _text(figure), figure.basis) for name, figure in plan.figures.items()]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{plan.what}, on {plan.machine}"]
    lines += [f"  {name:<{first}}  {value:>{second}}  {basis}" for name, value, basis in rows]
    return "\n".join([*lines, *plan.notes])


def _plan_memory(
    plan: Plan,
    settings: Sequence[Training],
    d_in: int,
    machine: Machine,
    place: Place,
    cache: CachedActivations | None,
) -> int:
    """Memory a device, and how many share the dictionary."""
    cached = {"row_bytes": cache.row_bytes, "cached_rows": cache.n_rows} if cache is not None else {}
    if machine.kind == "cpu":
        need = memory(settings, d_in, "cpu", **cached).total
        free, there = memory_of(torch.device("cpu"))
        plan.add("memory", need, "bytes", COUNTED)
        plan.add("memory free", free, "bytes", MEASURED)
        if need > free:
            plan.notes.append(
                f"It does not fit: it takes {need / 1e9:.1f} GB and {free / 1e9:.1f} of {there / 1e9:.1f} GB are free."
            )
        return 1
    each = place.gpu_memory or machine.memory
    fewest = needed_gpus(settings, d_in, each)
    gpus = place.gpus or fewest
    plan.add("GPUs", gpus, "", COUNTED)
    need = memory(settings, d_in, "cuda", shards=gpus).total
    plan.add("memory a GPU", need, "bytes", COUNTED)
    plan.add("memory of a GPU", each, "bytes", MEASURED if machine.source == MEASURED else BUILT_IN)
    if gpus < fewest:
        plan.notes.append(f"It does not fit {gpus} GPUs (filled to {FILLED:.0%}): it takes {fewest}.")
    if gpus > 1:
        d_sae = max(int(each.sizes["d_sae"]) for each in settings)
        hosts = -(-gpus // machine.per_host)
        text = f"{hosts} hosts of {machine.per_host}" if hosts > 1 else "one host"
        plan.notes.append(f"Cut by latents over {gpus} GPUs ({text}): {-(-d_sae // gpus):,} latents each.")
    return gpus


def _plan_by_rates(plan: Plan, settings: Sequence[Training], d_in: int, machine: Machine, gpus: int) -> None:
    parts: dict[str, float] = {}
    total_dead = 0.0
    for each in settings:
        for name, seconds in step_seconds(each, d_in, machine, gpus).of.items():
            parts[name] = parts.get(name, 0.0) + each.n_steps * seconds
        total_dead += each.n_steps * step_seconds(each, d_in, machine, gpus, DEAD).total
    total, n = sum(parts.values()), sum(each.n_steps for each in settings)
    plan.add("time a step", total / n, "seconds", machine.source)
    _plan_time(plan, total, machine, gpus, machine.source)
    if total_dead > 1.02 * total:
        plan.add(_IF_DEAD, total_dead, "seconds", machine.source)
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())
    plan.notes.append(f"A step: {shares}. By rates, nothing overlapped.")


def _suggest_batch(plan: Plan, settings: Sequence[Training], d_in: int, machine: Machine, place: Place) -> None:
    """Say which batch would cost least: a small one moves all weights for few rows, a large one takes memory."""
    if place.gpus is not None or machine.kind != "cuda":
        return
    costs: dict[int, tuple[float, int]] = {}
    for power in range(10, 21):
        batch = 1 << power
        try:
            scaled = [replace(each, batch=batch) for each in settings]
            gpus = needed_gpus(scaled, d_in, place.gpu_memory or machine.memory)
        except InputError:  # more than the tokens, or than memory holds
            break
        seconds = sum(each.n_steps * step_seconds(each, d_in, machine, gpus).total for each in scaled)
        costs[batch] = (gpus * seconds / 3600, gpus)
    if not costs:
        return
    best = min(costs, key=lambda batch: costs[batch][0])
    hours, gpus = costs[best]
    if hours < 0.8 * plan["GPU-hours"]:
        plan.notes.append(f"With --batch {best} it would take {hours:,.0f} GPU-hours on {gpus} GPUs.")


def _plan_by_steps(
    plan: Plan,
    settings: Sequence[Training],
    d_in: int,
    machine: Machine,
    gpus: int,
    times: Sequence[StepTime],
    cache: CachedActivations | None,
    start: float,
) -> None:
    basis = FITTED if any(took.basis == FITTED for took in times) else MEASURED
    ordinary = min(cache.n_ordinary, STATISTICS_TOKENS) if cache is not None else STATISTICS_TOKENS
    steps = steps_dead = ends = 0.0
    for each, took in zip(settings, times, strict=True):
        shared = 1.0
        if gpus > 1:
            shared = step_seconds(each, d_in, machine, gpus).total / step_seconds(each, d_in, machine).total
            basis = FITTED
        alive = each.dead_after / each.n_tokens  # until then no latent can be dead
        steps += each.n_steps * took.step * shared
        steps_dead += each.n_steps * shared * (alive * took.step + (1 - alive) * took.step_dead)
        ends += took.initialise + ordinary / ENCODE_ROWS * took.encode + dictionary_bytes(each, d_in) / machine.write
    if cache is not None:
        stored = cache.n_rows * row_bytes(d_in, cache.dtype, gradients=cache.has_gradients)
        ends += stored / machine.hash + 2 * cache.n_rows * cache.row_bytes / machine.copy
    written = checkpoint_count(steps) * sum(checkpoint_bytes(each, d_in) for each in settings) / machine.write
    n = sum(each.n_steps for each in settings)
    plan.add("time a step", steps / n, "seconds", basis)
    total = start + steps + written + ends
    _plan_time(plan, total, machine, gpus, basis)
    if steps_dead > 1.02 * steps:
        plan.add(_IF_DEAD, total + steps_dead - steps, "seconds", basis)


def _plan_time(plan: Plan, seconds: float, machine: Machine, gpus: int, basis: str) -> None:
    plan.add("time", seconds, "seconds", basis)
    if machine.kind == "cuda":
        plan.add("GPU-hours", gpus * seconds / 3600, "hours", basis)


def _plan_disk(
    plan: Plan, settings: Sequence[Training], d_in: int, keep: int, cache: CachedActivations | None, folder: Path
) -> None:
    checkpoint = sum(checkpoint_bytes(each, d_in) for each in settings)
    made = sum(dictionary_bytes(each, d_in) for each in settings)
    plan.add("a checkpoint", checkpoint, "bytes", COUNTED)
    plan.add(f"checkpoints (the last {keep})", keep * checkpoint, "bytes", COUNTED)
    plan.add("dictionaries on disk" if len(settings) > 1 else "dictionary on disk", made, "bytes", COUNTED)
    need = (keep + CHECKPOINT_COPIES) * checkpoint + made
    if cache is None:
        tokens = max(each.n_tokens for each in settings)
        cached = tokens * (row_bytes(d_in, "bfloat16", gradients=False) + TOKEN_BYTES)
        plan.add("activations if cached", cached, "bytes", COUNTED)
        if cached + need > free_disk(folder):
            plan.notes.append(
                f"The activations of {tokens:,} tokens do not fit the disk: stream them (sae train --live), or visit "
                "fewer tokens several times."
            )
    _left(plan, need, folder)


def _left(plan: Plan, need: float, folder: Path) -> None:
    free = free_disk(folder)
    plan.add("disk free", free, "bytes", MEASURED)
    plan.add("disk left", free - need, "bytes", MEASURED)
    if need > free:
        plan.notes.append(f"The disk is too small: {need / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB are free.")


def _time(
    settings: Sequence[Training], d_in: int, device: torch.device, cache: CachedActivations | None
) -> list[StepTime]:
    """The step of each cell; equal ones are timed once."""
    rows = _some_rows(cache) if cache is not None else random_rows(d_in)
    done: dict[Any, StepTime] = {}
    for each in settings:
        key = (each.architecture, each.batch, tuple(each.sizes.items()))
        if key not in done:
            done[key] = step_time(each, d_in, device, rows)
    return [done[each.architecture, each.batch, tuple(each.sizes.items())] for each in settings]


def _some_rows(cache: CachedActivations) -> Tensor:
    rows = cache.rows(0)[training_mask(cache, 0)]
    return (rows.float() * scale_of(cache.moments)).to(rows.dtype)


def _try_collect(
    model: Model, hooks: Sequence[str], source: Text, folder: Path, *, dtype: str, gradients: bool
) -> tuple[float, float, int]:
    """(seconds a token, seconds a run, peak bytes of memory) of real captures of a little of the source."""
    n = ROWS_PER_BATCH[model.device.type] // (4 if gradients else 1)
    n = min(max(n // source.length, 1) * source.length, source.tokens)

    def once(n: int, path: Path) -> float:
        part = replace(source, tokens=n)
        began = time.perf_counter()
        facts = {"model": model.name, "revision": model.revision, "model_dtype": "", **part.identity}
        run, categories = Run.create(path, **facts), part.categories()
        sequences = part.sequences(model, categories, lambda _: None)
        collect(run, model, hooks, sequences, dtype=dtype, gradients=gradients, categories=categories)
        took = time.perf_counter() - began
        shutil.rmtree(path)
        return took

    with tempfile.TemporaryDirectory(prefix=".plan-", dir=_beside(folder)) as name:
        path = Path(name) / "trial"
        once(n, path)
        few, more = once(n, path), min(4 * n, source.tokens)
        many = once(more, path)
        while many < _TRIAL_SECONDS and more < source.tokens:
            more = min(4 * more, source.tokens)
            many = once(more, path)
    slope = (many - few) / (more - n) if many > few and more > n else many / more
    fixed = max(few - slope * n, 0.0)
    if model.device.type == "cuda":
        return slope, fixed, torch.cuda.max_memory_allocated(model.device)
    return slope, fixed, _peak_memory()


def _peak_memory() -> int:
    """Most bytes that this process has held."""
    import resource
    import sys

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10


def _outline(name: str) -> Model:
    """A model's modules without its weights. Raises InputError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _source(name)
    try:
        config = _config(name)
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
        return Model(name, "outline", hf.eval().requires_grad_(False), AutoTokenizer.from_pretrained(source))
    except (OSError, ValueError) as error:
        raise InputError(f"Model {name!r} could not be read ({str(error).splitlines()[0]}).") from None


def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(_source(name))
    except (OSError, ValueError) as error:
        raise InputError(f"Model {name!r} could not be read ({str(error).strip().splitlines()[0]}).") from None


def _source(name: str) -> str:
    from activations import embedded

    return str(embedded.model_folder()) if name.lower() in (embedded.NAME, "default") else name


def _width(name: str) -> int:
    return int(_config(name).hidden_size)


def _width_at(outline: Model, hook: str) -> int:
    """Width of the rows at a hook of a model without weights. Raises InputError where only a pass would tell."""
    if hook.endswith(("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")):
        return outline.d_model
    if hook.endswith("mlp.hook_post"):
        return int(outline.hf.config.intermediate_size)
    raise InputError(f"How wide {hook} is takes a pass of the model to tell: plan it with --machine here.")


def _forward_flops(model: Model, hooks: Sequence[str], context: int) -> float:
    """FLOPs of a token up to the last hook: two a weight, and attention over half the context."""
    last = max(resolve(model.hf, hook).block for hook in hooks)
    blocks = [resolve(model.hf, f"blocks.{i}.hook_resid_post").module for i in range(last + 1)]
    weights = sum(p.numel() for block in blocks for p in block.parameters())
    return 2.0 * weights + 4.0 * len(blocks) * model.d_model * context / 2


def _beside(folder: Path) -> Path:
    """The nearest folder that is there: around the run, so that the run itself is left alone."""
    return next(path for path in folder.absolute().parents if path.exists())


def _title(settings: Sequence[Training], d_in: int) -> str:
    if len(settings) > 1:
        return f"{len(settings)} dictionaries of width {d_in:,} from one read"
    each = settings[0]
    sparsity = each.sizes[REGISTRY[each.architecture].sparsity]
    return (
        f"{each.architecture}, {each.sizes['d_sae']:,} latents of width {d_in:,}, k {sparsity:g}, batch {each.batch:,}"
    )


def _text(figure: Figure) -> str:
    value = figure.value
    if figure.unit == "bytes":
        return _in_units(value, ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")), "B")
    if figure.unit == "seconds":
        return _in_units(value, ((86400 * 2, "days", 86400), (7200, "h", 3600), (120, "min", 60), (1, "s")), "ms", 1e-3)
    if figure.unit == "hours":
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def _in_units(value: float, units: Sequence[Any], smallest: str, scale: float = 1.0) -> str:
    for limit, name, *per in units:
        if abs(value) >= limit:
            return f"{value / (per[0] if per else limit):,.1f} {name}"
    return f"{value / scale:,.1f} {smallest}"
