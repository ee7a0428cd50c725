"""A tiny random language model and a tiny run folder of planted activations: fast, and known in every number."""

from collections.abc import Mapping, Sequence
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
from data.planted import WorldConfig, build_world
from sae.architectures.topk import TopKConfig, TopKSAE

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


def plant(run: Run, shards: Sequence[tuple[Tokens, Tensor]], *, find_sinks: bool = False, hook: str = HOOK) -> None:
    """Put rows and their tokens into a run as its cache at `hook`, the way a capture does."""
    folder = run.path / "activations"
    tokens, parts = Shards(folder / "tokens"), []
    for i, (columns, rows) in enumerate(shards):
        tokens.write(i, to_disk(columns))
        parts.append(Part(i, columns.positions, lambda _hooks, _tell, rows=rows: {hook: rows}))
    tokens.finish(len(shards))
    first = shards[0][1]
    dtype = str(first.dtype).removeprefix("torch.")
    facts = {"hook": hook, "dtype": dtype, "gradients": False, "d_in": first.shape[1], "heads": None}
    n_tokens = sum(len(rows) for _, rows in shards)
    caches = {hook: Shards(folder / hook)}
    write_rows(caches, parts, {hook: facts}, n_tokens=n_tokens, skip_first=True, find_sinks=find_sinks)


def planted_run(
    path: Path,
    rows: Tensor | Mapping[str, Tensor],
    *,
    context: int = 16,
    per_shard: int = 512,
    n_docs: int = 40,
    first_id: int = 0,
) -> Run:
    """A run whose cache holds `rows` at HOOK, or at each of several hooks: no sinks, contexts of 16, documents spread
    evenly, token ids counted from `first_id`."""
    at_hooks = {HOOK: rows} if isinstance(rows, Tensor) else rows
    n = len(next(iter(at_hooks.values()))) // context * context
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
    whole = Tokens(ids=(row + first_id) % 101, docs=row // context % n_docs, positions=row % context)
    parts = [slice(at, min(at + per_shard, n)) for at in range(0, n, per_shard)]
    for hook, here in at_hooks.items():
        plant(run, [(Tokens(*(x[part] for x in whole[:3])), here[part]) for part in parts], hook=hook)
    return run


def planted_rows(n: int, d: int, n_true: int, l0: int, *, signed: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(rows, true unit directions): each row is about `l0` directions with sizes near 1.5, of either sign when
    `signed`, and some noise; all directions are as frequent."""
    world = build_world(
        WorldConfig(
            n_features=n_true,
            d_in=d,
            max_prob=l0 / n_true,
            min_prob=l0 / n_true,
            n_trees=0,
            rank=0,
            signed=signed,
            sizes=(1.5, 1.5),
            spread=0.3,
            orthogonal_steps=0,
            bias=0.0,
            noise=0.01,
            seed=seed,
        )
    )
    return world.sample(n, torch.Generator().manual_seed(seed))[0], world.directions


def tiny_dictionary(d_sae: int, k: int = 3) -> TopKSAE:
    """A TopK dictionary of `tiny_model` at HOOK with random weights."""
    sae = TopKSAE(TopKConfig(d_in=32, d_sae=d_sae, k=k))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        sae.W_enc.normal_(generator=generator)
        sae.W_dec.normal_(generator=generator)
    sae.metadata = {"hook_name": HOOK, "model_name": "tiny"}
    return sae
