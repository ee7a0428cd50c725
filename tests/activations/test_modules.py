"""Any torch module by module path: rows, masks and resume are those of a language model's capture."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from activations.errors import InputError
from activations.files import write_json
from activations.modules import VECTORS, collect_module, collect_vectors
from activations.run import Run
from activations.shards import Shards
from activations.splice import read
from sae.settings import Training
from sae.train import train


@pytest.fixture
def run(tmp_path) -> Run:
    identity = {"model": "m", "revision": "0", "model_dtype": "float32", "corpus": "c", "corpus_hash": "h"}
    return Run.create(tmp_path / "run", **identity, context=1, n_tokens=1000)


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    return ViTModel(config).eval().requires_grad_(False)


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


LAYER = "layers.0"


def test_a_vision_transformer_gives_a_row_a_patch(run):
    model, pixels = vit(), images(6)
    collect_module(run, model, [LAYER], [{"pixel_values": part} for part in pixels.split(2)], dtype="float32")
    with read(model, [LAYER]) as got, torch.no_grad():
        model(pixel_values=pixels)
    cache = run.activations(LAYER)
    assert got[LAYER].shape == (6, 5, 16)  # four patches and the class token
    torch.testing.assert_close(cache.rows(0), got[LAYER].flatten(0, 1))
    assert cache.tokens(0).docs.tolist() == [i for i in range(6) for _ in range(5)]
    assert cache.tokens(0).positions[:6].tolist() == [0, 1, 2, 3, 4, 0]
    assert bool(cache.mask(0)[0])  # position 0 is an ordinary row here


def test_padding_of_an_encoder_is_no_row(run):
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    model = BertModel(config).eval().requires_grad_(False)
    ids = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    collect_module(run, model, ["encoder.layer.0"], [batch], dtype="float32")
    cache = run.activations("encoder.layer.0")
    assert cache.tokens(0).ids.tolist() == [3, 4, 5, 6, 7, 8, 9]
    with torch.no_grad():
        alone = model(input_ids=ids[:1, :3]).last_hidden_state[0]
    torch.testing.assert_close(cache.rows(0)[:3], alone, atol=1e-5, rtol=1e-5)


def test_a_convolution_gives_a_row_a_pixel(run):
    net = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.ReLU())
    collect_module(run, net, ["1"], [images(2)], dtype="float32", channel_dim=1)
    with torch.no_grad():
        expected = net(images(2))
    torch.testing.assert_close(run.activations("1").rows(0)[8 * 3 + 2], expected[0, :, 3, 2])


def test_a_killed_one_goes_on_a_later_hook_joins_and_the_bytes_are_the_same(run, tmp_path, monkeypatch):
    batches = [{"pixel_values": part} for part in images(12).split(2)]
    hooks = [LAYER, "layers.1"]
    collect_module(run, vit(), hooks, batches, rows_per_shard=20)
    other = Run.open(tmp_path / "run")
    other = Run.create(tmp_path / "other", **{k: other.meta[k] for k in ("model", "revision", "model_dtype", "corpus")},
                       corpus_hash="h", context=1, n_tokens=1000)  # fmt: skip
    write, left = Shards.write, [3]

    def dying(self, *args, **record):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(self, *args, **record)

    monkeypatch.setattr(Shards, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        collect_module(other, vit(), hooks[:1], batches, rows_per_shard=20)
    monkeypatch.undo()
    collect_module(other, vit(), hooks[:1], batches, rows_per_shard=20)
    collect_module(other, vit(), hooks[1:], batches, rows_per_shard=20)
    paths = list((run.path / "activations").rglob("*.safetensors"))
    assert len(paths) == 9
    for path in paths:
        assert path.read_bytes() == (other.path / path.relative_to(run.path)).read_bytes()


def test_wrong_input(run):
    with pytest.raises(InputError, match="no batch: give at least one"):
        collect_module(run, vit(), [LAYER], [])
    with pytest.raises(InputError, match="No hook 'encoder.banana'"):
        collect_module(run, vit(), ["encoder.banana"], [images(1)])
    pooled = [LAYER, "pooler.dense"]
    with pytest.raises(InputError, match=r"hooks have different rows .*pooler"):
        collect_module(run, vit(), pooled, [{"pixel_values": images(2)}])


def test_vectors_are_rows_without_position_or_sink_and_train(run):
    rows = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    rows[0] *= 1e4
    made = []

    def blocks():
        for first in range(0, 3000, 1000):
            part = rows[first : first + 1000]
            yield torch.arange(first, first + 1000), lambda first=first, part=part: made.append(first) or part

    collect_vectors(run, blocks(), width=8)
    cache = run.activations(VECTORS)
    assert torch.equal(torch.cat([cache.rows(i) for i in range(3)]), rows)
    assert cache.n_ordinary == 3000
    assert cache.sink_threshold == float("inf")
    collect_vectors(run, blocks(), width=8)
    assert made == [0, 1000, 2000]  # what is there is not computed again
    settings = Training(architecture="topk", hook=VECTORS, sizes={"d_sae": 16, "k": 2}, n_tokens=2048, batch=64)
    assert (train(run, settings) / "cfg.json").exists()
    with pytest.raises(InputError, match="no vector: expected at least one row"):
        collect_vectors(Run.create(run.path.parent / "empty", **_identity()), iter(()), width=8)
    with pytest.raises(InputError, match="8 wide, expected 9"):
        collect_vectors(Run.create(run.path.parent / "wide", **_identity()), blocks(), width=9)


def _identity() -> dict:
    names = ("model", "revision", "model_dtype", "corpus", "corpus_hash")
    return {**dict.fromkeys(names, ""), "context": 1, "n_tokens": 10}


def test_an_older_cache_is_refused_by_name(run):
    rows = np.zeros((4, 8), np.float32)
    collect_vectors(run, [(torch.arange(4), lambda: torch.from_numpy(rows))], width=8)
    manifest = run.path / "activations" / VECTORS / "manifest.json"
    write_json(manifest, {"shards": [], "complete": True})
    with pytest.raises(InputError, match="of another version: run `sae clean"):
        run.activations(VECTORS)
