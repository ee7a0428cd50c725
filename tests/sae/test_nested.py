"""Multi-TopK and MSAE: losses at several k, beside their dense form by autograd."""

import pytest
import torch
from torch import Tensor

from sae.architectures.msae import MSAE, MSAEConfig
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import SAE, ConfigError, Dead, State
from sae.sparse import to_dense
from tests.tiny import planted_rows


def filled(sae: SAE) -> SAE:
    torch.manual_seed(0)
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.5)
    return sae


def dense_fvu(sae: SAE, x: Tensor, k: int) -> Tensor:
    """FVU of x from its k largest positive latents, all dense; by autograd."""
    p = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    z = torch.zeros_like(p).scatter(1, p.topk(k).indices, p.topk(k).values)
    error = z @ sae.W_dec + sae.b_dec - x
    return error.square().sum() / (x - x.mean(dim=0)).square().sum()


def same_gradients(sae: SAE, ours: Tensor, dense: Tensor) -> None:
    torch.testing.assert_close(ours, dense)
    wanted = torch.autograd.grad(dense, list(sae.parameters()))
    got = torch.autograd.grad(ours, list(sae.parameters()))
    for (name, _), a, b in zip(sae.named_parameters(), got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("k", "wide"), [(3, 12), (10, 30), (30, 30)])
def test_multi_topk_adds_the_fvu_of_four_k_latents_with_its_gradient(k, wide):
    sae = filled(TopKSAE(TopKConfig(d_in=12, d_sae=30, k=k, multi_topk=0.125)))
    x = torch.randn(40, 12)
    made = sae.loss(x, x, State())
    assert made.terms["fvu"].item() == pytest.approx(dense_fvu(sae, x, k).item())
    assert torch.equal(made.fired, (sae.encode(x) != 0).any(dim=0))
    same_gradients(sae, made.total, dense_fvu(sae, x, k) + dense_fvu(sae, x, wide) / 8)


def test_auxk_beside_multi_topk_is_that_of_topk_alone():
    rows, _ = planted_rows(64, 12, 30, 3, signed=False)
    dead = State(dead=Dead(torch.arange(20, 30), torch.ones(10, dtype=torch.bool), torch.tensor(10.0)))
    terms = []
    for multi in (0.0, 0.125):
        sae = filled(TopKSAE(TopKConfig(d_in=12, d_sae=30, k=3, multi_topk=multi)))
        terms.append(sae.loss(rows, rows, dead).terms["auxk"].item())
    assert terms[0] > 0
    assert terms[0] == pytest.approx(terms[1], rel=1e-5)


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match="multi_topk=-1 is out of range"):
        TopKConfig(d_in=4, d_sae=8, k=2, multi_topk=-1)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("weights", "shares"), [("uniform", [1, 1, 1, 1]), ("reverse", [4, 3, 2, 1])])
def test_msae_is_the_weighted_mean_of_the_fvu_at_each_k(whole, weights, shares):
    sae = filled(MSAE(MSAEConfig(d_in=12, d_sae=40, k=3, levels=3 if whole else 4, whole=whole, weights=weights)))
    x = torch.randn(40, 12)
    dense = sum(
        share / sum(shares) * dense_fvu(sae, x, k)
        for share, k in zip(shares, [3, 6, 12, 40 if whole else 24], strict=True)
    )
    made = sae.loss(x, x, State())
    assert made.terms["fvu_widest"].item() == pytest.approx(dense_fvu(sae, x, 40 if whole else 24).item())
    same_gradients(sae, made.total, dense)


def test_msae_leaves_out_levels_wider_than_the_dictionary():
    sae = filled(MSAE(MSAEConfig(d_in=12, d_sae=40, k=15, weights="uniform")))
    x = torch.randn(40, 12)
    torch.testing.assert_close(sae.loss(x, x, State()).total, (dense_fvu(sae, x, 15) + dense_fvu(sae, x, 30)) / 2)


def test_msae_encodes_with_any_number_of_latents():
    sae = filled(MSAE(MSAEConfig(d_in=12, d_sae=40, k=3)))
    x = torch.randn(8, 12)
    for k in (1, 3, 17, 40):
        values, indices = sae.encode_at(x, k)
        largest = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu().topk(k)
        z = torch.zeros(8, 40).scatter(1, largest.indices, largest.values)
        torch.testing.assert_close(to_dense(values, indices, 40), z)
    assert torch.equal(sae.encode(x), to_dense(*sae.encode_at(x, 3), 40))


@pytest.mark.parametrize(("field", "value"), [("levels", 0), ("weights", "steep")])
def test_impossible_levels_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}=.* expected"):
        MSAEConfig(d_in=4, d_sae=8, k=2, **{field: value})
