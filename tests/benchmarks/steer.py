"""What steering costs a generated token: forward passes of one token with a KV cache, without and with edits.

A model of SmolLM2-135M's shape and a dictionary of 9,216 latents, with random weights: they do not change the time.
Variants take turns in blocks of eight tokens and each goes on in its own cache, so that a change of the machine's load
meets all alike; medians over all tokens. Prints one JSON line a variant.

    python tests/benchmarks/steer.py [--device cuda] [--dtype bfloat16] [--tokens 160]
"""

import argparse
import json
import statistics
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import Statistics
from steering import Add, Clamp, ProjectOut, SteeringVector, steer
from steering.edit import Edit

HOOK, D, D_SAE, BLOCK = "blocks.15.hook_resid_post", 576, 9216, 8


def make_model(device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)


def make_dictionary(device: str) -> TopKSAE:
    sae = TopKSAE(TopKConfig(d_in=D, d_sae=D_SAE, k=32))
    sae.initialise(torch.zeros(D), seed=0)
    sae.metadata = {"hook_name": HOOK}
    ones = torch.ones(D_SAE)
    sae.statistics = Statistics(ones, ones, 0 * ones, n_tokens=1, median_norm=1.0, sink_threshold=1e9)
    return sae.to(device).requires_grad_(False)


def variants(sae: TopKSAE) -> dict[str, list[Edit]]:
    vectors = [SteeringVector.from_latent(sae, i).scaled(0.1) for i in range(8)]
    return {
        "base": [],
        "1 add": [Add(vectors[0])],
        "8 add": [Add(vector) for vector in vectors],
        "8 project out": [ProjectOut(vector) for vector in vectors],
        "1 clamp": [Clamp(sae, 0, 1.0)],
        "8 clamp": [Clamp(sae, i, 1.0) for i in range(8)],
    }


@torch.inference_mode()
def measure(model: LlamaForCausalLM, edits: dict[str, list[Edit]], n_tokens: int) -> dict[str, list[float]]:
    """Seconds of each timed token, by variant."""
    device = model.device
    prompt = torch.arange(100, 132, device=device)[None]
    caches = {name: DynamicCache(config=model.config) for name in edits}
    seconds: dict[str, list[float]] = {name: [] for name in edits}
    for name, cache in caches.items():
        with steer(model, edits[name]):
            model(prompt, past_key_values=cache)
    token = prompt[:, :1]
    for turn in range(n_tokens // BLOCK):
        order = [*edits]
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            with steer(model, edits[name]):
                for timed in [False] + [True] * BLOCK:  # the first makes the edits ready on the device
                    start = time.perf_counter()
                    model(token, past_key_values=caches[name]).logits.argmax(dim=-1).tolist()
                    if timed:
                        seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=160)
    args = parser.parse_args()
    model = make_model(args.device, getattr(torch, args.dtype))
    seconds = measure(model, variants(make_dictionary(args.device)), args.tokens)
    base = statistics.median(seconds["base"])
    for name, found in seconds.items():
        median = statistics.median(found)
        about = {"device": args.device, "dtype": args.dtype, "threads": torch.get_num_threads(), "n": len(found)}
        print(json.dumps({"variant": name, "ms_per_token": median * 1e3, "over_base": median / base - 1, **about}))


if __name__ == "__main__":
    main()
