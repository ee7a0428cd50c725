"""Dictionaries in other tools' files: small files in their exact form, latents and reconstructions by hand.

The peers' own code is asked in tests/benchmarks/interop.py.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from activations.errors import InputError
from sae import SAE, load_sae
from sae.files import save_sae
from sae.interop import detect, dictionary_learning, saelens, sparsify
from sae.registry import REGISTRY

T = torch.tensor
X = T([[3.0, 4.0]])


def check(sae: SAE, x: torch.Tensor, z: list[float], x_hat: list[float], atol: float = 1e-5) -> None:
    torch.testing.assert_close(sae.encode(x), T([z]), atol=atol, rtol=1e-5)
    torch.testing.assert_close(sae.reconstruct(x), T([x_hat]), atol=atol, rtol=1e-5)


def put(folder: Path, name: str, cfg: object, **tensors: torch.Tensor) -> Path:
    """A folder with settings and weights; the weights' name says their form."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key.replace("__", "."): each.contiguous() for key, each in tensors.items()}
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".pt"):
        torch.save(weights, folder / name)
    elif name.endswith(".npz"):
        np.savez(folder / name, **{key: each.numpy() for key, each in weights.items()})
    else:
        save_file(weights, folder / name)
    if cfg is not None:
        config = {"sae.safetensors": "cfg.json", "sae_weights.safetensors": "cfg.json"}.get(name, "config.json")
        (folder / config).write_text(json.dumps(cfg))
    return folder


# Gemma Scope: pre-activations of X, which is not centred, are [3, 3, 1.5]

GEMMA = {
    "W_enc": T([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]]),
    "b_enc": T([0.0, -1.0, 0.5]),
    "W_dec": T([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]),
    "b_dec": T([1.0, 2.0]),
    "threshold": T([2.0, 3.5, -0.1]),
}
GEMMA_PLACE = "models--google--gemma-scope-2b-pt-res/snapshots/0/layer_12/width_16k/average_l0_82"


def test_gemma_scope_is_not_centred_and_has_a_threshold_a_latent(tmp_path):
    folder = put(tmp_path / GEMMA_PLACE, "params.npz", None, **GEMMA)
    for place in (folder, folder / "params.npz"):
        sae = load_sae(place)
        assert (sae.architecture, sae.hook) == ("jumprelu", "blocks.12.hook_resid_post")
        assert sae.model_name == "google/gemma-2-2b"
        check(sae, X, [3.0, 0.0, 1.5], [7.0, 5.0])
    low = T([[-3.0, -4.0]])  # pre-activations [-3, -5, -0.5]: what is below 0 is off, whatever its threshold
    check(sae, low, [0.0, 0.0, 0.0], [1.0, 2.0])


def test_gemma_scope_2_has_the_same_under_other_names(tmp_path):
    names = {key: key.lower() for key in GEMMA}
    place = tmp_path / "gemma-scope-2-1b-pt" / "resid_post" / "layer_7_width_16k_l0_small"
    folder = put(place, "params.safetensors", {"architecture": "jump_relu"}, **{names[k]: v for k, v in GEMMA.items()})
    sae = load_sae(folder)
    assert (sae.model_name, sae.hook) == ("google/gemma-3-1b-pt", "blocks.7.hook_resid_post")
    check(sae, X, [3.0, 0.0, 1.5], [7.0, 5.0])


# OpenMOSS: d is 4 and the mean norm 4, so that x is halved: X_MOSS is [2, 4, 0, 0], pre-activations are [2, 5, 1], and
# times the norms of the decoder's rows [2, 10, 0.5]

X_MOSS = T([[4.0, 8.0, 0.0, 0.0]])
MOSS = {
    "W_E": T([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    "b_E": T([0.0, 1.0, 3.0]),
    "W_D": T([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0]]),
    "b_D": T([0.0, 0.0, 0.0, 1.0]),
}
MOSS_CFG = {
    "sae_type": "sae",
    "d_model": 4,
    "expansion_factor": 0.75,
    "act_fn": "relu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "use_decoder_bias": True,
    "hook_point_in": "blocks.5.hook_resid_post",
    "hook_point_out": "blocks.5.hook_resid_post",
    "top_k": 1,
}
MOSS_NORM = {"dataset_average_activation_norm.blocks.5.hook_resid_post": T(4.0)}


def moss(folder: Path, changes: dict[str, object], **tensors: torch.Tensor) -> Path:
    folder = put(folder, "sae_weights.safetensors", None, **{**MOSS, **MOSS_NORM, **tensors})
    (folder / "config.json").write_text(json.dumps({**MOSS_CFG, **changes}))
    return folder


def test_openmoss_norms_of_the_data_are_folded_into_biases_and_thresholds(tmp_path):
    threshold = {"activation_function.log_jumprelu_threshold": T([1.0, 11.0, 0.4]).log()}
    sae = load_sae(moss(tmp_path / "jump", {"act_fn": "jumprelu"}, **threshold))
    assert (sae.architecture, sae.hook) == ("jumprelu", "blocks.5.hook_resid_post")
    check(sae, X_MOSS, [4.0, 0.0, 2.0], [4.0, 0.0, 1.0, 2.0])  # unfolded, latent 1 would pass its threshold
    free = load_sae(
        moss(tmp_path / "free", {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False}, **threshold)
    )
    check(free, X_MOSS, [4.0, 0.0, 2.0], [4.0, 0.0, 1.0, 2.0])
    folded = {"act_fn": "jumprelu", "norm_activation": "inference"}
    sae = load_sae(moss(tmp_path / "folded", folded, **threshold))
    check(sae, T([[2.0, 4.0, 0.0, 0.0]]), [2.0, 0.0, 1.0], [2.0, 0.0, 0.5, 1.0])


def test_openmoss_relu_and_topk(tmp_path):
    check(load_sae(moss(tmp_path / "relu", {})), X_MOSS, [4.0, 10.0, 2.0], [4.0, 20.0, 1.0, 2.0])
    sae = load_sae(moss(tmp_path / "topk", {"act_fn": "topk"}))
    check(sae, X_MOSS, [0.0, 20.0, 0.0], [0.0, 20.0, 0.0, 2.0])  # in units of decoder rows of norm 1
    two = moss(tmp_path / "tc", {"act_fn": "topk", "hook_point_out": "blocks.5.hook_mlp_out"})
    weights = {**MOSS, **MOSS_NORM, "dataset_average_activation_norm.blocks.5.hook_mlp_out": T(2.0)}
    save_file(weights, two / "sae_weights.safetensors")
    sae = load_sae(two)
    assert (sae.architecture, sae.metadata["hook_names_out"]) == ("transcoder", ["blocks.5.hook_mlp_out"])
    torch.testing.assert_close(sae.reconstruct(X_MOSS), T([[0.0, 10.0, 0.0, 1.0]]))  # 5 * 2 and 1, divided by f_out = 1


def test_llama_scope_took_its_one_threshold_after_the_norm_was_folded(tmp_path):
    weights = {
        "encoder.weight": MOSS["W_E"].T,
        "encoder.bias": MOSS["b_E"],
        "decoder.weight": MOSS["W_D"].T,
        "decoder.bias": MOSS["b_D"],
    }
    folder = put(tmp_path / "L5R", "checkpoints/final.safetensors", None, **weights)
    about = {**MOSS_CFG, "act_fn": "jumprelu", "jump_relu_threshold": 3.0, "d_sae": 3}
    about |= {"dataset_average_activation_norm": {"in": 4.0, "out": 4.0}}
    (folder / "hyperparams.json").write_text(json.dumps(about))
    for place in (folder, folder / "checkpoints" / "final.safetensors"):
        check(load_sae(place), X_MOSS, [4.0, 10.0, 0.0], [4.0, 20.0, 0.0, 2.0])  # scores [4, 20, 1]


# sparsify: X - b_dec is [2, 3]

SPARSIFY = {
    "encoder.weight": T([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]]),
    "encoder.bias": T([0.0, 0.0, -10.0, 0.0]),
    "W_dec": T([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 1.0]]),
    "b_dec": T([1.0, 1.0]),
}
SPARSIFY_CFG = {
    "activation": "topk",
    "expansion_factor": 2,
    "normalize_decoder": False,
    "num_latents": 0,
    "k": 1,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": 2,
}


@pytest.mark.parametrize(
    ("changes", "architecture", "z", "x_hat"),
    [
        ({}, "topk", [0.0, 3.0, 0.0, 0.0], [1.0, 7.0]),
        ({"normalize_decoder": True, "num_latents": 4}, "topk", [0.0, 3.0, 0.0, 0.0], [1.0, 7.0]),
        ({"activation": "groupmax", "k": 2}, "groupmax", [0.0, 3.0, 0.0, 0.0], [1.0, 7.0]),
        ({"transcode": True}, "transcoder", [0.0, 4.0, 0.0, 0.0], [1.0, 9.0]),
        ({"transcode": True, "skip_connection": True}, "skip_transcoder", [0.0, 4.0, 0.0, 0.0], [5.0, 9.0]),
    ],
)
def test_sparsify_centres_x_unless_it_transcodes(tmp_path, changes, architecture, z, x_hat):
    skip = {"W_skip": T([[0.0, 1.0], [0.0, 0.0]])} if changes.get("skip_connection") else {}
    folder = put(tmp_path / "layers.7.mlp", "sae.safetensors", SPARSIFY_CFG | changes, **SPARSIFY, **skip)
    sae = load_sae(folder)
    assert sae.architecture == architecture
    assert sae.hook == ("blocks.7.hook_mlp_in" if "transcode" in changes else "blocks.7.hook_mlp_out")
    check(sae, X, z, x_hat)


# dictionary_learning: pre-activations of X are [2, 2, 1] centred and [3, 3, 1] not; the first decoder column has norm 2

ENCODER, DECODER = T([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]), T([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
BIAS, ONES = T([0.0, -1.0, 2.0]), T([1.0, 1.0])
LINEAR = {"encoder.weight": ENCODER, "decoder.weight": DECODER}
PLAIN = {"W_enc": ENCODER.T, "b_enc": BIAS, "W_dec": DECODER.T, "b_dec": ONES}
K2 = {"k": T(2, dtype=torch.int32)}
DL_CASES = {
    "AutoEncoder": ({**LINEAR, "encoder.bias": BIAS, "bias": ONES}, "standard", [4.0, 2.0, 1.0], [6.0, 3.0]),
    "AutoEncoderNew": ({**LINEAR, "encoder.bias": BIAS, "decoder.bias": ONES}, "standard", [3.0, 3.0, 1.0], [8.0, 4.0]),
    "GatedAutoEncoder": (
        {
            **LINEAR,
            "decoder_bias": ONES,
            "gate_bias": T([-3.0, 0.0, 2.0]),
            "r_mag": T([0.0, math.log(2.0), 0.0]),
            "mag_bias": T([0.0, -1.0, 3.0]),
        },
        "gated",
        [0.0, 5.0, 2.0],
        [3.0, 6.0],
    ),
    "AutoEncoderTopK": (
        {**LINEAR, "encoder.bias": BIAS, "b_dec": ONES, **K2, "threshold": T(1.0)},
        "topk",
        [2.0, 2.0, 0.0],
        [5.0, 3.0],
    ),
    "BatchTopKSAE": (
        {**LINEAR, "encoder.bias": BIAS, "b_dec": ONES, "k": T(1, dtype=torch.int32), "threshold": T(1.5)},
        "batchtopk",
        [2.0, 2.0, 0.0],
        [5.0, 3.0],
    ),
    "MatryoshkaBatchTopKSAE": (
        {**PLAIN, "k": T(1, dtype=torch.int32), "threshold": T(1.5), "group_sizes": T([1, 2])},
        "matryoshka",
        [2.0, 2.0, 0.0],
        [5.0, 3.0],
    ),
    "JumpReluAutoEncoder": ({**PLAIN, "threshold": T([3.5, 2.0, -1.0])}, "jumprelu", [0.0, 3.0, 1.0], [2.0, 4.0]),
}


@pytest.mark.parametrize("kind", DL_CASES)
def test_dictionary_learning_says_by_its_class_what_is_centred_and_scaled(tmp_path, kind):
    tensors, architecture, z, x_hat = DL_CASES[kind]
    about = {"dict_class": kind, "layer": 8, "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_8"}
    sae = load_sae(put(tmp_path / "trainer_0", "ae.pt", {"trainer": about}, **tensors))
    assert (sae.architecture, sae.hook) == (architecture, "blocks.8.hook_resid_post")
    assert sae.model_name == "EleutherAI/pythia-70m"
    check(sae, X, z, x_hat)
    if kind == "MatryoshkaBatchTopKSAE":
        assert sae.cfg.levels == (1, 3)


# OpenAI: [0, 3, 6] has mean 3 and (one degree of freedom less) standard deviation 3: it is standardised to [-1, 0, 1]

OPENAI = {
    "pre_bias": T([0.0, 0.0, 1.0]),
    "encoder.weight": T([[-1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]),
    "latent_bias": T([1.0, 0.5, 1.5]),
    "decoder.weight": T([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [2.0, 0.0, 1.0]]),
    "stats_last_nonzero": torch.zeros(3, dtype=torch.long),
    "latents_activation_frequency": torch.ones(3),
    "latents_mean_square": torch.zeros(3),
}


def openai_file(path: Path, **more: object) -> Path:
    torch.save({**OPENAI, **more}, path)
    return path


def test_openai_topk_standardises_each_row_and_latents_carry_its_size(tmp_path):
    state = {"activation": "TopK", "activation_state_dict": {"k": 1, "postact_fn": "ReLU"}}
    path = openai_file(tmp_path / "8.pt", **state)
    for place in (path, tmp_path):
        sae = load_sae(place)
        assert sae.architecture == "mlsae"
        check(sae, T([[0.0, 3.0, 6.0]]), [2 * math.sqrt(6), 0.0, 0.0], [9.0, 3.0, 18.0], atol=2e-4)
    # A tiny row shows the 1e-5 that is added to its standard deviation 3e-5: [-0.75, 0, 0.75] is what is read.
    small = sae.encode(T([[0.0, 3e-5, 6e-5]])) / (math.sqrt(6) * 1e-5)
    torch.testing.assert_close(small, T([[1.75, 0.0, 0.0]]), atol=1e-4, rtol=1e-4)


def test_openai_relu_does_not_standardise(tmp_path):
    # [0, 3, 6] less pre_bias is [0, 3, 5].
    sae = load_sae(openai_file(tmp_path / "relu.pt", activation="ReLU", activation_state_dict={}))
    check(sae, T([[0.0, 3.0, 6.0]]), [1.0, 8.5, 9.5], [1.0, 8.5, 2.0 + 9.5 + 1.0])


# SAELens: X - b_dec is [2, 3] and gives [2, 2, 1] where x is centred, [3, 3, 1] where not

SAELENS_CFG = {
    "architecture": "standard",
    "d_in": 2,
    "d_sae": 3,
    "dtype": "float32",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2"},
}
NOT_CENTRED = {"apply_b_dec_to_input": False}
OLD = {
    "hook_point": "blocks.1.hook_resid_post",
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": 1},
    "normalize_activations": False,
    "model_name": "gpt2",
    "metadata": {},
}


@pytest.mark.parametrize(
    ("changes", "z", "x_hat"),
    [
        ({}, [2.0, 2.0, 1.0], [6.0, 3.0]),
        (NOT_CENTRED, [3.0, 3.0, 1.0], [8.0, 4.0]),
        ({"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True}, [4.0, 2.0, 0.0], [5.0, 3.0]),
        (OLD | NOT_CENTRED | {"b_enc": [0.0, -2.0, 2.0]}, [3.0, 0.0, 0.0], [7.0, 1.0]),
        ({"architecture": "jumprelu", **NOT_CENTRED, "threshold": [3.5, 2.0, -1.0]}, [0.0, 3.0, 1.0], [2.0, 4.0]),
    ],
)
def test_saelens_options_are_folded(tmp_path, changes, z, x_hat):
    changes = dict(changes)
    more = {name: T(changes.pop(name)) for name in ("b_enc", "threshold") if name in changes}
    sae = load_sae(put(tmp_path / "s", "sae_weights.safetensors", SAELENS_CFG | changes, **{**PLAIN, **more}))
    assert (sae.hook, sae.model_name) == ("blocks.1.hook_resid_post", "gpt2")
    check(sae, X, z, x_hat)


def test_saelens_layer_norm_is_the_row_standardised(tmp_path):
    weights = {"W_enc": OPENAI["encoder.weight"].T, "b_enc": OPENAI["latent_bias"]}
    weights |= {"W_dec": OPENAI["decoder.weight"].T, "b_dec": OPENAI["pre_bias"]}
    changes = {"architecture": "topk", "k": 1, "d_in": 3, "normalize_activations": "layer_norm"}
    sae = load_sae(put(tmp_path / "s", "sae_weights.safetensors", SAELENS_CFG | changes, **weights))
    check(sae, T([[0.0, 3.0, 6.0]]), [2 * math.sqrt(6), 0.0, 0.0], [9.0, 3.0, 18.0], atol=2e-4)


# Both ways

WRITERS: dict[str, Callable[[SAE, Path], None]] = {
    "saelens": saelens.write,
    "dictionary_learning": dictionary_learning.write,
    "sparsify": sparsify.write,
}
WRITES = {
    "saelens": saelens.WRITES,
    "dictionary_learning": dictionary_learning.WRITES,
    "sparsify": sparsify.WRITES,
}


def random_sae(name: str, **fields: object) -> SAE:
    entry = REGISTRY[name]
    out = {"d_out": 6} if "transcoder" in name else {}
    sae = entry.sae(entry.config(d_in=6, d_sae=16, **{entry.sparsity: 4}, **out, **fields))
    sae.initialise(torch.randn(64, 6), 0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        if "threshold" in sae.saved:
            sae.threshold.fill_(0.5)
        elif hasattr(sae, "threshold"):
            sae.threshold.clamp_(min=0.0)  # as training leaves it
    sae.metadata = {"model_name": "m", "hook_name": "blocks.2.hook_resid_post"}
    return sae


@pytest.mark.parametrize(("form", "name"), [(form, name) for form, names in WRITES.items() for name in names])
def test_what_is_written_is_read_again_with_the_same_latents(tmp_path, form, name):
    torch.manual_seed(0)
    sae, x = random_sae(name), torch.randn(32, 6)
    WRITERS[form](sae, tmp_path / "layers.2")
    found = detect.find(tmp_path / "layers.2")
    assert found.format == form
    again = load_sae(tmp_path / "layers.2")
    assert again.hook == "blocks.2.hook_resid_post" or "transcoder" in name
    torch.testing.assert_close(again.encode(x), sae.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.reconstruct(x), sae.reconstruct(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", WRITES)
def test_every_other_architecture_is_refused_in_one_line(tmp_path, form):
    for name in set(REGISTRY) - set(WRITES[form]) - {"crosscoder", "mlsae", "clt", "codebook", "itda"}:
        with pytest.raises(InputError, match=f"has no form for this {name} dictionary: expected one of") as error:
            WRITERS[form](random_sae(name), tmp_path / name)
        assert "\n" not in str(error.value)
    for name in ("batchtopk", "matryoshka"):
        with pytest.raises(InputError, match="has no form for this"):
            WRITERS[form](random_sae(name, refine=1), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_thresholds_that_differ_make_a_jumprelu_of_a_batchtopk(tmp_path):
    sae = random_sae("batchtopk")
    sae.threshold[3] = 1.0
    dictionary_learning.write(sae, tmp_path / "d")
    again, x = load_sae(tmp_path / "d"), torch.randn(32, 6)
    assert again.architecture == "jumprelu"
    torch.testing.assert_close(again.encode(x), sae.encode(x), atol=1e-5, rtol=1e-5)


def test_what_was_folded_is_saved_as_ours(tmp_path):
    sae = load_sae(put(tmp_path / GEMMA_PLACE, "params.npz", None, **GEMMA))
    save_sae(sae, tmp_path / "ours")
    assert not saelens.is_foreign(json.loads((tmp_path / "ours" / "cfg.json").read_text()))
    check(load_sae(tmp_path / "ours"), X, [3.0, 0.0, 1.5], [7.0, 5.0])
