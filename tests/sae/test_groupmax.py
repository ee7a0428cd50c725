"""GroupMax by hand, and beside its dense form."""

import pytest
import torch

from sae.architectures.groupmax import GroupMaxConfig, GroupMaxSAE, group_max
from sae.base import ConfigError, State


def test_each_group_keeps_its_largest_positive_latent():
    pre = torch.tensor([[1.0, 3.0, 2.0, -1.0, -2.0, -3.0], [5.0, 5.0, 0.0, 0.0, 0.5, 9.0]])
    values, indices = group_max(pre, 2)
    assert values.tolist() == [[3, 0], [5, 9]]
    assert indices.tolist() == [[1, 3], [0, 5]]
    assert group_max(pre, 3)[0].tolist() == [[3, 2, 0], [5, 0, 9]]


def test_groupmax_gradients_are_those_of_the_dense_form():
    torch.manual_seed(0)
    x = torch.randn(40, 12)
    sae = GroupMaxSAE(GroupMaxConfig(d_in=12, d_sae=30, k=5))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.5)
    p = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    z = torch.cat([part * (part == part.amax(dim=1, keepdim=True)) for part in p.split(6, dim=1)], dim=1)
    error = z @ sae.W_dec + sae.b_dec - x
    dense = error.square().sum() / (x - x.mean(dim=0)).square().sum()
    made = sae.loss(x, x, State()).total
    torch.testing.assert_close(made, dense)
    torch.testing.assert_close(sae.encode(x), z)
    wanted = torch.autograd.grad(dense, list(sae.parameters()))
    got = torch.autograd.grad(made, list(sae.parameters()))
    for (name, _), a, b in zip(sae.named_parameters(), got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def test_groups_must_be_equal():
    with pytest.raises(ConfigError, match="d_sae=30 makes no k=4 equal groups"):
        GroupMaxConfig(d_in=12, d_sae=30, k=4)


def test_annealed_groups_are_a_divisor_of_the_width():
    sae = GroupMaxSAE(GroupMaxConfig(d_in=12, d_sae=30, k=5))
    sae.initialise(torch.randn(64, 12), seed=0)
    assert sae.loss(torch.randn(8, 12), torch.randn(8, 12), State(k=7)).terms["l0"] <= 10
