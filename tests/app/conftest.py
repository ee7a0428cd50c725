"""A runs folder as `sae` leaves it: dictionaries with a full store, a signed one, an empty one and none at all.

The model behind them is a random Llama of width 16 on the disk, whose tokenizer knows the planted words; so the
own-text test and steering run for real.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import streamlit as st
import torch
from safetensors.torch import save_file
from streamlit.testing.v1 import AppTest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.store import BuildOptions, Explanation, Score, build_store, open_store
from tests.planted import D_IN, END, VOCAB, WORDS, planted_store, planted_text

MAIN = Path(__file__).parents[2] / "app" / "main.py"
N_FEATURES = 70
FULL, SIGNED, EMPTY, BARE = "full", "signed", "empty", "bare"
MARKED = "about <b>rivers</b> & [mountains](http://example.com)"
"""The explanation of feature 0: what HTML and Markdown would make something of."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers and width 16, saved the way transformers saves one."""
    words = {END: 0} | {word: 1 + i for i, word in enumerate(WORDS)}
    words["[UNK]"] = len(words)
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, unk_token="[UNK]")
    config = LlamaConfig(
        hidden_size=D_IN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(words),
        max_position_embeddings=512,
        initializer_range=0.4,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The runs folder; nobody writes to it."""
    root = tmp_path_factory.mktemp("home") / "runs"
    run = root / "demo"
    for name in (FULL, SIGNED):
        folder = planted_store(run / "dictionaries" / name, n_features=N_FEATURES, signed=name == SIGNED, whole=True)
        finish(folder, model_folder)
        explain(folder)
    empty_store(run / "dictionaries" / EMPTY)
    bare = run / "dictionaries" / BARE
    bare.mkdir()
    (bare / "cfg.json").write_text(json.dumps({"architecture": "jumprelu", "d_in": D_IN, "d_sae": 36}))
    about = {
        "format": 1,
        "model": "tiny",
        "corpus": "planted words",
        "n_tokens": 6000,
        "created": "2026-11-23T10:00:00",
    }
    (run / "run.json").write_text(json.dumps(about))
    (root / "young").mkdir()
    (root / "young" / "run.json").write_text(json.dumps({**about, "corpus": "books"}))
    return root


def finish(folder: Path, model_folder: Path) -> None:
    """Give a planted dictionary its model, its statistics and its figures."""
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["model_name"] = str(model_folder)
    (folder / "cfg.json").write_text(json.dumps(config))
    with open_store(folder) as store:
        features = [store.feature(i) for i in range(store.n_features)]
    statistics = {
        "density": torch.tensor([f.density for f in features]).float(),
        "max": torch.tensor([f.max for f in features]).float(),
        "min": torch.tensor([f.min for f in features]).float(),
        "n_tokens": torch.tensor(6000),
        "median_norm": torch.tensor(2.0),
        "sink_threshold": torch.tensor(1e6),
    }
    save_file(statistics, folder / "statistics.safetensors")
    fvu = {"value": 0.2142, "n": 6000, "of": "tokens", "definition": "error over variance", "lo": 0.2, "hi": 0.23}
    (folder / "eval.json").write_text(json.dumps({"metrics": {"fvu": fvu}}))


def explain(folder: Path) -> None:
    """Feature 0 gets markup; 1 and 2 a lexical and a model's explanation, the model's with the higher score."""
    said = [Explanation.new(feature=0, text=MARKED, source="person")]
    said += [
        Explanation.new(feature=i, text=f"lexical words {i}", source="lexical", explainer="tokens") for i in (1, 2)
    ]
    said += [
        Explanation.new(feature=i, text=f"model words {i}", source="llm", explainer="x", model="m") for i in (1, 2)
    ]
    with open_store(folder) as store:
        store.add_explanations(said)
        store.add_scores([_score(e, 0.9 if e.source == "llm" else 0.7) for e in said if e.feature == 1])


def _score(explanation: Explanation, value: float) -> Score:
    return Score(
        explanation_id=explanation.id,
        feature=explanation.feature,
        scorer="detection",
        value=value,
        lo=value - 0.1,
        hi=value + 0.08,
        n=40,
        chance=0.5,
        control=0.53,
        failures=2,
        cost_tokens=100,
        created=explanation.created,
        model="judge",
    )


def empty_store(folder: Path) -> None:
    """A dictionary folder whose store has no features."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps({"architecture": "topk", "d_in": D_IN, "d_sae": 0}))
    nothing = {"row": np.zeros(0, np.int64), "feature": np.zeros(0, np.int32), "value": np.zeros(0, np.float32)}
    pq.write_table(pa.table(planted_text(3)), folder / "tokens.parquet")
    pq.write_table(pa.table(nothing), folder / "codes.parquet")
    build_store(
        folder / "features.duckdb",
        codes=[folder / "codes.parquet"],
        tokens=[folder / "tokens.parquet"],
        n_features=0,
        vocab=VOCAB,
        meta={"signed": "false"},
        options=BuildOptions(memory="512MiB", threads=1),
    )


@pytest.fixture
def open_page(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """open_page("feature", run="demo", dictionary="full", feature="1"): the page at that address."""

    def show(view: str, /, root: Path = runs, **query: str) -> AppTest:
        monkeypatch.setenv("SAE_RUNS_DIR", str(root))
        app = AppTest.from_file(str(MAIN), default_timeout=60)
        for key, value in query.items():
            app.query_params[key] = value
        if view != "overview":
            app.run()  # pages exist once the frame has run
            for key, value in query.items():
                app.query_params[key] = value
            app.switch_page(f"views/{view}.py")
        app.run()
        assert not app.exception, app.exception[0].value
        return app

    return show


def html_of(app: AppTest) -> str:
    """Everything that the page shows as HTML of ours, the style sheet aside."""
    bodies = [element.proto.body for element in app.get("html")]
    return "\n".join(body for body in bodies if not body.startswith("<style>"))


@pytest.fixture(scope="session", autouse=True)
def _let_go() -> Iterator[None]:
    """Close the stores that the pages keep open."""
    yield
    st.cache_resource.clear()
