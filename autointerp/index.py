"""Builds a dictionary's feature store from the activations that its run has cached: no forward pass of the model,
unless the effect of features on its loss is asked for (`autointerp.loss_effect`).

What needs the text goes to Parquet (the codes of the ordinary tokens, and the tokens) for `data.store.build_store`,
which computes every statistic and example from it, but for which latents fire together (`autointerp.coactive`). What
needs only weights is computed here, in pieces that fit in memory:
- logit lens: W_dec @ W_U, with W_U centred over the vocabulary and the final norm's gain folded in;
- neighbours: the decoder rows of largest cosine, of largest |cosine| for signed latents, whose sign is a convention;
- a map and clusters of the decoder rows (`autointerp.decoder_map`).

The surprise: the model is loaded for its unembedding and vocabulary alone, and let go before the codes are made.
Source of the lens: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from activations import InputError, Model, load_model
from activations.cache import CachedActivations
from activations.files import lock
from activations.model import pick_device
from activations.run import Run, dictionary_folder
from autointerp.coactive import coactive_columns
from autointerp.decoder_map import map_columns
from autointerp.loss_effect import measure_effects
from data.store import build_store
from data.store.schema import STORE_FILE
from sae import SAE, load_sae

N_LOGITS = 10
N_NEIGHBOURS = 10
N_BINS = 40
_CELLS = 1 << 25
"""Entries of a dense product that are held at once (128 MiB of float32, and a few times that around it)."""
_ROW_GROUP = 1 << 20


class Lens(NamedTuple):
    """What one piece of decoder rows writes to the vocabulary. n rows; ids are token ids."""

    top_ids: np.ndarray
    top_values: np.ndarray
    bottom_ids: np.ndarray
    bottom_values: np.ndarray
    edges: np.ndarray
    counts: np.ndarray


def index(
    address: str | Path,
    *,
    overwrite: bool = False,
    device: str = "auto",
    batch: int = 4096,
    n_tokens: int | None = None,
    loss_effect: int | Sequence[int] = 0,
) -> Path:
    """Build the feature store of a dictionary (RUN, RUN/ID or its folder) and return its path.

    n_tokens: index only the first so many cached tokens; None for all. batch: rows encoded at once.
    loss_effect: features whose effect on the model's loss is measured (`autointerp.loss_effect`): how many, or which.
    Memory: the dictionary, and 3 GiB or so that do not grow with the text. Disk, while it runs: about 50 bytes a code.
    Raises InputError when the store is there already (unless `overwrite`), when the dictionary lies in no run, and when
    the run has no activations at its hook.
    """
    folder = dictionary_folder(address)
    target = folder / STORE_FILE
    if target.exists() and not overwrite:
        raise InputError(f"{address} is indexed already ({target}): add --overwrite (overwrite=True) to build it anew.")
    if n_tokens is not None and n_tokens < 1:
        raise InputError(f"n_tokens={n_tokens} is too small: expected at least 1.")
    run = _run_of(folder)
    if not run.has_text:
        raise InputError(f"{run.path} holds vectors, which are no tokens of a text: there is no example to show.")
    with lock(folder / ".index.lock"):
        scratch = folder / ".index"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            sae = load_sae(folder).to(pick_device(device))
            cache = run.activations(sae.only_hook("An index"))
            wanted = [] if isinstance(loss_effect, int) else loss_effect
            if wrong := [number for number in wanted if not 0 <= number < sae.d_sae]:
                raise InputError(f"{folder} has no feature {wrong[0]}: expected 0 to {sae.d_sae - 1}.")
            if cache.d_in != sae.d_in:
                raise InputError(f"{folder} takes rows of {sae.d_in} values, but {sae.hook} has {cache.d_in} here.")
            model = load_model(run.model_name, dtype=run.meta["model_dtype"], device="cpu")
            write_decoder(sae, model, scratch / "decoder.parquet")
            vocab = model.token_bytes()
            del model
            write_codes(sae, cache, scratch, batch=batch, n_tokens=n_tokens)
            codes, tokens = scratch / "codes.parquet", scratch / "tokens.parquet"
            coactive, n_counted = coactive_columns(codes, tokens, sae.d_sae)
            columns = coactive
            meta = {**_meta(run, sae, folder), "coactivation_tokens": str(n_counted)}
            if loss_effect:
                model = load_model(run.model_name, dtype="float32", device=device)
                effects, n_forwards = measure_effects(sae, model, codes, tokens, loss_effect)
                del model
                columns, meta["loss_effect_forwards"] = columns | effects, str(n_forwards)
            places, variance = map_columns(sae.W_dec.detach(), signed=sae.signed)
            return build_store(
                target,
                codes=[codes],
                tokens=[tokens],
                n_features=sae.d_sae,
                vocab=vocab,
                meta={
                    **meta,
                    "map": "principal components of the decoder rows",
                    "map_variance": f"{variance:.4f}",
                },
                per_feature=_joined(scratch / "decoder.parquet", columns | places),
            )
        except OSError as error:
            raise InputError(f"{folder} could not be indexed: {error}.") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@torch.inference_mode()
def write_codes(sae: SAE, cache: CachedActivations, folder: Path, *, batch: int, n_tokens: int | None) -> None:
    """Write tokens.parquet (every row) and codes.parquet (the non-zero latents of ordinary rows) for `build_store`.

    n_tokens: stop after so many rows; None for all.
    """
    last = min(cache.n_rows, n_tokens or cache.n_rows)
    codes = _Writer(folder / "codes.parquet")
    tokens = _Writer(folder / "tokens.parquet")
    with codes, tokens, tqdm(total=last, desc="encoding", unit="tok", unit_scale=True, disable=None) as bar:
        for i in range(cache.n_shards):
            first = cache.offset(i)
            n = min(cache.rows_of(i), last - first)
            if n <= 0:
                break
            rows, mask, text = cache.rows(i)[:n], cache.mask(i)[:n], cache.tokens(i)
            columns = {"id": text.ids[:n], "doc": text.docs[:n], "position": text.positions[:n], "ordinary": mask}
            numbers = np.arange(first, first + n, dtype=np.int64)
            tokens.write(pa.table({"row": numbers, **{name: column.numpy() for name, column in columns.items()}}))
            for at in range(0, n, batch):
                inside = slice(at, min(at + batch, n))
                kept = mask[inside].nonzero().flatten()
                x = rows[inside][kept].to(sae.W_dec.device, torch.float32)
                codes.write(_codes(sae, x, (first + at + kept).numpy()))
                bar.update(inside.stop - at)


def write_decoder(sae: SAE, model: Model, path: Path) -> None:
    """Write each latent's logit lens and neighbours as Parquet, the columns of `build_store`.

    A dictionary whose decoder does not write to the residual stream (another width than the model's) has no lens.
    """
    vocab, W_dec = model.token_bytes(), sae.W_dec.detach().float()
    step = max(_CELLS // max(len(vocab), sae.d_sae), 1)
    pieces = [(first, min(first + step, sae.d_sae)) for first in range(0, sae.d_sae, step)]
    columns = [_neighbour_columns(W_dec, pieces, signed=sae.signed)]
    if W_dec.shape[1] == model.d_model:
        columns.append(_lens_columns(W_dec, model.unembed().to(W_dec.device), vocab, pieces))
    with _Writer(path) as writer:
        for parts in tqdm(zip(*columns, strict=True), total=len(pieces), desc="logit lens", disable=None):
            writer.write(pa.table({name: column for part in parts for name, column in part.items()}))


def logit_lens(W_dec: Float[Tensor, "n d"], W_U: Float[Tensor, "d vocab"], ids: np.ndarray) -> Lens:
    """The tokens that each decoder row raises and lowers most, and a histogram of all its logits.

    W_U: unembedding, centred over the vocabulary. ids: the token id of each column.
    """
    logits = W_dec @ W_U
    n = min(N_LOGITS, logits.shape[1])
    top, bottom = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
    low, high = logits.amin(dim=1, keepdim=True), logits.amax(dim=1, keepdim=True)
    width = torch.where(high > low, high - low, 1.0)  # a row of zeros has all its logits in the first bar
    bins = logits.sub_(low).div_(width).mul_(N_BINS).to(torch.int32).clamp_(max=N_BINS - 1)
    bins += torch.arange(len(bins), device=bins.device, dtype=torch.int32)[:, None] * N_BINS
    counts = torch.bincount(bins.flatten(), minlength=len(bins) * N_BINS).view(-1, N_BINS)
    edges = low + width * torch.linspace(0, 1, N_BINS + 1, device=low.device)
    return Lens(
        ids[top.indices.cpu().numpy()],
        top.values.cpu().numpy(),
        ids[bottom.indices.cpu().numpy()],
        bottom.values.cpu().numpy(),
        edges.cpu().numpy(),
        counts.cpu().numpy(),
    )


def neighbours(unit: Float[Tensor, "d_sae d"], first: int, last: int, *, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """(features, cosines) of the nearest rows to rows `first` to `last`, nearest first, each (last - first, n).

    unit: decoder rows of norm 1. signed: nearest by |cosine|, which keeps its sign.
    """
    cosines = unit[first:last] @ unit.T
    closeness = cosines.abs() if signed else cosines.clone()
    closeness[torch.arange(last - first), torch.arange(first, last)] = -torch.inf
    found = closeness.topk(min(N_NEIGHBOURS, len(unit) - 1), dim=1).indices
    return found.cpu().numpy().astype(np.int32), cosines.gather(1, found).cpu().numpy()


def _codes(sae: SAE, x: Float[Tensor, "n d_in"], numbers: np.ndarray) -> pa.Table:
    """The non-zero latents of the rows `numbers` of the run."""
    values, indices = (part.cpu() for part in sae.encode_sparse(x))
    place, column = values.nonzero(as_tuple=True)
    return pa.table(
        {
            "row": numbers[place.numpy()],
            "feature": indices[place, column].to(torch.int32).numpy(),
            "value": values[place, column].float().numpy(),
        }
    )


class _Writer:
    """A Parquet file that is written in row groups; tables are given in pieces of any length."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: pq.ParquetWriter | None = None
        self._held: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        self._held.append(table)
        if sum(table.num_rows for table in self._held) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            table = pa.concat_tables(self._held)
            self._file = self._file or pq.ParquetWriter(self.path, table.schema, compression="lz4")
            self._file.write_table(table, row_group_size=_ROW_GROUP)
            self._held = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()


def _lens_columns(
    W_dec: Tensor, W_U: Tensor, vocab: list[bytes], pieces: list[tuple[int, int]]
) -> Iterator[dict[str, pa.Array]]:
    """The lens of all rows in pieces. Vocabulary entries without text (padding of the matrix) are left out.

    W_U is centred in place: with a large vocabulary it is the largest thing in memory.
    """
    ids = np.array([id for id, entry in enumerate(vocab) if entry and id < W_U.shape[1]], dtype=np.int32)
    if len(ids) < W_U.shape[1]:
        W_U = W_U[:, torch.from_numpy(ids).long().to(W_U.device)]
    W_U.sub_(W_U.mean(dim=1, keepdim=True))
    for first, last in pieces:
        lens = logit_lens(W_dec[first:last], W_U, ids)
        yield {
            "top_logits": _structs("id", lens.top_ids, "value", lens.top_values),
            "bottom_logits": _structs("id", lens.bottom_ids, "value", lens.bottom_values),
            "logit_edges": _lists(lens.edges),
            "logit_counts": _lists(lens.counts),
        }


def _neighbour_columns(W_dec: Tensor, pieces: list[tuple[int, int]], *, signed: bool) -> Iterator[dict[str, pa.Array]]:
    """The neighbours of all rows in the same pieces, and the features' numbers."""
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    for first, last in pieces:
        found, cosines = neighbours(unit, first, last, signed=signed)
        yield {
            "feature": pa.array(range(first, last), pa.int32()),
            "neighbours": _structs("feature", found, "cosine", cosines),
        }


def _joined(path: Path, columns: dict[str, pa.Array]) -> pa.Table:
    """A Parquet file with more columns, a row a latent as it has."""
    table = pq.read_table(path)
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def _lists(values: np.ndarray) -> pa.Array:
    """A matrix as a column of lists."""
    n, width = values.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * width), pa.array(values.ravel()))


def _structs(first: str, firsts: np.ndarray, second: str, seconds: np.ndarray) -> pa.Array:
    """Two matrices of the same shape as a column of lists of structs."""
    n, width = firsts.shape
    items = pa.StructArray.from_arrays([pa.array(firsts.ravel()), pa.array(seconds.ravel())], [first, second])
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * width), items)


def _run_of(folder: Path) -> Run:
    """The run that a dictionary lies in."""
    if folder.resolve().parent.name != "dictionaries":
        raise InputError(
            f"{folder} lies in no run: expected RUN/dictionaries/ID. Bring it into one with `sae import {folder} RUN`."
        )
    return Run.open(folder.resolve().parent.parent)


def _meta(run: Run, sae: SAE, folder: Path) -> dict[str, str]:
    """Where the store comes from."""
    return {
        "dictionary": folder.name,
        "model": str(run.meta["model"]),
        "revision": str(run.meta["revision"]),
        "corpus": str(run.meta["corpus"]),
        "context": str(run.meta["context"]),
        "hook": sae.hook,
        "architecture": sae.architecture,
        "signed": "true" if sae.signed else "false",
    }
