"""Builds a dictionary's feature store from the activations that its run has cached: no forward pass of the model,
unless the effect of features on its loss is asked for (`autointerp.loss_effect`).

What needs the text goes to Parquet (the tokens, and the codes of the ordinary ones) for `data.store.build_store`, which
computes every statistic and example from it, but for which latents fire together (`autointerp.coactive`). What needs
only weights is computed here too: logit lens and neighbours (`autointerp.lens`), map and clusters
(`autointerp.decoder_map`).

The surprise: all of it is made in parts that are kept in `.index` beside the store until that is done, so a killed
index goes on with the next part, and ends in the store of an unbroken one. Several processes take turns at the parts.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from activations import InputError, load_model
from activations.cache import CachedActivations
from activations.files import lock
from activations.model import pick_device
from activations.ranks import joined
from activations.run import Run, dictionary_folder, versions
from autointerp.coactive import coactive_tables, sampled_firings
from autointerp.codes import code_tables, shards_of, tokens_table
from autointerp.decoder_map import check_map, map_table
from autointerp.lens import ROWS, decoder_tables, unembedding
from autointerp.loss_effect import BLOCK, measure_effects, read_text, spread
from autointerp.scratch import Scratch, batches
from data.store import BuildOptions, build_store
from data.store.schema import STORE_FILE
from sae import SAE, load_sae

FORMAT = 1
"""Of the parts; another one discards what an older version left."""
MEMORY, THREADS, CHUNK = "512MiB", 4, 4_000_000
"""What the database may hold while the store is built, its threads, each of which needs a part of that, and the codes
that are looked at together."""

T = TypeVar("T")


def index(
    address: str | Path,
    *,
    overwrite: bool = False,
    device: str = "auto",
    batch: int = 4096,
    n_tokens: int | None = None,
    loss_effect: int | Sequence[int] = 0,
    map: str = "pca",
    examples: int = 56,
) -> Path:
    """Build the feature store of a dictionary (RUN, RUN/ID or its folder) and return its path.

    n_tokens: index only the first so many cached tokens; None for all. batch: rows encoded at once, at most.
    loss_effect: features whose effect on the model's loss is measured (`autointerp.loss_effect`): how many, or which.
    map: how the decoder rows are laid out in the plane, one of `autointerp.decoder_map.MAPS`.
    examples: how many windows of 32 tokens are kept of a feature and pole: top ones, some from intervals of value and
    of rank, and random ones; a few more, so that each split has top ones of its own.
    Killed, it goes on when it is called again with the same arguments; started by torchrun, the ranks share the work.
    Memory: beside dictionary and model less than 1 GiB, whatever the width, but for 4 bytes a token where the loss
    effect is measured. Disk, while it runs: about 50 bytes a code.
    Raises InputError when the store is there already (unless `overwrite`), when the dictionary lies in no run, and when
    the run has no activations at its hook.
    """
    if n_tokens is not None and n_tokens < 1:
        raise InputError(f"n_tokens={n_tokens} is too small: expected at least 1.")
    if examples < 6:
        raise InputError(f"examples={examples} is too small: expected at least 6, one or more of each kind.")
    check_map(map)
    which = loss_effect if isinstance(loss_effect, int) else sorted(set(loss_effect))
    options = {"n_tokens": n_tokens, "batch": batch, "loss_effect": which, "map": map, "examples": examples}
    with joined() as ranks, ExitStack() as stack:

        def prepare() -> _Work:
            folder = dictionary_folder(address)
            target = folder / STORE_FILE
            if ranks.leads and target.exists() and not overwrite:
                raise InputError(
                    f"{address} is indexed already ({target}): add --overwrite (overwrite=True) to build it anew."
                )
            run = _run_of(folder)
            if ranks.leads:
                stack.enter_context(lock(folder / ".index.lock"))
            sae = load_sae(folder).to(pick_device(ranks.device(device)))
            cache = run.activations(sae.only_hook("An index"))
            _check(folder, sae, cache, which)
            return _Work(folder, run, sae, cache, Scratch(folder / ".index", ranks), options)

        work = ranks.leader_first(prepare)
        ranks.agree(options)
        ranks.by_leader(lambda: work.scratch.begin(_plan(work)))

        def do(step: Callable[[_Work], None]) -> None:
            ranks.together(lambda: _told(work, step))

        for step in (_decoder, _codes, _coactivation, _map, _effects):
            do(step)
        return ranks.by_leader(lambda: _told(work, _store))


class _Work(NamedTuple):
    """What an index is made of, and by whom."""

    folder: Path
    run: Run
    sae: SAE
    cache: CachedActivations
    scratch: Scratch
    options: dict[str, Any]


def _decoder(work: _Work) -> None:
    """Lens, neighbours and vocabulary; the model is loaded for its unembedding and its vocabulary alone."""
    missing = work.scratch.lacking("decoder", -(-work.sae.d_sae // ROWS))
    if not missing and not work.scratch.lacking("vocab", 1):
        return
    model = load_model(work.run.model_name, dtype=work.run.meta["model_dtype"], device="cpu")
    vocab = model.token_bytes()
    through = unembedding(work.sae, model, vocab)
    del model
    for part in tqdm(missing, desc="logit lens", unit="part", disable=None):
        work.scratch.write("decoder", part, decoder_tables(work.sae, through, part))
    for part in work.scratch.lacking("vocab", 1):
        work.scratch.write("vocab", part, [pa.table({"bytes": pa.array(vocab, pa.binary())})])


def _codes(work: _Work) -> None:
    """Tokens and codes, a part a shard of the cache."""
    shards = shards_of(work.cache, work.options["n_tokens"])
    missing = work.scratch.lacking("codes", len(shards))
    total = sum(shards[shard][1] for shard in missing)
    with tqdm(total=total, desc="encoding", unit="tok", unit_scale=True, disable=None) as bar:
        for shard in missing:
            first, n = shards[shard]
            work.scratch.write("tokens", shard, [tokens_table(work.cache, shard, first, n)])
            tables = code_tables(work.sae, work.cache, shard, first, n, batch=work.options["batch"], told=bar.update)
            work.scratch.write("codes", shard, tables)


def _coactivation(work: _Work) -> None:
    for part in work.scratch.lacking("coactive", 1):
        fires = sampled_firings(work.scratch.parts("codes"), work.scratch.parts("tokens"), work.sae.d_sae)
        facts = {"coactivation_tokens": str(fires.shape[0])}
        work.scratch.write("coactive", part, coactive_tables(fires), facts)


def _map(work: _Work) -> None:
    for part in work.scratch.lacking("map", 1):
        decoder = work.scratch.parts("decoder")
        table, facts = map_table(work.sae.W_dec.detach(), work.options["map"], decoder, signed=work.sae.signed)
        work.scratch.write("map", part, [table], facts)


def _effects(work: _Work) -> None:
    """Effects on the model's loss, a part a block of features."""
    wanted, codes = work.options["loss_effect"], work.scratch.parts("codes")
    if not wanted:
        return
    features = spread(codes, wanted) if isinstance(wanted, int) else wanted
    missing = work.scratch.lacking("effects", -(-len(features) // BLOCK))
    if not missing:
        return
    model = load_model(work.run.model_name, dtype="float32", device=str(work.sae.W_dec.device))
    text = read_text(work.scratch.parts("tokens"))
    for part in tqdm(missing, desc="loss effects", unit="block", disable=None):
        block = features[part * BLOCK : (part + 1) * BLOCK]
        work.scratch.write("effects", part, [measure_effects(work.sae, model, text, codes, block)])


def _store(work: _Work) -> Path:
    """The store of all parts, which go then."""
    scratch = work.scratch
    meta = _meta(work) | scratch.facts("coactive") | scratch.facts("map")
    groups = [scratch.parts(stage) for stage in ("decoder", "coactive", "map")]
    if effects := scratch.parts("effects"):
        groups.append(effects)
        counts = (part["n_forwards"].to_numpy().sum() for part in batches(effects, ["n_forwards"]))
        meta["loss_effect_forwards"] = str(sum(counts))
    path = build_store(
        work.folder / STORE_FILE,
        codes=scratch.parts("codes"),
        tokens=scratch.parts("tokens"),
        n_features=work.sae.d_sae,
        vocab=pq.read_table(scratch.path("vocab"))["bytes"].to_pylist(),
        meta=meta,
        per_feature=groups,
        options=BuildOptions(memory=MEMORY, threads=THREADS, chunk_codes=CHUNK, **_kinds(work.options["examples"])),
        resume=scratch.fingerprint(),
    )
    scratch.remove()
    return path


def _kinds(examples: int) -> dict[str, int]:
    """How many examples of each kind, as `BuildOptions` has them: of 56, 12 top ones, 4 of each of 4 intervals of value
    and of 4 of rank, and 12 random ones."""
    bands, per_band, random = 4 if examples >= 20 else 2, max(examples // 14, 1), max(3 * examples // 14, 1)
    return {"top": examples - 2 * bands * per_band - random, "bands": bands, "per_band": per_band, "random": random}


def _told(work: _Work, step: Callable[[_Work], T]) -> T:
    """Do a step; of a full disk and its like one line."""
    try:
        return step(work)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{work.folder} could not be indexed: {error}. What is done is kept: mend that and run the same again (or "
            f"delete {work.scratch.folder} to begin anew)."
        ) from error


def _check(folder: Path, sae: SAE, cache: CachedActivations, loss_effect: int | Sequence[int]) -> None:
    wanted = [] if isinstance(loss_effect, int) else loss_effect
    if wrong := [number for number in wanted if not 0 <= number < sae.d_sae]:
        raise InputError(f"{folder} has no feature {wrong[0]}: expected 0 to {sae.d_sae - 1}.")
    if cache.d_in != sae.d_in:
        raise InputError(f"{folder} takes rows of {sae.d_in} values, but {sae.hook} has {cache.d_in} here.")


def _plan(work: _Work) -> dict[str, Any]:
    """What the parts are of: whatever can change a number in them."""
    activations = work.run.path / "activations"
    files = {
        "config": work.folder / "cfg.json",
        "weights": work.folder / "sae_weights.safetensors",
        "cache": activations / work.cache.hook / "manifest.json",  # holds the hashes of the shards
        "tokens": activations / "tokens" / "manifest.json",
    }
    return {
        "format": FORMAT,
        "version": versions()["sae-workbench"],
        "model": [str(work.run.meta[name]) for name in ("model", "revision", "model_dtype")],
        "device": work.sae.W_dec.device.type,
        **work.options,
        **{name: _sha256(path) for name, path in files.items()},
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run_of(folder: Path) -> Run:
    """The run that a dictionary lies in, which has text."""
    if folder.resolve().parent.name != "dictionaries":
        raise InputError(
            f"{folder} lies in no run: expected RUN/dictionaries/ID. Bring it into one with `sae import {folder} RUN`."
        )
    run = Run.open(folder.resolve().parent.parent)
    if not run.has_text:
        raise InputError(f"{run.path} holds vectors, which are no tokens of a text: there is no example to show.")
    return run


def _meta(work: _Work) -> dict[str, str]:
    """Where the store comes from."""
    run, sae = work.run, work.sae
    return {
        "dictionary": work.folder.name,
        "model": str(run.meta["model"]),
        "revision": str(run.meta["revision"]),
        "corpus": str(run.meta["corpus"]),
        "context": str(run.meta["context"]),
        "hook": sae.hook,
        "architecture": sae.architecture,
        "signed": "true" if sae.signed else "false",
    }
