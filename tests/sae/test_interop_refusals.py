"""Files from elsewhere that cannot be read, or must not be: one line each, nothing run, no memory taken."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from activations.errors import InputError
from sae import load_sae
from sae.interop import hub
from sae.interop.tensors import read_npz, read_pt
from tests.sae.test_interop import (
    DL_CASES,
    GEMMA,
    MOSS,
    MOSS_CFG,
    OPENAI,
    PLAIN,
    SAELENS_CFG,
    SPARSIFY,
    SPARSIFY_CFG,
    X_MOSS,
    T,
    check,
    moss,
    put,
)


def refused(place: Path | str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        load_sae(place)
    assert "\n" not in str(error.value)


# Tensors


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"W_dec": None}, "has no tensor W_dec: expected one, and it has b_dec"),
        ({"b_dec": torch.zeros(3)}, r"b_dec of shape \(3,\): expected \(2,\)"),
        ({"W_dec": SPARSIFY["W_dec"].T}, r"W_dec of shape \(2, 4\): expected \(4, 2\)"),
        ({"b_dec": torch.zeros(2, dtype=torch.int64)}, "b_dec of type I64: expected one of BF16"),
        ({"b_dec": T([float("nan"), 0.0])}, "b_dec with values that are not finite"),
        ({"W_new": torch.zeros(2)}, "has a tensor W_new that this kind of dictionary has not"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, changes, says):
    tensors = {name: each for name, each in {**SPARSIFY, **changes}.items() if each is not None}
    refused(put(tmp_path / "layers.1", "sae.safetensors", SPARSIFY_CFG, **tensors), says)


def test_half_precision_is_read(tmp_path):
    half = {name: each.to(torch.bfloat16) for name, each in SPARSIFY.items()}
    sae = load_sae(put(tmp_path / "layers.1", "sae.safetensors", SPARSIFY_CFG, **half))
    assert sae.W_enc.dtype == torch.float32
    check(sae, T([[3.0, 4.0]]), [0.0, 3.0, 0.0, 0.0], [1.0, 7.0])


def test_a_damaged_file_is_told(tmp_path):
    folder = put(tmp_path / "layers.1", "sae.safetensors", SPARSIFY_CFG, **SPARSIFY)
    whole = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.safetensors").write_bytes(whole[:-5])
    refused(folder, "is missing or damaged")
    (folder / "cfg.json").write_text("[]")
    refused(folder, "holds no JSON object")


# Pickles


class Runs:
    """What a hostile file holds: unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pickle_is_run(tmp_path):
    trap = tmp_path / "trap"
    torch.save({**OPENAI, "activation": Runs(trap)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "holds more than tensors, and is not run")
    np.savez(tmp_path / "params.npz", W_enc=np.array([Runs(trap)], dtype=object))
    refused(tmp_path / "params.npz", "W_enc.npy of type object: expected a floating-point type")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Runs(trap)))
    refused(tmp_path / "old.pt", "is damaged, or of torch before 1.6")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("value", "says"), [([T(1.0)], "holds a list: expected a state dict"), (torch.zeros(2), "holds a Tensor")]
)
def test_a_pt_that_is_no_state_dict_is_told(tmp_path, value, says):
    torch.save(value, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", says)


# Sizes


def test_a_view_larger_than_its_storage_takes_no_memory(tmp_path):
    torch.save({**OPENAI, "encoder.weight": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "in less memory: expected it whole")


def test_a_compressed_pt_is_refused(tmp_path):
    torch.save(OPENAI, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "a.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(InputError, match="is compressed"):
        read_pt(tmp_path / "a.pt")


def npz(path: Path, name: str, shape: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """An .npz with one array, whose header says `shape`."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data)
    return path


def test_an_array_that_says_it_is_larger_than_its_file_takes_no_memory(tmp_path):
    path = npz(tmp_path / "params.npz", "W_enc", "(1099511627776, 1048576)", b"\0" * 16)
    refused(path, "W_enc.npy of shape .* in 16 bytes: it is damaged")
    path = npz(tmp_path / "bomb.npz", "W_enc", "(16777216,)", b"\0" * 2**26, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="would grow to 67,108"):
        read_npz(path)


def test_numpys_compressed_form_is_read(tmp_path):
    np.savez_compressed(tmp_path / "params.npz", **{name: each.numpy() for name, each in GEMMA.items()})
    check(load_sae(tmp_path / "params.npz"), T([[3.0, 4.0]]), [3.0, 0.0, 1.5], [7.0, 5.0])


def test_sizes_in_the_settings_are_held_against_the_file(tmp_path):
    huge = SPARSIFY_CFG | {"num_latents": 2**40}
    refused(put(tmp_path / "layers.1", "sae.safetensors", huge, **SPARSIFY), r"expected \(1099511627776, 2\)")


# Kinds


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "relu"}, "activation='relu': expected one of topk, groupmax"),
        ({"k": "many"}, "k='many': expected a whole number of at least 1"),
        ({"k": 5}, "k=5 is out of range"),
        ({"signed": True}, "signed latents"),
        ({"skip_connection": True}, "a skip connection without transcode"),
        ({"activation": "groupmax", "transcode": True}, "a groupmax transcoder"),
    ],
)
def test_other_kinds_of_sparsify(tmp_path, changes, says):
    refused(put(tmp_path / "layers.1", "sae.safetensors", SPARSIFY_CFG | changes, **SPARSIFY), says)


def test_other_kinds_of_dictionary_learning(tmp_path):
    tensors = DL_CASES["BatchTopKSAE"][0]
    refused(
        put(tmp_path / "a", "ae.pt", {"trainer": {"dict_class": "CrossCoder"}}, **tensors), "dict_class='CrossCoder'"
    )
    refused(put(tmp_path / "b", "ae.pt", {}, **tensors), "dict_class=None: expected one of AutoEncoder")
    unset = {**tensors, "threshold": T(-1.0)}
    refused(put(tmp_path / "c", "ae.pt", {"trainer": {"dict_class": "BatchTopKSAE"}}, **unset), "threshold -1, unset")
    groups = {**DL_CASES["MatryoshkaBatchTopKSAE"][0], "group_sizes": T([1, 1])}
    about = {"trainer": {"dict_class": "MatryoshkaBatchTopKSAE"}}
    refused(put(tmp_path / "d", "ae.pt", about, **groups), r"group_sizes \[1, 1\]: expected .* add up to 3")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"act_fn": "batchtopk"}, "act_fn='batchtopk': expected one of relu, jumprelu, topk"),
        ({"norm_activation": "token-wise"}, "norm_activation='token-wise': expected one of dataset-wise, inference"),
        ({"use_glu_encoder": True}, "has a GLU encoder"),
        ({"sae_type": "clt"}, "has sae_type='clt'"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "expected false"),
        ({"act_fn": "jumprelu"}, "jump_relu_threshold=None: expected a number above 0"),
        (
            {"hook_point_out": "blocks.5.hook_mlp_out"},
            "without dataset_average_activation_norm of 'blocks.5.hook_mlp_out'",
        ),
    ],
)
def test_other_kinds_of_openmoss(tmp_path, changes, says):
    refused(moss(tmp_path / "m", changes), says)


def test_an_openmoss_norm_may_stand_in_the_settings(tmp_path):
    folder = moss(tmp_path / "m", {"dataset_average_activation_norm": {MOSS_CFG["hook_point_in"]: 4.0}})
    save_file(MOSS, folder / "sae_weights.safetensors")
    check(load_sae(folder), X_MOSS, [4.0, 10.0, 2.0], [4.0, 20.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"normalize_activations": "expected_average_only_in"}, "'expected_average_only_in' of standard"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm' of standard: expected none, or layer_norm of topk"),
        ({"normalize_activations": ["x"]}, "normalize_activations="),
        ({"architecture": "jumprelu_transcoder"}, "architecture='jumprelu_transcoder': expected one of standard"),
        ({"architecture": "transcoder", "d_out": 2}, "architecture='transcoder': expected one of standard"),
        ({"architecture": "temporal"}, "names architecture 'temporal'"),
        ({"activation_fn_str": "tanh-relu"}, "architecture=\"standard with 'tanh-relu'\""),
    ],
)
def test_other_kinds_of_saelens(tmp_path, changes, says):
    refused(put(tmp_path / "s", "sae_weights.safetensors", SAELENS_CFG | changes, **PLAIN), says)


def test_a_finetuned_scale_is_refused_unless_it_is_1(tmp_path):
    cfg = SAELENS_CFG | {"apply_b_dec_to_input": False}
    ones = put(tmp_path / "a", "sae_weights.safetensors", cfg, **PLAIN, scaling_factor=torch.ones(3))
    check(load_sae(ones), T([[3.0, 4.0]]), [3.0, 3.0, 1.0], [8.0, 4.0])
    twos = put(tmp_path / "b", "sae_weights.safetensors", cfg, **PLAIN, scaling_factor=torch.full((3,), 2.0))
    refused(twos, "has a scaling_factor other than 1")


def test_other_kinds_of_openai_and_gemma_scope(tmp_path):
    torch.save({**OPENAI, "activation": "Identity"}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "activation='Identity': expected one of ReLU, TopK")
    torch.save({**OPENAI, "activation": "TopK", "activation_state_dict": {"postact_fn": "Identity"}}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "a TopK without ReLU")
    refused(put(tmp_path / "x-transcoders", "params.npz", None, **GEMMA), "is a JumpReLU transcoder's")
    refused(put(tmp_path / "embedding", "params.npz", None, **GEMMA), "of token embeddings before they are scaled")


# Places


def test_a_folder_that_is_none_says_what_one_has(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"is no dictionary: expected cfg.json and sae_weights.safetensors \(SAELens, ours\)")
    for i in range(7):
        put(tmp_path / "many" / f"layers.{i}", "sae.safetensors", SPARSIFY_CFG, **SPARSIFY)
    refused(tmp_path / "many", r"holds 7 dictionaries: name one of layers.0, .*layers.4 and 2 more")
    alone = put(tmp_path / "alone", "ae.pt", None, **DL_CASES["AutoEncoder"][0])
    for place in (alone, alone / "ae.pt"):
        refused(place, r"is no dictionary: expected .*config.json and ae.pt \(dictionary_learning\)")
    refused(tmp_path / "none", "is no run: expected a folder with run.json")


def test_names_of_the_hub_are_those_that_are_no_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub.is_name("google/gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_1")
    assert hub.is_name("EleutherAI/sae-llama-3-8b-32x/layers.1.mlp")
    for other in ("runs/demo", "demo", "/tmp/demo", "./a/b", "../a/b", "a//b", "a/../b", "a/b/../c", ""):
        assert not hub.is_name(other), other


def test_the_hub_gives_only_what_is_read_and_its_files_are_local_then(tmp_path, monkeypatch):
    asked: list[tuple[str, list[str]]] = []
    snapshot = tmp_path / "models--google--gemma-scope-9b-it-mlp" / "snapshots" / "0"
    put(snapshot / "layer_3", "params.npz", None, **GEMMA)

    def snapshot_download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    sae = load_sae("google/gemma-scope-9b-it-mlp/layer_3")
    assert (sae.hook, sae.model_name) == ("blocks.3.hook_mlp_out", "google/gemma-2-9b-it")
    repo, patterns = asked[0]
    assert repo == "google/gemma-scope-9b-it-mlp"
    assert set(patterns) == {f"layer_3/{name}" for name in hub.FILES}
    assert not any("*" in each or each.endswith(".py") for each in patterns)
    load_sae("google/gemma-scope-9b-it-mlp/layer_3/params.npz")
    refused("google/gemma-scope-9b-it-mlp/layer_4", "has nothing that is read here at layer_4")


def test_without_a_network_the_hub_is_one_line(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder\nand more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    refused("someone/some-sae", "the hub did not give it .*: check the name and the network")


def test_settings_that_are_no_json_are_one_line(tmp_path):
    folder = put(tmp_path / "a", "ae.pt", None, **DL_CASES["AutoEncoder"][0])
    (folder / "config.json").write_text(json.dumps({"trainer": 3}))
    refused(folder, "dict_class=None")
    (folder / "config.json").write_text("{")
    refused(folder, "is damaged")
