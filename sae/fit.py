"""Fitting: dictionaries that are filled from rows, without gradient. Shards are read in order, each row once.

What a dictionary becomes depends on the order, so it reads alone, and nothing is shuffled: two models that read one
text see it alike. All state is the dictionary so far and the next shard; a killed and resumed fit ends in the same
bytes.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from activations.cache import Activations, training_mask
from activations.shuffle import Cursor
from sae import checkpoint
from sae.base import FittedSAE
from sae.checkpoint import Place
from sae.monitor import Bar, Monitor
from sae.settings import Training


def fit(
    sae: FittedSAE,
    settings: Training,
    source: Activations,
    scale: float,
    folder: Path,
    facts: dict[str, Any],
    *,
    checkpoint_seconds: float,
    keep: int,
    track: Sequence[str],
) -> tuple[FittedSAE, int]:
    """(the dictionary, of rows as the hook gives them; rows read now) from `sae`, which is empty.

    It goes on from the last checkpoint in `folder`, and ends when `settings.n_tokens` rows were read, there are no
    more, or the dictionary is full. facts: for the checkpoints.
    """
    device = sae.W_dec.device
    seen, first = (torch.zeros((), dtype=torch.long) for _ in range(2))  # rows fitted; number of the shard's first
    weights = {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()}
    tensors = {**weights, "seen": seen, "first": first}
    step = max(checkpoint.steps_of(folder), default=0)
    shard = 0
    if step:
        checkpoint.restore(folder, step, tensors)
        shard = checkpoint.read_place(folder, step).cursor.window
    begin, saved = int(seen), time.monotonic()
    log = Monitor(folder, settings, step, track)
    bar = Bar(settings.n_tokens, begin)
    try:
        while seen < settings.n_tokens and not sae.is_full() and source.has(shard):
            mask, tokens = training_mask(source, shard), source.tokens(shard)
            labels = torch.stack([tokens.docs[mask].long(), first + mask.nonzero().squeeze(1)], dim=1)
            rows, figures = source.rows(shard)[mask], {}
            for at in range(0, min(len(rows), settings.n_tokens - int(seen)), settings.batch):
                part = slice(at, min(at + settings.batch, at + settings.n_tokens - int(seen)))
                x = rows[part].to(device, torch.float32) * scale
                figures = sae.fit_batch(x, labels[part].to(device))
                step, seen = step + 1, seen.add_(len(x))
                bar.step(len(x))
                if sae.is_full():
                    break
            shard, first = shard + 1, first.add_(len(mask))
            if figures:
                log.line(step, int(seen), {**{name: float(v) for name, v in figures.items()}, "n_dead": 0})
            if time.monotonic() - saved > checkpoint_seconds:
                checkpoint.save(folder, tensors, Place(step, Cursor(0, shard, 0), (scale,)), facts)
                checkpoint.forget(folder, checkpoint.steps_of(folder)[:-keep])
                saved = time.monotonic()
        made = sae.fitted()
        log.finish()
    finally:
        bar.close()
        log.close()
    made.unscale(scale)
    made.save_beside(folder)
    return made, int(seen) - begin
