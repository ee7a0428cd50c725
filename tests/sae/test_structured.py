"""The structured dictionary: TopK and a penalty on how many directions the latents vary in."""

import pytest
import torch

from sae.architectures.structured import ROWS, StructuredConfig, StructuredSAE, spread
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import State
from tests.tiny import planted_rows


def test_spread_is_the_nuclear_norm_over_the_frobenius_norm():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 7, generator=generator) @ torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0, 1.0, 0.5, 0.1]))
    centred = z - z.mean(dim=0)
    s = torch.linalg.svdvals(centred)
    assert spread(z).item() == pytest.approx((s.sum() / s.square().sum().sqrt() / 40**0.5).item(), rel=0.02)


def test_spread_by_hand():
    one_direction = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [2.0, 4.0], [-2.0, -4.0]])
    two = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert spread(one_direction).item() == pytest.approx(1 / 2, rel=0.01)  # sqrt(4) rows, one singular value
    assert spread(two).item() == pytest.approx(2**0.5 / 2, rel=0.01)
    assert spread(torch.ones(4, 2)).item() == 0


def test_its_gradient_is_that_of_the_singular_values():
    z = torch.randn(12, 30, generator=torch.Generator().manual_seed(1)).requires_grad_()
    spread(z).backward()
    ours, z.grad = z.grad.clone(), None
    s = torch.linalg.svdvals(z - z.mean(dim=0))[:11]  # the mean takes one away
    (s.sum() / s.square().sum().sqrt() / 12**0.5).backward()
    torch.testing.assert_close(ours, z.grad, atol=1e-3, rtol=1e-2)


def test_without_weight_it_is_topk_and_with_it_the_gradient_reaches_the_encoder():
    rows = planted_rows(300, 16, 24, 3, signed=False)[0]
    sizes = {"d_in": 16, "d_sae": 24, "k": 3}
    topk, off, on = (
        TopKSAE(TopKConfig(**sizes)),
        StructuredSAE(StructuredConfig(**sizes, nuclear_weight=0.0)),
        StructuredSAE(StructuredConfig(**sizes, nuclear_weight=1.0)),
    )
    losses = []
    for sae in (topk, off, on):
        sae.initialise(rows, seed=0)
        losses.append(sae.loss(rows, rows, State()))
        losses[-1].total.backward()
    assert losses[0].total == losses[1].total
    torch.testing.assert_close(topk.W_enc.grad, off.W_enc.grad)
    assert losses[2].total == losses[1].total + losses[2].terms["spread"]
    z = on.encode(rows[:ROWS])
    torch.testing.assert_close(losses[2].terms["spread"], spread(z))
    assert (on.W_enc.grad - off.W_enc.grad).norm() > 1e-3 * off.W_enc.grad.norm()
    torch.testing.assert_close(on.W_dec.grad, off.W_dec.grad)
