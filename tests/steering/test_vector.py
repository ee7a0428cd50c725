"""Vectors: from latents and from texts, to files and back."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from activations import InputError
from activations.splice import Where, replace
from steering import SteeringVector

HOOK = "blocks.1.hook_resid_post"
EMBEDDING = "model.embed_tokens"


def test_one_max_unit_of_a_latent_is_what_it_adds_at_its_largest(basis):
    vector = SteeringVector.from_latent(basis, 9)
    z = torch.zeros(1, 32)
    z[0, 9] = basis.statistics.max[9]
    assert torch.allclose(vector.raw, basis.decode(z)[0] - basis.decode(0 * z)[0], atol=1e-6)
    assert (vector.hook, vector.unit, vector.sink_threshold) == (HOOK, "max", 1e9)
    assert vector.provenance["feature"] == 9
    assert vector.provenance["model"] == "tiny"


def test_units_norm_and_raw_of_a_latent(basis):
    with torch.no_grad():
        basis.W_dec[9] *= 3
    assert SteeringVector.from_latent(basis, 9, unit="norm").raw.norm() == pytest.approx(2.0)
    assert torch.equal(SteeringVector.from_latent(basis, 9, unit="raw").raw, basis.W_dec[9].detach())


def test_the_negative_pole_of_a_signed_latent_has_its_own_unit(signed_basis):
    vector = SteeringVector.from_latent(signed_basis, 9, sign=-1)
    assert torch.allclose(vector.raw, -1.5 * signed_basis.W_dec[9])


def test_a_vector_does_not_follow_later_changes_of_the_dictionary(basis):
    vector = SteeringVector.from_latent(basis, 9, unit="raw")
    before = vector.raw
    with torch.no_grad():
        basis.W_dec.zero_()
    assert torch.equal(vector.raw, before)


def test_what_a_latent_cannot_give_is_refused_in_one_line(basis):
    cases = {
        "no latent 32": lambda: SteeringVector.from_latent(basis, 32),
        "never fired in 1,000 tokens": lambda: SteeringVector.from_latent(basis, 0),
        "negative strength": lambda: SteeringVector.from_latent(basis, 9, sign=-1),
    }
    for part, make in cases.items():
        with pytest.raises(InputError, match=part) as caught:
            make()
        assert "\n" not in str(caught.value)
    basis.statistics = None
    with pytest.raises(InputError, match=r"statistics\.safetensors"):
        SteeringVector.from_latent(basis, 9)


def test_difference_of_means_recovers_a_planted_direction(tiny):
    """Every row of a positive text has 2 u added; the texts are otherwise equal from position 1 on."""
    u = torch.randn(32, generator=torch.Generator().manual_seed(3))
    u /= u.norm()
    texts = ["w5 w1 w2 w3 w4", "w5 w6", "w5 w7 w1 w8 w9 w1 w2"]

    def plant(x: torch.Tensor, where: Where) -> torch.Tensor:
        assert where.ids is not None
        return x + 2.0 * u * (where.ids[:, :1] == 6)[..., None]  # positive texts begin with w6

    with replace(tiny, EMBEDDING, plant):
        vector = SteeringVector.from_pairs(tiny, ["w6" + text[2:] for text in texts], texts, hook=EMBEDDING)
    assert float(vector.direction @ u) == pytest.approx(1.0, abs=1e-5)
    assert vector.provenance["difference_norm"] == pytest.approx(2.0, abs=1e-4)


def test_each_token_weighs_the_same_whatever_the_length_of_its_text(tiny):
    rows = tiny.hf.get_input_embeddings().weight
    vector = SteeringVector.from_pairs(tiny, ["w0 w1 w2 w3", "w0 w4"], ["w0 w5", "w0 w6 w7"], hook=EMBEDDING)
    expected = rows[1:5].mean(dim=0) - rows[5:8].mean(dim=0)
    bare = vector.direction * vector.provenance["difference_norm"]
    assert torch.allclose(bare, expected, atol=1e-5)
    assert vector.provenance["n_tokens"] == [4, 3]
    assert vector.raw.norm() == pytest.approx(float(rows[1:8].norm(dim=1).median()), rel=1e-5)


def test_position_0_padding_and_sinks_stay_out_of_the_means(tiny):
    weight = tiny.hf.get_input_embeddings().weight
    kept = weight.clone()
    try:
        clean = SteeringVector.from_pairs(tiny, ["w0 w1 w2 w3", "w0 w4"], ["w0 w5 w6 w7"], hook=EMBEDDING)
        weight[0] *= 1000  # position 0
        weight[62] *= 1000  # [PAD]
        weight[20] *= 1000  # a sink
        dirty = SteeringVector.from_pairs(tiny, ["w0 w1 w20 w2 w3", "w0 w4"], ["w0 w5 w6 w7"], hook=EMBEDDING)
    finally:
        weight.copy_(kept)
    assert torch.allclose(dirty.direction, clean.direction, atol=1e-6)


def test_texts_give_the_same_rows_alone_and_in_a_padded_batch(tiny):
    from steering.rows import text_rows

    texts = ["w1 w2", "w3 w4 w5 w6 w7 w8", "w9", "w10 w11 w12"]
    together = text_rows(tiny, texts, HOOK)
    alone = torch.cat([text_rows(tiny, [text], HOOK).rows for text in texts if text != "w9"])
    assert torch.allclose(together.rows, alone, atol=1e-5)
    assert together.text.tolist() == [0, 1, 1, 1, 1, 1, 3, 3]


@pytest.mark.parametrize(
    ("positive", "negative", "hook", "part"),
    [
        (["w1", "w2"], ["w1 w2"], HOOK, "two tokens"),
        ([], ["w1 w2"], HOOK, "two tokens"),
        (["w1 w2"], ["w1 w2"], HOOK, "equal means"),
        (["w1 w2"], ["w1 w3"], "blocks.7.hook_resid_post", r"blocks\.0 to blocks\.3"),
        ("w1 w2", ["w1 w3"], HOOK, "list of texts"),
    ],
)
def test_texts_that_give_no_vector_are_refused_in_one_line(tiny, positive, negative, hook, part):
    with pytest.raises(InputError, match=part) as caught:
        SteeringVector.from_pairs(tiny, positive, negative, hook=hook)
    assert "\n" not in str(caught.value)


def test_save_and_load_round_trip(tiny, tmp_path):
    vector = SteeringVector.from_pairs(tiny, ["w1 w2"], ["w1 w3"], hook=HOOK).scaled(-0.3)
    vector.save(tmp_path / "v.safetensors")
    back = SteeringVector.load(tmp_path / "v.safetensors")
    assert torch.equal(back.raw, vector.raw)
    for name in ("hook", "unit", "unit_size", "coefficient", "median_norm", "sink_threshold"):
        assert getattr(back, name) == getattr(vector, name)
    assert back.provenance == {**vector.provenance, "file": str(tmp_path / "v.safetensors")}
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


def test_a_file_that_is_damaged_or_something_else_is_refused_in_one_line(make_vector, tmp_path):
    path = tmp_path / "v.safetensors"
    make_vector(1).save(path)
    whole = path.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    about = json.loads(header["__metadata__"]["steering_vector"])

    def rewritten(**changes: object) -> None:
        save_file(load_direction(), path, metadata={"steering_vector": json.dumps({**about, **changes})})

    def load_direction() -> dict[str, torch.Tensor]:
        return {"direction": make_vector(1).direction}

    damages = {
        "cut": lambda: path.write_bytes(whole[:-40]),
        "empty": lambda: path.write_bytes(b""),
        "a huge header": lambda: path.write_bytes((1 << 60).to_bytes(8, "little") + whole[8:]),
        "missing": path.unlink,
        "no header of ours": lambda: save_file(load_direction(), path),
        "another format": lambda: rewritten(format=99),
        "another unit": lambda: rewritten(unit="furlong"),
        "no size": lambda: rewritten(unit_size=None),
        "size 0": lambda: rewritten(unit_size=0),
        "text for a number": lambda: rewritten(coefficient="4"),
        "not finite": lambda: rewritten(coefficient=float("nan")),
        "two rows": lambda: save_file(
            {"direction": torch.ones(2, 3)}, path, metadata={"steering_vector": json.dumps(about)}
        ),
        "no direction": lambda: save_file({"x": torch.ones(3)}, path, metadata={"steering_vector": json.dumps(about)}),
        "NaN inside": lambda: save_file(
            {"direction": torch.full((3,), torch.nan)}, path, metadata={"steering_vector": json.dumps(about)}
        ),
    }
    for name, damage in damages.items():
        damage()
        with pytest.raises(InputError) as caught:
            SteeringVector.load(path)
        assert "\n" not in str(caught.value), name
    path.write_bytes(whole)
    assert torch.equal(SteeringVector.load(path).raw, make_vector(1).raw)


def test_saving_is_written_aside(make_vector, tmp_path, monkeypatch):
    path = tmp_path / "v.safetensors"
    make_vector(1).save(path)

    def fails(_tensors, aside, metadata):
        aside.write_bytes(json.dumps(metadata).encode())
        raise OSError("disk full")

    monkeypatch.setattr("steering.vector.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        make_vector(2).save(path)
    assert torch.equal(load_file(path)["direction"], make_vector(1).direction)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_vector_cannot_be_changed_or_be_zero(vector):
    with pytest.raises(dataclasses.FrozenInstanceError):
        vector.coefficient = 2.0
    with pytest.raises(InputError, match="zero or not finite"):
        dataclasses.replace(vector, direction=torch.zeros(32))
