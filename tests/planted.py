"""A small, complete dictionary folder whose features are known beforehand: what tests of the store's readers open.

Feature i fires on word i of `WORDS`, four times as strongly as on the word after it; the last tenth of the features
never fire. With `signed`, it is negative on the word after it. The text is made of real words, and holds a token that
would be HTML if nobody escaped it, characters whose bytes are spread over two tokens, and a special token.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from data.store import BuildOptions, build_store

WORDS = (
    " river mountain harbour garden winter summer letter soldier doctor market bridge castle forest island machine "
    "number colour history teacher student music silver engine window kitchen street morning evening captain village "
    "queen science question answer promise journey"
).split()

HTML = '<b>&"'
END = "<|endoftext|>"
COMMON = " the of and to in a is that was for it with as on".split()

VOCAB: list[bytes] = [
    END.encode(),
    *(f" {word}".encode() for word in WORDS),
    *(f" {word}".encode() for word in COMMON),
    f" {HTML}".encode(),
    b" caf",
    b"\xc3",
    b"\xa9",
    b" \xf0\x9f",
    b"\x99\x82",
    b".\n",
]
"""Token id = place in this list."""

D_IN = 16
CONTEXT = 128
LOSS = {"nats": 0.0123, "error": 0.0021, "control": 0.0004, "n_contexts": 16, "n_tokens": 1843}


def word_id(i: int) -> int:
    """Token id of the word that feature i is about."""
    return 1 + i % len(WORDS)


def planted_text(n_documents: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Columns row, id, doc, position, ordinary of made-up documents, packed into contexts of 128 tokens."""
    random = np.random.default_rng(seed)
    first_common = 1 + len(WORDS)
    accent, smile, html = VOCAB.index(b"\xc3"), VOCAB.index(b" \xf0\x9f"), VOCAB.index(f" {HTML}".encode())
    ids, docs = [], []
    for doc in range(n_documents):
        topic = random.permutation(len(WORDS))[:6] + 1
        tokens: list[int] = []
        for _ in range(int(random.integers(3, 9))):
            tokens += [int(first_common + random.integers(len(COMMON))), int(random.choice(topic))]
            tokens += [int(first_common + random.integers(len(COMMON))), int(random.choice(topic))]
            tokens += random.choice(
                np.array([[html, 0], [accent - 1, accent], [smile, smile + 1], [word_id(doc), word_id(doc + 1)]])
            ).tolist()
            tokens = [token for token in tokens if token != 0]
            if tokens[-1] == accent:
                tokens.append(accent + 1)
            tokens.append(len(VOCAB) - 1)
        ids += [*tokens, 0]
        docs += [doc] * (len(tokens) + 1)
    rows = np.arange(len(ids), dtype=np.int64)
    position = (rows % CONTEXT).astype(np.int32)
    return {
        "row": rows,
        "id": np.array(ids, dtype=np.int32),
        "doc": np.array(docs, dtype=np.int32),
        "position": position,
        "ordinary": position != 0,
    }


def planted_codes(text: dict[str, np.ndarray], n_features: int, signed: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Columns row, feature, value: what each living feature does on the text."""
    random = np.random.default_rng(seed + 1)
    rows, features, values = [], [], []
    for feature in range(n_features - n_features // 10):
        for word, sign, strength in ((feature, 1.0, 4.0), (feature + 1, -1.0 if signed else 1.0, 1.0)):
            hits = text["row"][(text["id"] == word_id(word)) & text["ordinary"]]
            rows.append(hits)
            features.append(np.full(len(hits), feature, dtype=np.int32))
            values.append((sign * strength * random.uniform(0.25, 1.0, len(hits))).astype(np.float32))
    return {"row": np.concatenate(rows), "feature": np.concatenate(features), "value": np.concatenate(values)}


def planted_decoder(W_dec: np.ndarray, signed: bool, whole: bool = False) -> pa.Table:
    """Logit tables and neighbours of random decoder rows, in the form that `build_store` takes.

    whole: also places and made-up figures: a feature fires together with the next two, and of feature 1 alone the
    effect on the loss was measured.
    """
    d_sae, d_in = W_dec.shape
    logits = W_dec @ np.random.default_rng(7).normal(size=(d_in, len(VOCAB))).astype(np.float32)
    logits -= logits.mean(axis=1, keepdims=True)
    cosines = W_dec @ W_dec.T
    np.fill_diagonal(cosines, 0)
    near = np.argsort(-(np.abs(cosines) if signed else cosines), axis=1)[:, : min(10, d_sae - 1)]
    rows = []
    for feature in range(d_sae):
        order = np.argsort(-logits[feature])
        counts, edges = np.histogram(logits[feature], bins=40)
        rows.append(
            {
                "feature": feature,
                "top_logits": [{"id": int(i), "value": float(logits[feature, i])} for i in order[:10]],
                "bottom_logits": [{"id": int(i), "value": float(logits[feature, i])} for i in order[:-11:-1]],
                "logit_edges": edges.tolist(),
                "logit_counts": counts.tolist(),
                "neighbours": [{"feature": int(j), "cosine": float(cosines[feature, j])} for j in near[feature]],
            }
        )
    for feature, row in enumerate(rows if whole else []):
        row |= {
            "by_jaccard": [planted_pair(feature, 1, d_sae), planted_pair(feature, 2, d_sae)],
            "by_phi": [planted_pair(feature, 1, d_sae)],
            "x": float(W_dec[feature, 0]),
            "y": float(W_dec[feature, 1]),
            "cluster": feature % 3,
            "loss": LOSS if feature == 1 else None,
        }
    return pa.Table.from_pylist(rows)


def planted_pair(feature: int, step: int, d_sae: int) -> dict[str, float]:
    """What the next, or the one after the next, does on the feature's tokens."""
    n = 30 // step
    return {"feature": (feature + step) % d_sae, "n": n, "jaccard": n / 100, "chance": 0.02, "phi": n / 70}


def planted_store(
    folder: Path, n_features: int = 36, signed: bool = False, n_documents: int = 160, whole: bool = False
) -> Path:
    """Make `folder` a dictionary folder: cfg.json, sae_weights.safetensors, features.duckdb. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    W_dec = np.random.default_rng(3).normal(size=(n_features, D_IN)).astype(np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    save_file(
        {
            "W_enc": np.ascontiguousarray(W_dec.T),
            "W_dec": W_dec,
            "b_enc": np.zeros(n_features, dtype=np.float32),
            "b_dec": np.zeros(D_IN, dtype=np.float32),
        },
        folder / "sae_weights.safetensors",
    )
    config = {
        "architecture": "abstopk" if signed else "topk",
        "d_in": D_IN,
        "d_sae": n_features,
        "k": 4,
        "dtype": "float32",
        "device": "cpu",
        "metadata": {"hook_name": "blocks.0.hook_resid_post", "model_name": "planted"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    text = planted_text(n_documents)
    scratch = folder / ".planted"
    scratch.mkdir(exist_ok=True)
    pq.write_table(pa.table(text), scratch / "tokens.parquet")
    pq.write_table(pa.table(planted_codes(text, n_features, signed)), scratch / "codes.parquet")
    build_store(
        folder / "features.duckdb",
        codes=[scratch / "codes.parquet"],
        tokens=[scratch / "tokens.parquet"],
        n_features=n_features,
        vocab=VOCAB,
        meta={
            "model": "planted",
            "hook": "blocks.0.hook_resid_post",
            "architecture": str(config["architecture"]),
            "signed": "true" if signed else "false",
            "corpus": "planted words",
        },
        per_feature=planted_decoder(W_dec, signed, whole),
        options=BuildOptions(memory="512MiB", threads=1),
    )
    for name in ("tokens.parquet", "codes.parquet"):
        (scratch / name).unlink()
    scratch.rmdir()
    return folder
