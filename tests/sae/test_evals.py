"""Metrics equal their written definitions."""

import pytest
import torch

from activations.cache import held_out_mask
from activations.splice import Where
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import SAE
from sae.evals.reconstruction import reconstruction
from sae.evals.splice_loss import _on_ordinary, splice_loss
from tests.tiny import HOOK, planted_rows, planted_run


def identity(d: int) -> SAE:
    """A dictionary that reconstructs everything: one latent for each direction of each axis."""
    sae = TopKSAE(TopKConfig(d_in=d, d_sae=2 * d, k=d))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


@pytest.fixture
def cache(tmp_path):
    return planted_run(tmp_path / "run", planted_rows(4000, 8, 12, 3, signed=False)[0] + 2.0).activations(HOOK)


def test_fvu_is_0_for_the_identity_and_1_for_the_mean(cache):
    exact = reconstruction(identity(8), cache)
    assert exact["fvu"].value == pytest.approx(0, abs=1e-9)
    assert exact["cosine"].value == pytest.approx(1, abs=1e-5)
    rows = torch.cat([cache.rows(i)[held_out_mask(cache, i)] for i in range(cache.n_shards)])
    assert exact["fvu"].n == len(rows) > 0
    constant = TopKSAE(TopKConfig(d_in=8, d_sae=8, k=1))
    constant.b_dec.data = rows.mean(dim=0)
    constant.b_enc.data.fill_(-1e6)
    measured = reconstruction(constant, cache)
    assert measured["fvu"].value == pytest.approx(1, abs=1e-5)
    assert measured["l0"].value == 0


def test_splicing_the_identity_costs_nothing_and_the_mean_costs_mean_ablation(model, small_run):
    from activations.run import Run

    cache = Run.open(small_run).activations("blocks.15.hook_resid_post")
    same = splice_loss(identity(576), model, cache, n_contexts=4)
    assert same["delta_ce"].value == pytest.approx(0, abs=1e-3)
    assert same["kl"].value == pytest.approx(0, abs=1e-3)
    assert same["ce_score"].value == pytest.approx(1, abs=1e-3)
    assert 2.5 < same["ce_clean"].value < 5
    constant = TopKSAE(TopKConfig(d_in=576, d_sae=8, k=1))
    constant.b_dec.data = cache.mean
    constant.b_enc.data.fill_(-1e9)
    ablated = splice_loss(constant, model, cache, n_contexts=4)
    assert ablated["ce_spliced"].value == pytest.approx(ablated["ce_mean_ablated"].value, abs=1e-3)
    assert ablated["ce_score"].value == pytest.approx(0, abs=1e-3)
    assert ablated["delta_ce"].value > 1
    assert ablated["delta_ce"].lo <= ablated["delta_ce"].value <= ablated["delta_ce"].hi


def test_position_0_padding_and_sinks_keep_their_activations():
    x = torch.ones(1, 4, 3)
    x[0, 2] = 100.0  # a sink
    where = Where(torch.tensor([[-1, 0, 1, 2]]), None)
    edited = _on_ordinary(torch.zeros_like(x), 50.0, torch.zeros(1, 4, dtype=torch.bool))(x, where)
    assert torch.equal(edited[0, :3], x[0, :3])
    assert edited[0, 3].tolist() == [0, 0, 0]
