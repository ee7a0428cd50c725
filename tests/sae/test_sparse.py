"""The sparse products equal the dense ones, in values and in gradients."""

import pytest
import torch

from sae import sparse
from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import Dead, State

N, D, F, K = 37, 12, 50, 6
CLASSES = {"topk": (TopKSAE, TopKConfig), "abstopk": (AbsTopKSAE, AbsTopKConfig)}


@pytest.fixture(params=list(CLASSES))
def sae(request):
    torch.manual_seed(0)
    made, config = CLASSES[request.param]
    sae = made(config(d_in=D, d_sae=F, k=K, auxk_weight=0.5))
    for parameter in sae.parameters():
        parameter.data.normal_()
    return sae


def dense_loss(sae, x, dead):
    """FVU + weight * AuxK through dense latents and autograd alone."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    size = pre.abs() if sae.signed else pre.relu()
    kept = size >= size.topk(K).values[:, -1:]
    error = x - ((pre if sae.signed else pre.relu()) * kept) @ sae.W_dec - sae.b_dec
    total = error.square().sum() / (x - x.mean(dim=0)).square().sum()
    if len(dead):
        k_aux = min(8, len(dead))  # the power of two nearest to d_in / 2 = 6 is 8
        kept = size[:, dead] >= size[:, dead].topk(k_aux).values[:, -1:]
        e = error.detach()
        e_hat = (pre[:, dead] * kept * (size[:, dead] > 0)) @ sae.W_dec[dead]
        total = total + 0.5 * min(len(dead) / 8, 1.0) * (e - e_hat).square().sum() / (e - e.mean(dim=0)).square().sum()
    return total


@pytest.mark.parametrize("n_dead", [0, 3, 20])
def test_loss_and_gradients_are_those_of_the_dense_form(sae, n_dead):
    x = torch.randn(N, D)
    dead = torch.randperm(F)[:n_dead]
    real = torch.ones(n_dead, dtype=torch.bool)
    if n_dead == 3:  # places that only fill up count for nothing
        dead, real = torch.tensor([4, 9, 11, 0, 0]), torch.tensor([True, True, True, False, False])
    state = State(dead=Dead(dead, real, torch.tensor(float(n_dead)))) if n_dead else State()
    made = sae.loss(x, x, state).total
    made.backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    expected = dense_loss(sae, x, dead[real])
    expected.backward()
    torch.testing.assert_close(made, expected)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_to_sparse_and_back():
    z = torch.tensor([[0.0, -2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    values, indices = sparse.to_sparse(z)
    assert values.shape == (3, 2)
    assert torch.equal(sparse.to_dense(values, indices, 4), z)


def test_to_sparse_of_nothing_but_zeros():
    values, indices = sparse.to_sparse(torch.zeros(2, 5))
    assert values.tolist() == [[0], [0]]
    assert torch.equal(sparse.to_dense(values, indices, 5), torch.zeros(2, 5))
