"""Each format against the code that it comes from: the same latents and reconstructions, both ways. JSON lines.

Run in an environment that has the peer beside torch (not part of `make test`), for instance
    python -m tests.benchmarks.interop --peer sparsify
A peer's dictionary gets random weights, also where it starts at 0, and is saved by the peer's code; ours of what was
read is compared with the peer's own. Then ours is written and the peer's loader reads it. `latents` and
`reconstruction` are the largest differences over `rows` normal rows; `on` the mean number of latents that are not 0;
`on_threshold` how many lay within 1e-5 of their JumpReLU threshold, on one side here and on the other there.
OpenAI's and OpenMOSS' code is on no registry: tests/sae/test_interop*.py have their formulas, and what SAELens reads of
OpenMOSS and Gemma Scope is compared with it.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae.base import SAE
from sae.files import load_sae, save_sae
from sae.interop import dictionary_learning, saelens, sparsify
from sae.registry import REGISTRY
from tests.benchmarks.peers.imports import without_init

D_IN, D_SAE, K, ROWS = 64, 512, 16, 4096
ATOL = 1e-5


class Case(NamedTuple):
    """One direction of one kind of dictionary."""

    kind: str
    direction: str
    ours: SAE
    z: Tensor
    """The peer's latents, dense."""
    x_hat: Tensor
    factor: Tensor | float = 1.0
    """What ours are that many times of, where a format's latents are in other units."""


def rows() -> Tensor:
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def shake(module: nn.Module, size: float = 0.1) -> None:
    """Random parameters all over: biases and norms that are 0 or 1 would hide what is not folded."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def ours_of(name: str, **fields: Any) -> SAE:
    """A dictionary of ours with random weights."""
    entry = REGISTRY[name]
    sae = entry.sae(entry.config(d_in=D_IN, d_sae=D_SAE, **{entry.sparsity: K}, **fields))
    sae.initialise(rows()[:512], 0)
    shake(sae)
    if "threshold" in sae.saved:
        sae.get_buffer("threshold").fill_(1.5)
    sae.metadata = {"model_name": "m", "hook_name": "blocks.3.hook_resid_post"}
    return sae


# SAELens


def of_saelens(folder: Path) -> Iterator[Case]:
    import sae_lens
    from sae_lens import SAE as Theirs

    x, common = rows(), {"d_in": D_IN, "d_sae": D_SAE, "device": "cpu"}
    kinds: list[tuple[str, Any, dict[str, Any]]] = [
        ("standard", sae_lens.StandardSAEConfig, {}),
        ("topk", sae_lens.TopKSAEConfig, {"k": K}),
        ("jumprelu", sae_lens.JumpReLUSAEConfig, {}),
        ("gated", sae_lens.GatedSAEConfig, {}),
    ]
    variants: list[tuple[str, dict[str, Any]]] = [("", {}), ("not centred", {"apply_b_dec_to_input": False})]
    cases = [
        (f"{name} {variant}".strip(), config(**common, **fields, **more))
        for name, config, fields in kinds
        for variant, more in variants
    ]
    for scaled in (True, False):
        cases.append(
            (f"topk rescaled {scaled}", sae_lens.TopKSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=scaled))
        )
    for plain in (True, False):
        config = sae_lens.TopKSAEConfig(**common, k=K, normalize_activations="layer_norm", apply_b_dec_to_input=plain)
        cases.append((f"topk layer_norm {plain}", config))
    for i, (kind, config) in enumerate(cases):
        peer = Theirs.from_dict({**config.to_dict(), "architecture": config.architecture()})
        shake(peer)
        if "jumprelu" in kind:
            peer.threshold.data.abs_().mul_(10)
        peer.save_model(folder / f"s{i}")
        with torch.no_grad():
            z = peer.encode(x)
            x_hat = peer.decode(z)
        per_row = x.std(dim=1, correction=0, keepdim=True) if "layer_norm" in kind else 1.0
        yield Case(kind, "read", load_sae(folder / f"s{i}"), z.to_dense(), x_hat, per_row)
    yield from of_its_loaders(folder)
    for name in saelens.WRITES:
        ours = ours_of(name)
        saelens.write(ours, folder / name)
        peer = Theirs.load_from_disk(folder / name)
        with torch.no_grad():
            z = peer.encode(x)
            yield Case(name, "write", ours, z.to_dense(), peer.decode(z))


@torch.no_grad()
def of_its_loaders(folder: Path) -> Iterator[Case]:
    """Gemma Scope and OpenMOSS, which SAELens reads too. It knows no decoder norms in thresholds: rows have norm 1."""
    import numpy as np
    from sae_lens import SAE as Theirs
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from safetensors.torch import save_file

    x, generator = rows(), torch.Generator().manual_seed(3)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator), dim=1)
    parts = {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec, "b_enc": 0.1 * torch.randn(D_SAE, generator=generator)}
    parts["b_dec"] = 0.1 * torch.randn(D_IN, generator=generator)
    linear = {"encoder.weight": parts["W_enc"].T, "decoder.weight": W_dec.T}
    linear |= {"encoder.bias": parts["b_enc"], "decoder.bias": parts["b_dec"]}
    linear = {name: each.contiguous() for name, each in linear.items()}
    threshold = 1 + torch.rand(D_SAE, generator=generator)
    norm, hook = 20.0, "blocks.3.hook_resid_post"
    factor = D_IN**0.5 / norm
    about = {"d_model": D_IN, "d_sae": D_SAE, "expansion_factor": D_SAE // D_IN, "act_fn": "jumprelu"}
    about |= {"hook_point_in": hook, "hook_point_out": hook, "norm_activation": "dataset-wise"}

    gemma = folder / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k"
    old, new = folder / "L3R-8x", folder / "L3R-new"
    for each in (gemma, old / "checkpoints", new):
        each.mkdir(parents=True)
    np.savez(gemma / "params.npz", **{name: each.numpy() for name, each in parts.items()}, threshold=threshold.numpy())
    norms = {"dataset_average_activation_norm": {"in": norm, "out": norm}}
    (old / "hyperparams.json").write_text(json.dumps({**about, **norms, "jump_relu_threshold": 1.5}))
    save_file(linear, old / "checkpoints" / "final.safetensors")
    (new / "config.json").write_text(json.dumps({**about, **norms}))
    save_file({**linear, "log_jumprelu_threshold": (factor * threshold).log()}, new / "sae_weights.safetensors")

    def local(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        return str(Path(repo_id) / subfolder / filename)

    loaders.hf_hub_download = local
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"}
    where = str(gemma.parent.parent)  # its loader takes the sizes of real models from the names
    calls: list[tuple[str, Path, Any, str, str]] = [
        ("Gemma Scope", gemma, loaders.gemma_2_sae_huggingface_loader, where, "layer_3/width_16k"),
        ("Llama Scope", old, loaders.llama_scope_sae_huggingface_loader, str(folder), old.name),
        ("OpenMOSS", new, loaders.llama_scope_r1_distill_sae_huggingface_loader, str(folder), new.name),
    ]
    for kind, at, loader, repo, name in calls:
        more = {} if kind == "Gemma Scope" else {"dtype": "float32"}
        cfg, state, _ = loader(repo, name, device="cpu", cfg_overrides=sizes if not more else more)
        peer = Theirs.from_dict(loaders.handle_pre_6_0_config(cfg))
        peer.load_state_dict(state)
        if more:
            peer.fold_activation_norm_scaling_factor(factor)
        z = peer.encode(x)
        yield Case(kind, "read", load_sae(at), z, peer.decode(z), 1.0 if not more else 1 / factor)


# dictionary_learning


def of_dictionary_learning(folder: Path) -> Iterator[Case]:
    without_init("dictionary_learning")  # it would import nnsight
    from dictionary_learning import dictionary as d
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    loaders: dict[str, Any] = {
        **{each.__name__: each for each in (d.AutoEncoder, d.AutoEncoderNew, d.GatedAutoEncoder)},
        **{each.__name__: each for each in (d.JumpReluAutoEncoder, AutoEncoderTopK, BatchTopKSAE)},
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE,
    }
    x = rows()

    def loaded(at: Path) -> Any:
        kind = json.loads((at / "config.json").read_text())["trainer"]["dict_class"]
        return loaders[kind].from_pretrained(str(at / "ae.pt"))

    made: dict[str, Any] = {
        "AutoEncoderTopK": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
        "BatchTopKSAE": lambda: BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [32, 96, 384]),
    }
    for kind, loader in loaders.items():
        peer = made.get(kind, lambda loader=loader: loader(D_IN, D_SAE))()
        shake(peer)
        if "Batch" in kind:
            peer.threshold.fill_(2.0)
        at = folder / kind
        at.mkdir()
        torch.save(peer.state_dict(), at / "ae.pt")
        about = {"dict_class": kind, "k": K, "layer": 3, "lm_name": "m"}
        (at / "config.json").write_text(json.dumps({"trainer": about}))
        peer = loaded(at)
        with torch.no_grad():
            z = peer.encode(x)
            yield Case(kind, "read", load_sae(at), z, peer.decode(z))
    for name in dictionary_learning.WRITES:
        ours = ours_of(name)
        if name == "standard":  # its loader brings rows to norm 1
            ours.W_dec.data /= ours.W_dec.data.norm(dim=1, keepdim=True)
        dictionary_learning.write(ours, folder / f"ours-{name}")
        peer = loaded(folder / f"ours-{name}")
        with torch.no_grad():
            z = peer.encode(x)
            yield Case(name, "write", ours, z, peer.decode(z))


# sparsify


def of_sparsify(folder: Path) -> Iterator[Case]:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    x = rows()

    def run(peer: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            values, places, _ = peer.encode(x)
            out = peer(x).sae_out
        return torch.zeros(ROWS, D_SAE).scatter_(1, places, values), out

    kinds: dict[str, dict[str, Any]] = {
        "topk": {},
        "topk, num_latents 0": {"num_latents": 0, "expansion_factor": D_SAE // D_IN},
        "groupmax": {"activation": "groupmax"},
        "transcoder": {"transcode": True},
        "skip transcoder": {"transcode": True, "skip_connection": True},
        "free rows": {"normalize_decoder": False},
    }
    for i, (kind, fields) in enumerate(kinds.items()):
        peer = SparseCoder(D_IN, SparseCoderConfig(**{"num_latents": D_SAE, "k": K, **fields}))
        shake(peer)
        peer.save_to_disk(folder / f"layers.{i}.mlp")
        yield Case(kind, "read", load_sae(folder / f"layers.{i}.mlp"), *run(peer))
    for name in sparsify.WRITES:
        ours = ours_of(name, **({"d_out": D_IN} if "transcoder" in name else {}))
        sparsify.write(ours, folder / f"ours-{name}")
        yield Case(name, "write", ours, *run(SparseCoder.load_from_disk(folder / f"ours-{name}")))


PEERS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "saelens": of_saelens,
    "dictionary_learning": of_dictionary_learning,
    "sparsify": of_sparsify,
}


@torch.no_grad()
def compare(case: Case, folder: Path) -> dict[str, Any]:
    """The largest differences; ours goes through our own files too, as `sae import` would have it."""
    save_sae(case.ours, folder / "again")
    x, again = rows(), load_sae(folder / "again")
    z = again.encode(x)
    apart = (z / case.factor - case.z).abs()
    turned = torch.zeros_like(z, dtype=torch.bool)
    if "threshold" in dict(again.named_parameters()):  # a value on its threshold may round to either side
        turned = ((z != 0) != (case.z != 0)) & ((z + case.z - again.get_parameter("threshold")).abs() < ATOL)
    apart[turned] = 0.0
    x_hat_apart = (again.reconstruct(x) - case.x_hat).abs()[~turned.any(dim=1)]
    return {
        "kind": case.kind,
        "direction": case.direction,
        "rows": ROWS,
        "on": round(float((case.z != 0).sum(dim=1).float().mean()), 2),
        "latents": float(apart.max()),
        "on_threshold": int(turned.sum()),
        "differ": int((apart > ATOL).sum()),
        "reconstruction": float(x_hat_apart.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer", choices=list(PEERS), required=True, help="which peer's environment this is")
    args = parser.parse_args()
    worst = 0
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for case in PEERS[args.peer](Path(folder)):
            found = compare(case, Path(folder))
            worst = max(worst, found["differ"])
            print(json.dumps({"peer": args.peer, **found}), flush=True)
    sys.exit(worst > 0)


if __name__ == "__main__":
    main()
