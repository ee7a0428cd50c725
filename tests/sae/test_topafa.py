"""Top-AFA by hand, and beside its dense form by autograd."""

import pytest
import torch
from torch import Tensor

from sae.architectures.topafa import TopAFAConfig, TopAFASAE
from sae.base import ConfigError, State


def test_a_row_keeps_latents_until_their_norm_is_the_rows():
    # W_enc = identity with b_enc = 1 on the positive ones: a = x + 1, norms of the largest j beside |x|.
    sae = TopAFASAE(TopAFAConfig(d_in=4, d_sae=4, k=4))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
        sae.b_enc.fill_(1.0)
    # |x| = 5, a = (4, 5, 1, 1): norms 5, 6.4, ...; |x| = 4, a = (3, 3, 3, 3): norms 3, 4.2, 5.2, 6
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert sae.encode(x).tolist() == [[0, 5, 0, 0], [3, 3, 0, 0]]
    assert sae.loss(x, x, State()).terms["l0"] == 1.5
    # With at most one latent it is TopK.
    capped = TopAFASAE(TopAFAConfig(d_in=4, d_sae=4, k=1))
    capped.load_state_dict(sae.state_dict())
    assert capped.encode(x).count_nonzero(dim=1).tolist() == [1, 1]
    assert capped.loss(x, x, State()).terms["at_cap"] == 1


def dense_loss(sae: TopAFASAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, latents) without AuxK, row by row, all dense; by autograd."""
    a, norm = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu(), (x - sae.b_dec).norm(dim=1)
    z = torch.zeros_like(a)
    for n in range(len(x)):
        order = a[n].argsort(descending=True)[: sae.cfg.k]
        norms = [a[n, order[: j + 1]].norm() for j in range(sae.cfg.k)]
        j = min(range(sae.cfg.k), key=lambda j: abs((norms[j] - norm[n]).item()))
        z[n, order[: j + 1]] = a[n, order[: j + 1]]
    error = z @ sae.W_dec + sae.b_dec - x
    off = (z.norm(dim=1) - norm).square().sum() / norm.detach().square().sum()
    return error.square().sum() / (x - x.mean(dim=0)).square().sum() + sae.cfg.afa_weight * off, z


def test_topafa_gradients_are_those_of_the_dense_form():
    torch.manual_seed(0)
    x = torch.randn(40, 12)
    sae = TopAFASAE(TopAFAConfig(d_in=12, d_sae=30, k=8, afa_weight=0.3))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.3)
    dense, z = dense_loss(sae, x)
    made = sae.loss(x, x, State()).total
    assert len(set(z.count_nonzero(dim=1).tolist())) > 3
    torch.testing.assert_close(sae.encode(x), z)
    torch.testing.assert_close(made, dense)
    wanted = torch.autograd.grad(dense, list(sae.parameters()))
    got = torch.autograd.grad(made, list(sae.parameters()))
    for (name, _), a, b in zip(sae.named_parameters(), got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def test_a_row_without_positive_latents_makes_no_infinite_gradient():
    sae = TopAFASAE(TopAFAConfig(d_in=4, d_sae=8, k=3))
    sae.initialise(torch.randn(32, 4), seed=0)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    x = torch.randn(16, 4)
    sae.loss(x, x, State()).total.backward()
    assert sae.encode(x).count_nonzero() == 0
    assert all(p.grad.isfinite().all() for p in sae.parameters())


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match="afa_weight=-1 is out of range"):
        TopAFAConfig(d_in=4, d_sae=8, k=2, afa_weight=-1)
