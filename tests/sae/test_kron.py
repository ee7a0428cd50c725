"""KronSAE, against the outer products that it is defined by."""

import pytest
import torch
from torch import Tensor

from sae.architectures.kron import KronConfig, KronSAE
from sae.base import ConfigError, Dead, State

H, M, N, D_IN = 3, 2, 4, 6


@pytest.fixture
def sae() -> KronSAE:
    made = KronSAE(KronConfig(d_in=D_IN, d_sae=H * M * N, k=5))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture
def x() -> Tensor:
    return torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))


def every_pair(sae: KronSAE, x: Tensor) -> Tensor:
    """All d_sae latents, before TopK: for each head the outer product of its two sides, a root of what is above 0."""
    z = []
    for head in range(H):
        rows = [*range(head * M, head * M + M), *range(H * M + head * N, H * M + head * N + N)]
        side = ((x - sae.b_dec) @ sae.W_enc[:, rows] + sae.b_enc[rows]).relu()
        outer = torch.einsum("ri,rj->rij", side[:, :M], side[:, M:]).flatten(1)
        z.append(torch.where(outer > 0, outer.clamp(min=1e-12).sqrt(), 0.0))
    return torch.cat(z, dim=1)


def test_it_equals_the_explicit_outer_product(sae, x):
    z = every_pair(sae, x)
    kept = z.topk(5, dim=1)
    wanted = torch.zeros_like(z).scatter(1, kept.indices, kept.values)
    assert (wanted != 0).any(dim=0).sum() > 15
    torch.testing.assert_close(sae.encode(x), wanted)
    torch.testing.assert_close(sae.reconstruct(x), wanted @ sae.W_dec + sae.b_dec, atol=1e-5, rtol=1e-5)


def test_a_pair_by_hand():
    # Head 0 of 1 x 2: u = 4 x_0; v = (x_1, -x_1) + (0, 1). At x = (1, 9): u = 4, v = (9, 0): z = (6, 0).
    sae = KronSAE(KronConfig(d_in=2, d_sae=2, k=2, m=1, n=2))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, -1.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.0, 1.0]))
    assert sae.encode(torch.tensor([[1.0, 9.0], [-1.0, 9.0], [1.0, -3.0]])).tolist() == [[6, 0], [0, 0], [0, 4]]


def test_pairs_that_are_off_are_zero_and_never_the_floor_of_a_root(sae, x):
    sae.b_enc.data -= 2.0  # fewer than k pairs are on
    z = sae.encode(x)
    assert ((z != 0).sum(dim=1) < 5).any()
    assert torch.equal(z != 0, every_pair(sae, x) * (z != 0) > 0)
    assert not sae.loss(x, x, State()).fired[(z == 0).all(dim=0)].any()


@pytest.mark.parametrize("with_dead", [False, True])
def test_gradients_are_those_of_the_dense_form(sae, x, with_dead):
    latents = torch.arange(0, H * M * N, 3)
    dead = Dead(latents, torch.ones(len(latents), dtype=torch.bool), torch.tensor(float(len(latents))))
    made = sae.loss(x, x, State(dead=dead if with_dead else None)).total
    made.backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    z = every_pair(sae, x)
    error = (z * (z >= z.topk(5, dim=1).values[:, -1:])) @ sae.W_dec + sae.b_dec - x
    total = error.square().sum() / (x - x.mean(dim=0)).square().sum()
    if with_dead:
        left, places = error.detach(), 4  # the power of two near d_in / 2
        z_dead = z[:, latents]
        z_dead = z_dead * (z_dead >= z_dead.topk(places, dim=1).values[:, -1:])
        aux = (left + z_dead @ sae.W_dec[latents]).square().sum() / (left - left.mean(dim=0)).square().sum()
        total = total + aux / 32
    total.backward()
    torch.testing.assert_close(made, total)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_sizes_that_make_no_whole_heads_are_refused():
    with pytest.raises(ConfigError, match="no whole heads"):
        KronConfig(d_in=4, d_sae=20, k=2, m=2, n=4)


def test_its_encoder_has_m_plus_n_rows_a_head():
    shapes = {name: tuple(p.shape) for name, p in KronSAE(KronConfig(d_in=16, d_sae=80, k=2)).named_parameters()}
    assert shapes == {"W_dec": (80, 16), "W_enc": (16, 60), "b_enc": (60,), "b_dec": (16,)}
