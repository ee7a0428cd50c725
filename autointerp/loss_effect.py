"""What the model loses without a latent: -z_i d_i is added to its activations, and the losses of the tokens compared.

Delta form: what the dictionary does not explain stays as it is. In some contexts in which the latent fires, drawn at
random, it is taken out of every ordinary token; the difference of the losses, in nats a predicted token, is positive
where the latent helps. Beside: the same with a random direction of d_i's norm in its place.

The surprise: z_i is read from the index's own codes, so a variant costs one forward a context and no encoding; the
clean losses of a context are computed once for a block of latents.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from activations import Model
from activations.splice import Edit, Where, replace
from autointerp.scratch import batches
from sae import SAE

N_CONTEXTS = 16
_BATCH = 8
BLOCK = 64
"""Latents whose codes are held at once, and that share the clean losses of their contexts."""

_LOSS = pa.struct(
    [
        ("nats", pa.float32()),
        ("error", pa.float32()),
        ("control", pa.float32()),
        ("n_contexts", pa.int64()),
        ("n_tokens", pa.int64()),
    ]
)
_SCHEMA = pa.schema([("feature", pa.int32()), ("loss", _LOSS), ("n_forwards", pa.int64())])


class Text(NamedTuple):
    """The indexed tokens, by row."""

    ids: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " contexts"]
    """First row of each context, in order."""

    def context(self, start: int) -> Int[Tensor, " time"]:
        """The token ids of the context that begins at that row."""
        after = int(np.searchsorted(self.starts, start, side="right"))
        end = self.starts[after] if after < len(self.starts) else len(self.ids)
        return torch.tensor(self.ids[start:end], dtype=torch.long)  # a copy: Parquet's memory is not ours to write to


class Removal(NamedTuple):
    """One latent to be taken out of one context."""

    feature: int
    start: int
    at: Int[Tensor, " m"]
    """Places in the context where it fires."""
    values: Float[Tensor, " m"]


@torch.inference_mode()
def measure_effects(
    sae: SAE, model: Model, text: Text, codes: Sequence[Path], features: Sequence[int], *, seed: int = 0
) -> pa.Table:
    """Columns feature, loss (as `build_store` takes it) and n_forwards (of a context), of those latents that fire.

    features: about `BLOCK` of them: their codes and the clean losses of their contexts are in memory.
    codes: as `build_store` takes them, of the activations of this model.
    """
    hook = sae.only_hook("A loss effect")
    clean: dict[int, Tensor] = {}
    found: list[dict[str, object]] = []
    for feature, own in removals(codes, text, features, seed):
        missing = [each.start for each in own if each.start not in clean]
        contexts = {start: text.context(start) for start in missing}
        clean.update(zip(missing, losses(model, hook, list(contexts.values()), None), strict=True))
        row = sae.W_dec[feature].float()
        random = torch.randn(len(row), generator=torch.Generator().manual_seed(seed + feature)).to(row.device)
        without, control = (
            _differences(model, hook, text, own, direction, clean)
            for direction in (row, random * (row.norm() / random.norm()))
        )
        forwards = len(missing) + 2 * len(own)
        found.append({"feature": feature, "loss": summary(without, control), "n_forwards": forwards})
    return pa.Table.from_pylist(found, schema=_SCHEMA)


def summary(without: list[Tensor], control: list[Tensor]) -> dict[str, float | int] | None:
    """Mean difference a token, its standard error over contexts (NaN for one) and the control; None without a token."""
    each = [(part.sum().item(), other.sum().item(), len(part)) for part, other in zip(without, control, strict=True)]
    each = [context for context in each if context[2]]
    if not each:
        return None
    own, random, n = np.array(each).T
    nats, spread = own.sum() / n.sum(), np.nan
    if len(each) > 1:  # of a ratio of sums, by the residuals of its contexts
        spread = np.sqrt(((own - nats * n) ** 2).sum() / (len(each) * (len(each) - 1))) / n.mean()
    return {
        "nats": nats,
        "error": spread,
        "control": random.sum() / n.sum(),
        "n_contexts": len(each),
        "n_tokens": int(n.sum()),
    }


def spread(codes: Sequence[Path], n: int) -> list[int]:
    """So many latents at equal distances among those that fire."""
    firing: set[int] = set()
    for table in batches(codes, ["feature"]):
        firing.update(np.unique(table["feature"].to_numpy()).tolist())
    alive = sorted(firing)
    return [alive[i * len(alive) // n] for i in range(n)] if len(alive) > n else alive


def read_text(tokens: Sequence[Path]) -> Text:
    """The ids of all tokens and where their contexts begin."""
    parts = [pq.read_table(part, columns=["id", "position"]) for part in tokens]
    ids, positions = (np.concatenate([part[name].to_numpy() for part in parts]) for name in ("id", "position"))
    return Text(ids, np.flatnonzero(positions == 0))


def removals(
    codes: Sequence[Path], text: Text, features: Sequence[int], seed: int
) -> Iterator[tuple[int, list[Removal]]]:
    """Each latent that fires, with up to `N_CONTEXTS` contexts in which it does, drawn with `seed` and its number."""
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))]
    for table in batches(codes, ["row", "feature", "value"]):
        row, feature, value = (table[name].to_numpy() for name in ("row", "feature", "value"))
        kept = np.isin(feature, features)
        parts.append((row[kept], feature[kept], value[kept]))
    rows, numbers, values = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    for number in features:
        mine = numbers == number
        start = text.starts[np.searchsorted(text.starts, rows[mine], side="right") - 1]
        contexts = np.random.default_rng([seed, number]).permutation(np.unique(start))[:N_CONTEXTS]
        own = [
            Removal(
                number,
                int(context),
                torch.from_numpy(rows[mine][start == context] - context),
                torch.from_numpy(values[mine][start == context]),
            )
            for context in np.sort(contexts)
        ]
        if own:
            yield number, own


def losses(
    model: Model,
    hook: str,
    contexts: Sequence[Int[Tensor, " _time"]],
    deltas: Sequence[Float[Tensor, "_time d"]] | None,
    batch: int = _BATCH,
) -> list[Float[Tensor, " _predicted"]]:
    """Cross-entropy of the tokens from the third on (position 0 is never edited) in each context, nats.

    deltas: what is added to the activations at the hook; None for nothing. batch: contexts of a forward pass.
    """
    found = []
    for first in range(0, len(contexts), batch):
        here = contexts[first : first + batch]
        ids = pad_sequence(list(here), batch_first=True).to(model.device)  # on the right: no real token sees it
        if deltas is None:
            logits = model(ids)
        else:
            added = pad_sequence(list(deltas[first : first + batch]), batch_first=True).to(model.device)
            with replace(model, hook, _adds(added)):
                logits = model(ids)
        ce = cross_entropy(logits[:, 1:-1].float().transpose(1, 2), ids[:, 2:], reduction="none").cpu()
        found += [row[: max(len(own) - 2, 0)].clone() for row, own in zip(ce, here, strict=True)]
    return found


def _differences(
    model: Model, hook: str, text: Text, own: Sequence[Removal], direction: Tensor, clean: dict[int, Tensor]
) -> list[Tensor]:
    """Of each context, the losses with the removal, along `direction`, less the clean ones."""
    contexts = [text.context(each.start) for each in own]
    deltas = []
    for ids, each in zip(contexts, own, strict=True):
        z = torch.zeros(len(ids)).scatter_(0, each.at, each.values).to(direction.device)
        deltas.append(-z[:, None] * direction)
    changed = losses(model, hook, contexts, deltas)
    return [loss - clean[each.start] for loss, each in zip(changed, own, strict=True)]


def _adds(delta: Float[Tensor, "batch time d"]) -> Edit:
    """The edit that adds `delta`, which is 0 wherever the latent is off: at position 0, on sinks and padding."""

    def edit(x: Tensor, _where: Where) -> Tensor:
        return x.float() + delta

    return edit
