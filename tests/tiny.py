"""A tiny random language model and a tiny run folder of planted activations: fast, and known in every number."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from activations.capture import Part, write_rows
from activations.run import Run
from activations.shards import Shards
from activations.tokens import Tokens, to_disk

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


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """As `tiny_tokenizer`, and text is cut into words at its spaces."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def plant(run: Run, shards: Sequence[tuple[Tokens, Tensor]], *, find_sinks: bool = False) -> None:
    """Put rows and their tokens into a run as its cache at HOOK, the way a capture does."""
    folder = run.path / "activations"
    tokens, parts = Shards(folder / "tokens"), []
    for i, (columns, rows) in enumerate(shards):
        tokens.write(i, to_disk(columns))
        parts.append(Part(i, columns.positions, lambda _hooks, _tell, rows=rows: {HOOK: rows}))
    tokens.finish(len(shards))
    first = shards[0][1]
    dtype = str(first.dtype).removeprefix("torch.")
    facts = {"hook": HOOK, "dtype": dtype, "gradients": False, "d_in": first.shape[1], "heads": None}
    n_tokens = sum(len(rows) for _, rows in shards)
    caches = {HOOK: Shards(folder / HOOK)}
    write_rows(caches, parts, {HOOK: facts}, n_tokens=n_tokens, skip_first=True, find_sinks=find_sinks)


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
    row = torch.arange(n, dtype=torch.int32)
    whole = Tokens(ids=row % 101, docs=row // context % n_docs, positions=row % context)
    parts = [slice(at, min(at + per_shard, n)) for at in range(0, n, per_shard)]
    plant(run, [(Tokens(*(x[part] for x in whole[:3])), rows[part]) for part in parts])
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
