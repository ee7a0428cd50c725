"""A random Llama of four layers and width 32, and a dictionary that is an orthonormal basis."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from activations import Model
from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import Statistics
from steering import SteeringVector

D = 32
N_WORDS = 64
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="session")
def tiny() -> Model:
    """Float32; its tokenizer knows the words w0 to w61, [PAD] (62) and [UNK] (63)."""
    words = {f"w{i}": i for i in range(N_WORDS - 2)} | {"[PAD]": N_WORDS - 2, "[UNK]": N_WORDS - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=N_WORDS,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = LlamaForCausalLM(config)
    return Model("tiny", "random-0", hf.eval().requires_grad_(False), tokenizer)


@pytest.fixture(scope="session")
def make_vector() -> Callable[..., SteeringVector]:
    """make_vector(seed, d=, hook=, sink_threshold=): a random direction, long enough to change what is written."""

    def make(seed: int, d: int = D, hook: str = HOOK, sink_threshold: float | None = None) -> SteeringVector:
        direction = torch.randn(d, generator=torch.Generator().manual_seed(seed))
        return SteeringVector(direction=direction, hook=hook, unit="raw", unit_size=1.0, sink_threshold=sink_threshold)

    return make


@pytest.fixture
def vector(make_vector) -> SteeringVector:
    return make_vector(1)


@pytest.fixture
def basis() -> TopKSAE:
    """A dictionary whose decoder rows are an orthonormal basis, its encoder the transpose: z_i = ReLU(x . d_i)."""
    return planted(TopKSAE(TopKConfig(d_in=D, d_sae=D, k=D)), least=0.0)


@pytest.fixture
def signed_basis() -> AbsTopKSAE:
    """The same basis, signed: z_i = x . d_i, so that it explains every row."""
    return planted(AbsTopKSAE(AbsTopKConfig(d_in=D, d_sae=D, k=D)), least=-1.5)


def planted(sae, least: float):  # type: ignore[no-untyped-def]
    """`sae` with a seeded orthonormal basis; latent i was seen up to i / 10 and down to `least`, latent 0 never."""
    rows = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5)))[0]
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
    sae.metadata = {"hook_name": HOOK, "model_name": "tiny"}
    largest = torch.arange(D) / 10
    smallest = torch.full((D,), least)
    smallest[0] = 0.0
    sae.statistics = Statistics(
        density=(largest > 0).float(), max=largest, min=smallest, n_tokens=1000, median_norm=2.0, sink_threshold=1e9
    )
    return sae
