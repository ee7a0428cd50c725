"""Capture: token contexts in, shards of activations out, any number of hooks in one pass that stops at the last one.

Tokens are written first, once a run; then each shard of tokens goes through the model for the hooks that still lack it.
So a later call adds hooks, and a killed one goes on at the shard it was in.
"""

import itertools
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from activations.errors import InputError
from activations.files import lock
from activations.hooks import resolve
from activations.model import Model
from activations.run import Run
from activations.shards import SINK_CONTEXTS, SINK_FACTOR, Shards, statistics
from activations.splice import read

ROWS_PER_SHARD = 1 << 16


def collect(
    run: Run,
    model: Model,
    hooks: Sequence[str],
    contexts: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    rows_per_batch: int | None = None,
) -> None:
    """Cache the activations at `hooks` of all `contexts` into the run.

    contexts: (ids, documents) pairs of int32 arrays of one length; only read when the run has no tokens yet.
    dtype: of the stored rows. rows_per_batch: tokens in a forward pass; 4,096 on a CPU, 65,536 on a GPU.
    Raises InputError for a hook that the model lacks, an empty corpus, a full disk, or a hook in use by another
    process.
    """
    for hook in hooks:
        resolve(model.hf, hook)
    folder = run.path / "activations"
    with ExitStack() as locks:
        for name in ["tokens", *hooks]:
            locks.enter_context(lock(folder / ".locks" / f"{name}.lock"))
        tokens = _write_tokens(folder, contexts, run.meta["context"], run.meta["n_tokens"])
        caches = {hook: Shards(folder / hook) for hook in hooks}
        _check_disk(run, tokens, caches, model.d_model, dtype)
        batch = rows_per_batch or (65_536 if model.device.type == "cuda" else 4_096)
        _write_activations(model, tokens, caches, dtype, batch)


def _write_tokens(
    folder: Path, contexts: Iterable[tuple[np.ndarray, np.ndarray]], context: int, n_tokens: int
) -> Shards:
    shards = Shards(folder / "tokens")
    if shards.manifest["complete"]:
        return shards
    per_shard = max(ROWS_PER_SHARD // context, 1)
    stream = itertools.islice(contexts, n_tokens // context)
    for number in itertools.count():
        part = list(itertools.islice(stream, per_shard))
        if not part:
            break
        if number < len(shards):  # written before this process was started again
            continue
        positions = torch.arange(context, dtype=torch.int32).repeat(len(part))
        ids, docs = (torch.from_numpy(np.concatenate([c[i] for c in part]).astype(np.int32)) for i in (0, 1))
        shards.append({"ids": ids, "docs": docs, "positions": positions}, len(positions))
    if len(shards) == 0:
        raise InputError(f"The corpus has not one context of {context} tokens: give more text, or a smaller --context.")
    shards.update(complete=True)
    return shards


def _write_activations(model: Model, tokens: Shards, caches: dict[str, Shards], dtype: torch.dtype, batch: int) -> None:
    rows_of = [entry["rows"] for entry in tokens.manifest["shards"]]
    todo = [i for i in range(len(tokens)) if any(len(cache) <= i for cache in caches.values())]
    with tqdm(total=sum(rows_of[i] for i in todo), unit="token", unit_scale=True, desc="capture", disable=None) as bar:
        for i in todo:
            wanted = {hook: cache for hook, cache in caches.items() if len(cache) <= i}
            shard = tokens.load(i)
            captured = _forward(model, shard["ids"], shard["positions"], list(wanted), dtype, batch, bar)
            for hook, rows in captured.items():
                _append(wanted[hook], rows, shard["positions"])
    for cache in caches.values():
        cache.update(complete=True)


def _append(cache: Shards, rows: Tensor, positions: Int[Tensor, " rows"]) -> None:
    """Add one shard of rows with its mask and sums; the first shard also sets the sink threshold."""
    norms = rows.float().norm(dim=1)
    if "sink_threshold" not in cache.manifest:
        starts = (positions == 0).nonzero().flatten()
        end = int(starts[SINK_CONTEXTS]) if len(starts) > SINK_CONTEXTS else len(rows)
        threshold = SINK_FACTOR * norms[:end].median().item()
        cache.update(d_in=rows.shape[1], dtype=str(rows.dtype).removeprefix("torch."), sink_threshold=threshold)
    ordinary_place = positions > 0
    mask = ordinary_place & (norms <= cache.manifest["sink_threshold"])
    sums = statistics(rows, mask, n_sinks=int((ordinary_place & ~mask).sum()))
    cache.append({"rows": rows, "mask": mask, **sums}, len(rows))


@torch.inference_mode()
def _forward(
    model: Model, ids: Tensor, positions: Tensor, hooks: list[str], dtype: torch.dtype, batch: int, bar: tqdm
) -> dict[str, Tensor]:
    """Rows at each hook for one shard of tokens, on the CPU."""
    context = int(positions.max()) + 1
    contexts = ids.view(-1, context).long()
    parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    with read(model, hooks, stop=True) as got:
        for part in contexts.split(max(batch // context, 1)):
            model.hf(input_ids=part.to(model.device), use_cache=False)
            for hook in hooks:
                parts[hook].append(got[hook].flatten(0, 1).to("cpu", dtype))
            bar.update(part.numel())
    return {hook: torch.cat(rows) for hook, rows in parts.items()}


def _check_disk(run: Run, tokens: Shards, caches: dict[str, Shards], d_model: int, dtype: torch.dtype) -> None:
    """Refuse to start what the disk cannot hold (the width of a hook is taken to be the model's)."""
    rows = [entry["rows"] for entry in tokens.manifest["shards"]]
    need = sum(sum(rows[len(cache) :]) for cache in caches.values()) * d_model * dtype.itemsize
    free = shutil.disk_usage(run.path).free
    if need > free:
        raise InputError(
            f"The activations need {need / 1e9:.1f} GB and {run.path} has {free / 1e9:.1f} GB free: "
            "lower --tokens, take fewer hooks, or put the run elsewhere."
        )
