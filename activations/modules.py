"""Capture from what is no language model: any torch module by module path, or vectors that are there already.

The caller brings the inputs as batches (images, protein sequences, sentences), always the same ones; rows are whatever
stands at the hook, one a position. Everything downstream (masks, statistics, shuffle, training) is that of `collect`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from activations.capture import MEMORY, ROWS_PER_SHARD, Part, begin, computed_dtype, row_bytes, write_rows
from activations.errors import InputError
from activations.forward import OnRows
from activations.hooks import resolve
from activations.ranks import Ranks
from activations.run import Run
from activations.shards import Shards
from activations.splice import read
from activations.tokens import Tokens, to_disk
from activations.writer import SETS

VECTORS = "vectors"
"""The hook of vectors that no model here computes."""

ModuleBatch = Tensor | Mapping[str, Tensor]
"""What the module is called with: one tensor, or keyword arguments. The first dimension counts examples."""


def collect_module(
    run: Run,
    module: nn.Module,
    hooks: Sequence[str],
    batches: Iterable[ModuleBatch],
    *,
    dtype: str = "bfloat16",
    channel_dim: int = -1,
    skip_first: bool = False,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> None:
    """Cache what `module` computes at `hooks` (module paths) from `batches`.

    batches: the same each time; a later call adds hooks, a killed one goes on. Padding is what `attention_mask` says.
    channel_dim: where a row's values are: -1 in (batch, time, d), 1 in (batch, channels, height, width). skip_first:
    position 0 of each example is no ordinary row. Raises InputError for a hook that the module lacks, no batch, or
    hooks with unequal numbers of rows.
    """
    for hook in hooks:
        resolve(module, hook)
    with ExitStack() as stack:
        caches = begin(stack, run.path / "activations", hooks, Ranks())
        tokens = Shards(run.path / "activations" / "tokens")
        parts = _parts_of_module(
            module, hooks, batches, tokens, caches, computed_dtype(dtype), channel_dim, rows_per_shard
        )
        first = next(parts, None)
        if first is None:
            if tokens.complete:
                return
            raise InputError("There is no batch: give at least one.")
        width = {hook: x.shape[1] for hook, x in first.rows(hooks, lambda _: None).items()}
        facts = {hook: _facts(run, hook, dtype, width[hook]) for hook in hooks}
        everything = itertools.chain([first], parts)
        write_rows(caches, everything, facts, n_tokens=run.meta["n_tokens"], skip_first=skip_first)


def collect_vectors(
    run: Run,
    blocks: Iterable[tuple[Int[Tensor, " n"], Callable[[], Float[Tensor, "n d"]]]],
    *,
    width: int,
    dtype: str = "float32",
    memory: int = MEMORY,
) -> None:
    """Cache vectors as activations at the hook "vectors": no position and no sink among them, every row ordinary.

    blocks: (number of each row's document or its own, a call that gives the rows), the same each time; only the blocks
    that are not there yet are called. Raises InputError for no block, or one that is not `width` wide.
    """
    with ExitStack() as stack:
        caches = begin(stack, run.path / "activations", [VECTORS], Ranks())
        tokens = Shards(run.path / "activations" / "tokens")
        n_rows = min(ROWS_PER_SHARD, max(memory // (SETS * row_bytes(width, dtype, gradients=False)), 1))
        parts = _parts_of_vectors(blocks, tokens, width, computed_dtype(dtype), n_rows)
        facts = {VECTORS: _facts(run, VECTORS, dtype, width)}
        write_rows(caches, parts, facts, n_tokens=run.meta["n_tokens"], skip_first=False, find_sinks=False)


def _facts(run: Run, hook: str, dtype: str, width: int) -> dict[str, object]:
    made_by = {"model": run.meta["model"], "revision": run.meta["revision"]}
    return {"hook": hook, **made_by, "dtype": dtype, "gradients": False, "d_in": width, "heads": None}


def _parts_of_module(
    module: nn.Module,
    hooks: Sequence[str],
    batches: Iterable[ModuleBatch],
    tokens: Shards,
    caches: Mapping[str, Shards],
    dtype: torch.dtype,
    channel_dim: int,
    rows_per_shard: int,
) -> Iterator[Part]:
    stream = iter(batches)
    example = 0
    for number in itertools.count():
        if tokens.has(number) and not any(cache.lacks(number) for cache in caches.values()):
            entry = tokens.entry(number)
            for _ in itertools.islice(stream, entry["batches"]):
                pass
            example += entry["examples"]
            continue
        done: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        start, size = example, 0
        for batch in stream:
            rows, columns = _run_batch(module, hooks, batch, example, dtype, channel_dim)
            done.append((rows, columns))
            example, size = example + _n_examples(batch), size + len(columns["ids"])
            if size >= rows_per_shard:
                break
        if not done:
            if number > 0:
                tokens.finish(number)
            return
        whole = {name: torch.cat([columns[name] for _, columns in done]) for name in done[0][1]}
        if tokens.lacks(number):
            tokens.write(number, to_disk(Tokens(**whole)), batches=len(done), examples=example - start)
        joined = {hook: torch.cat([rows[hook] for rows, _ in done]) for hook in hooks}
        yield Part(number, whole["positions"], _given(joined))


def _given(rows: dict[str, Tensor]) -> Callable[[Sequence[str], OnRows], dict[str, Tensor]]:
    def give(hooks: Sequence[str], on_rows: OnRows) -> dict[str, Tensor]:
        on_rows(len(next(iter(rows.values()))))
        return {hook: rows[hook] for hook in hooks}

    return give


@torch.inference_mode()
def _run_batch(
    module: nn.Module, hooks: Sequence[str], batch: ModuleBatch, example: int, dtype: torch.dtype, channel_dim: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(rows at each hook, the token columns) of one batch, padding left out."""
    device = next(module.parameters()).device
    with read(module, hooks, stop=True) as got:
        if isinstance(batch, Tensor):
            module(batch.to(device))
        else:
            module(**{name: value.to(device) for name, value in batch.items()})
    n = _n_examples(batch)
    rows = {hook: x.movedim(channel_dim, -1).flatten(1, -2) if x.dim() > 2 else x[:, None] for hook, x in got.items()}
    per_example = {x.shape[1] for x in rows.values()}
    if len(per_example) > 1 or any(len(x) != n for x in rows.values()):
        shapes = ", ".join(f"{hook} {tuple(x.shape)}" for hook, x in rows.items())
        raise InputError(f"The hooks have different rows ({shapes}): collect those that differ in a run of their own.")
    time = per_example.pop()
    given = batch if isinstance(batch, Mapping) else {}
    mask = given.get("attention_mask", torch.ones(n, time))
    keep = (mask if mask.shape == (n, time) else torch.ones(n, time)).flatten().bool()
    ids = given.get("input_ids", torch.zeros(n, time))
    columns = {
        "ids": ids if ids.shape == (n, time) else torch.zeros(n, time),
        "docs": torch.arange(example, example + n)[:, None].expand(-1, time),
        "positions": keep.view(n, time).cumsum(dim=1) - 1,
    }
    kept = keep.to(device)
    return (
        {hook: x.flatten(0, 1)[kept].to(dtype) for hook, x in rows.items()},
        {name: column.flatten()[keep].int() for name, column in columns.items()},
    )


def _n_examples(batch: ModuleBatch) -> int:
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def _parts_of_vectors(
    blocks: Iterable[tuple[Tensor, Callable[[], Tensor]]],
    tokens: Shards,
    width: int,
    dtype: torch.dtype,
    rows_per_shard: int,
) -> Iterator[Part]:
    number = 0
    for numbers, vectors in blocks:
        for at in range(0, len(numbers), rows_per_shard):
            docs = numbers[at : at + rows_per_shard].int()
            nothing = torch.zeros_like(docs)
            if tokens.lacks(number):
                tokens.write(number, to_disk(Tokens(ids=nothing, docs=docs, positions=nothing)))
            yield Part(number, nothing, _slice_of(vectors, at, len(docs), width, dtype))
            number += 1
    if number == 0:
        raise InputError("There is no vector: expected at least one row.")
    tokens.finish(number)


def _slice_of(
    vectors: Callable[[], Tensor], at: int, n: int, width: int, dtype: torch.dtype
) -> Callable[[Sequence[str], OnRows], dict[str, Tensor]]:
    def give(hooks: Sequence[str], on_rows: OnRows) -> dict[str, Tensor]:
        del hooks
        rows = vectors()[at : at + n]
        if rows.shape[1] != width:
            raise InputError(
                f"A block of vectors is {rows.shape[1]} wide, expected {width}: give vectors of one width."
            )
        on_rows(len(rows))
        return {VECTORS: rows.to(dtype)}

    return give
