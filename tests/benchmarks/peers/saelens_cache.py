"""SAELens' own activation cache, timed: runs in SAELens' environment, not in ours; started by tests.benchmarks.capture.

    python saelens_cache.py --model FOLDER --ids ids.npy --hooks HOOK [HOOK2 ...] --out FOLDER

ids.npy holds contexts of token ids, int32. Prints one JSON line: seconds and bytes summed over the hooks, tokens of
each. Timed is CacheActivationsRunner.run() alone, after one batch to warm up. SAELens fills whole buffers, going round
the corpus again when it ends: the line counts what it wrote.
"""

import argparse
import importlib.metadata
import json
import math
import os
import re
import resource
import time
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "WANDB_MODE": "disabled"}

import numpy as np
import torch
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from transformer_lens import loading_from_pretrained

# What TransformerLens calls it -> the module of the block with that output, for AutoModelForCausalLM.
MODULES = {"hook_resid_post": "", "hook_mlp_out": ".mlp", "hook_attn_out": ".self_attn"}


def hf_name(hook: str) -> str:
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook)
    assert match, hook
    return f"model.layers.{match[1]}{MODULES[match[2]]}"


def make_runner(args: argparse.Namespace, ids: np.ndarray, hook: str, out: Path) -> CacheActivationsRunner:
    """One buffer for each 2 GB (SAELens' own bound), all of one length, so that little is captured twice."""
    context = ids.shape[1]
    d_in = json.loads((Path(args.model) / "config.json").read_text())["hidden_size"]
    token_bytes = d_in * getattr(torch, args.dtype).itemsize
    n_buffers = math.ceil(ids.size * token_bytes / (args.buffer_gb * 1e9))
    n_batches = math.ceil(len(ids) / (n_buffers * args.batch))  # in a buffer
    config = CacheActivationsRunnerConfig(
        dataset_path="",  # the dataset is passed in: a path would be looked up on the hub
        model_name=args.model,
        model_class_name=args.model_class,
        model_from_pretrained_kwargs={"dtype": getattr(torch, args.model_dtype)},
        model_batch_size=args.batch,
        hook_name=hook if args.model_class == "HookedTransformer" else hf_name(hook),
        d_in=d_in,
        context_size=context,
        training_tokens=n_buffers * n_batches * args.batch * context,
        buffer_size_gb=(n_batches * args.batch * context * token_bytes + 1) / 1e9,
        new_cached_activations_path=str(out),
        dtype=args.dtype,
        device=args.device,
        autocast_lm=args.autocast,
        prepend_bos=False,
        streaming=False,
        shuffle=False,
    )
    loading_from_pretrained.OFFICIAL_MODEL_NAMES.append(args.model)  # else HookedTransformer refuses a folder
    return CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"input_ids": ids}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--ids", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--hooks", nargs="+", required=True)
    parser.add_argument("--model-class", default="AutoModelForCausalLM", help="or HookedTransformer")
    parser.add_argument("--model-dtype", default="float32")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument(
        "--dtype", default="float32", help="of the rows on disk: float32 or float16; Arrow has no other"
    )
    parser.add_argument("--batch", type=int, default=64, help="contexts in a forward pass")
    parser.add_argument("--buffer-gb", type=float, default=2.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    ids = np.load(args.ids)
    seconds = sync_seconds = 0.0
    n_tokens = 0
    for hook in args.hooks:
        runner = make_runner(args, ids, hook, Path(args.out) / hook)
        with torch.no_grad():
            runner.activations_store.get_activations(torch.from_numpy(ids[: args.batch]).long().to(args.device))
        os.sync()
        start = time.perf_counter()
        dataset = runner.run()
        ran = time.perf_counter()
        os.sync()
        seconds += ran - start
        sync_seconds += time.perf_counter() - ran
        n_tokens = len(dataset) * ids.shape[1]  # of each hook
        del runner, dataset
    packages = ("sae-lens", "transformer-lens", "transformers", "datasets", "torch")
    row = {
        "seconds": seconds,
        "sync_seconds": sync_seconds,
        "tokens_written": n_tokens,
        "bytes": sum(file.stat().st_size for file in Path(args.out).rglob("*") if file.is_file()),
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "versions_of_peer": {package: importlib.metadata.version(package) for package in packages},
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
