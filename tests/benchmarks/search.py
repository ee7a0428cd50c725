"""How long a search takes: labels of 131,072 made-up features, and a text through the embedded model.

    python -m tests.benchmarks.search --features 131072 --prompt-features 9216

JSON lines, milliseconds, median and largest of the repetitions. Part `labels`: words, a token and meaning, in a store
whose features have a made-up label each and random vectors in the file that `LabelVectors` keeps (so no label is
embedded; the query is, by MiniLM); `vectors_first` is the first search by meaning, which reads that file. Part
`prompt`: a random TopK dictionary (k 32) at layer 15 of the embedded model; neither is loaded in these times.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from activations import load_model
from activations.embedder import load_embedder
from autointerp.search import LabelVectors, by_meaning, by_prompt, by_token, by_words
from autointerp.search.meaning import FILE, write_vectors
from data.store import BuildOptions, Explanation, Store, build_store, open_store
from sae import SAE
from sae.architectures.topk import TopKConfig, TopKSAE
from tests.benchmarks.lines import count, give_out, note
from tests.planted import WORDS

HOOK = "blocks.15.hook_resid_post"
TEXT = "The ship sailed at dawn from Liverpool, and by the evening of the third day the captain had lost all hope."
N_FIRINGS = 20
"""Of each feature, in the made-up text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=count, default=131_072)
    parser.add_argument("--prompt-features", type=count, default=9216)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    give_out(rows(args.features, args.prompt_features, args.repeats))


def rows(n_labels: int, n_prompt: int, repeats: int) -> Iterator[dict[str, Any]]:
    vocab = load_model(device="cpu").token_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        note(f"making a store of {n_labels:,} features ...")
        yield {
            "part": "labels",
            "features": n_labels,
            **label_times(made(Path(scratch) / "a", n_labels, vocab), repeats),
        }
        note(f"making a store of {n_prompt:,} features ...")
        yield from prompt_times(made(Path(scratch) / "b", n_prompt, vocab), n_prompt, repeats)


def made(folder: Path, n: int, vocab: list[bytes]) -> Path:
    """A store of n features that fire on random tokens, each with a made-up label and a random vector for it."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    n_rows = 1 << 18
    text = {
        "row": np.arange(n_rows),
        "id": numbers.integers(len(vocab), size=n_rows).astype(np.int32),
        "doc": (np.arange(n_rows) // 1024).astype(np.int32),
        "position": (np.arange(n_rows) % 128).astype(np.int32),
        "ordinary": np.arange(n_rows) % 128 != 0,
    }
    hits = numbers.integers(n_rows // 128, size=n * N_FIRINGS) * 128 + numbers.integers(1, 128, size=n * N_FIRINGS)
    codes = np.unique(np.stack([hits, np.repeat(np.arange(n), N_FIRINGS)]), axis=1)
    values = numbers.uniform(0.1, 10, size=codes.shape[1]).astype(np.float32)
    pq.write_table(pa.table(text), folder / "tokens.parquet")
    columns = {"row": codes[0], "feature": codes[1].astype(np.int32), "value": values}
    pq.write_table(pa.table(columns), folder / "codes.parquet")
    build_store(
        folder / "features.duckdb",
        codes=[folder / "codes.parquet"],
        tokens=[folder / "tokens.parquet"],
        n_features=n,
        vocab=vocab,
        meta={"signed": "false", "hook": HOOK},
        options=BuildOptions(),
    )
    chosen = random.Random(0)
    texts = [f"{' '.join(chosen.choices(WORDS, k=5))} {feature}" for feature in range(n)]
    with open_store(folder) as store:
        store.add_explanations(
            [Explanation.new(feature=i, text=text, source="lexical") for i, text in enumerate(texts)]
        )
    vectors = torch.randn(n, 384, generator=torch.Generator().manual_seed(0))
    write_vectors(folder / FILE, load_embedder(device="cpu"), texts, (vectors / vectors.norm(dim=1)[:, None]).half())
    return folder


def label_times(folder: Path, repeats: int) -> dict[str, Any]:
    with open_store(folder) as store:
        embedder = load_embedder(device="cpu")
        vectors = LabelVectors(store, embedder)
        first = timed(lambda: by_meaning(vectors, "a ship"), 1)
        asked = iter(WORDS * repeats)
        return {
            "vectors_first_ms": first["median"],
            "one_word_ms": timed(lambda: by_words(store, next(asked)), repeats),
            "two_words_ms": timed(lambda: by_words(store, f"{next(asked)} {next(asked)}"), repeats),
            "meaning_ms": timed(lambda: by_meaning(vectors, f"about the {next(asked)}"), repeats),
            "token_ms": timed(lambda: by_token(store, next(asked)), repeats),
        }


def prompt_times(folder: Path, n: int, repeats: int) -> Iterator[dict[str, Any]]:
    sae = dictionary(n)
    with open_store(folder) as store:
        for ranks, dtype in ((("activation", "rarity"), None), (("loss",), "float32")):
            model = load_model(dtype=dtype, device="cpu")
            for rank in ranks:
                found = by_prompt(store, sae, model, TEXT, rank=rank)
                yield {
                    "part": "prompt",
                    "features": n,
                    "rank": rank,
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "active": found.total,
                    "ms": timed(prompted(store, sae, model, rank), 2 if rank == "loss" else repeats),
                }


def prompted(store: Store, sae: SAE, model: Any, rank: str) -> Callable[[], object]:
    return lambda: by_prompt(store, sae, model, TEXT, rank=rank)


def dictionary(n: int) -> SAE:
    """A random TopK dictionary of the embedded model's width."""
    sae = TopKSAE(TopKConfig(d_in=576, d_sae=n, k=32))
    sae.initialise(torch.zeros(1, 576), seed=0)
    sae.metadata = {"hook_name": HOOK}
    return sae.requires_grad_(False).eval()


def timed(ask: Callable[[], object], repeats: int) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        ask()
        times.append(1000 * (time.perf_counter() - start))
    return {"median": round(statistics.median(times), 1), "max": round(max(times), 1)}


if __name__ == "__main__":
    main()
