"""The sparse products equal the dense ones, in values and in gradients."""

import pytest
import torch

from sae import sparse
from sae.select import abs_topk, topk

N, D, F, K = 37, 12, 50, 6


@pytest.fixture
def parts():
    torch.manual_seed(0)
    x = torch.randn(N, D)
    W_enc = torch.randn(F, D).T.requires_grad_()
    W_dec = torch.randn(F, D, requires_grad=True)
    b_enc, b_dec = torch.randn(F, requires_grad=True), torch.randn(D, requires_grad=True)
    return x, W_enc, W_dec, b_enc, b_dec


@pytest.mark.parametrize("select", [topk, abs_topk])
def test_encode_and_decode_with_gradients_as_the_dense_form(parts, select):
    x, W_enc, W_dec, b_enc, b_dec = parts
    pre = (x - b_dec) @ W_enc + b_enc
    chosen, indices = select(pre.detach(), K)
    goal = torch.randn(N, D)

    mask = torch.zeros(N, F).scatter_(1, indices, (chosen != 0).float())
    (((pre * mask) @ W_dec + b_dec - goal) ** 2).sum().backward()
    dense = [p.grad.clone() for p in parts[1:]]
    for p in parts[1:]:
        p.grad = None

    values = sparse.selected(chosen, indices, x, W_enc, b_enc, b_dec)
    ((sparse.decode(values, indices, W_dec) + b_dec - goal) ** 2).sum().backward()
    for p, expected in zip(parts[1:], dense, strict=True):
        torch.testing.assert_close(p.grad, expected, atol=1e-3, rtol=1e-4)


def test_to_sparse_and_back():
    z = torch.tensor([[0.0, -2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    values, indices = sparse.to_sparse(z)
    assert values.shape == (3, 2)
    assert torch.equal(sparse.to_dense(values, indices, 4), z)


def test_to_sparse_of_nothing_but_zeros():
    values, indices = sparse.to_sparse(torch.zeros(2, 5))
    assert values.tolist() == [[0], [0]]
    assert torch.equal(sparse.to_dense(values, indices, 5), torch.zeros(2, 5))
