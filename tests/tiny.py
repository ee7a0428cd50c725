"""A tiny random language model and a tiny run folder of planted activations: fast, and known in every number."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from activations.run import Run
from activations.shards import Shards, statistics

HOOK = "blocks.0.hook_resid_post"


def tiny_model(seed: int = 0, n_layers: int = 3) -> LlamaForCausalLM:
    """A 3-layer Llama of width 32 with random weights, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 101 words, w0 to w100."""
    vocab = {f"w{i}": i for i in range(101)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="w0")), pad_token="w0")


def planted_run(path: Path, rows: Tensor, *, context: int = 16, per_shard: int = 512, n_docs: int = 40) -> Run:
    """A run whose cache holds `rows` at HOOK: no sinks, contexts of 16, documents spread evenly."""
    n = len(rows) // context * context
    run = Run.create(
        path,
        model="none",
        revision="none",
        model_dtype="float32",
        corpus="none",
        corpus_hash="",
        context=context,
        n_tokens=n,
    )
    tokens, cache = Shards(path / "activations" / "tokens"), Shards(path / "activations" / HOOK)
    cache.update(d_in=rows.shape[1], dtype="float32", sink_threshold=1e9)
    docs = torch.from_numpy(np.repeat(np.arange(n // context) % n_docs, context).astype(np.int32))
    for start in range(0, n, per_shard):
        part = slice(start, min(start + per_shard, n))
        size = part.stop - part.start
        positions = torch.arange(size, dtype=torch.int32) % context
        ids = torch.arange(part.start, part.stop, dtype=torch.int32) % 101
        tokens.append({"ids": ids, "docs": docs[part], "positions": positions}, size)
        mask = positions > 0
        cache.append({"rows": rows[part], "mask": mask, **statistics(rows[part], mask, 0)}, size)
    tokens.update(complete=True)
    cache.update(complete=True)
    return run


def planted_rows(n: int, d: int, n_true: int, l0: int, *, signed: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(rows, true unit directions): each row is `l0` directions with sizes 1 to 2, of either sign when `signed`."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_true, d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    chosen = torch.rand(n, n_true, generator=generator).topk(l0, dim=1).indices
    sizes = 1 + torch.rand(n, l0, generator=generator)
    if signed:
        sizes = sizes * (torch.randint(0, 2, (n, l0), generator=generator) * 2 - 1)
    rows = torch.zeros(n, n_true).scatter_(1, chosen, sizes) @ directions
    return rows + 0.01 * torch.randn(n, d, generator=generator), directions
