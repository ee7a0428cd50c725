"""Multi-TopK and MSAE: losses at several k, beside their dense form by autograd."""

import pytest
import torch
from torch import Tensor

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import SAE, ConfigError, Dead, State
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
