"""A planted world on disk, through collecting and training, to what was planted."""

from data.planted import WorldConfig, build_world, load_world, plant
from sae.evals.truth import truth
from sae.files import load_sae
from tests.app.test_collect import sae


def test_a_dictionary_trained_on_planted_rows_finds_what_was_planted(tmp_path):
    even = {"max_prob": 0.12, "min_prob": 0.12, "n_trees": 0, "rank": 0}
    world = build_world(WorldConfig(n_features=24, d_in=32, bias=0.5, noise=0.01, **even))
    plant(tmp_path / "world", world, 12_000)
    sae("collect", tmp_path / "run", "--vectors", tmp_path / "world")
    options = ["--d-sae", "24", "-k", "3", "--tokens", "120k", "--batch", "256", "--lr", "3e-3"]
    sae("train", tmp_path / "run", "--arch", "topk", *options)
    planted = load_world(tmp_path / "world")
    found = truth(load_sae(tmp_path / "run"), planted.directions, planted.batches(4000, seed=1))
    assert found["truth.mcc"].value > 0.95
    assert found["truth.f1"].value > 0.85
    assert found["truth.l0"].value == 3
