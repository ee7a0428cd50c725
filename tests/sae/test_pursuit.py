"""Greedy codes, against cases worked by hand and plain loops, and the dictionary that is trained through them."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae import load_sae
from sae.architectures.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from sae.base import State
from sae.files import save_sae
from sae.pursuit import Matching, gradient, matching, merged, orthogonal

# Rows of W: e1, e2 and the direction between them.
W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])


@pytest.fixture
def case() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 12, generator=generator), normalize(torch.randn(40, 12, generator=generator), dim=1)


def test_matching_pursuit_by_hand():
    # (3, 4) fits row 2 with 5 exactly. (1, 1): row 2 with 1.4 leaves (.16, -.12), row 0 with .16 leaves (0, -.12).
    codes = matching(torch.tensor([[3.0, 4.0], [1.0, 1.0], [-1.0, -1.0]]), W, 2)
    torch.testing.assert_close(codes.values, torch.tensor([[5.0, 0.0], [1.4, 0.16], [0.0, 0.0]]))
    assert codes.indices[:2, 0].tolist() == [2, 2]
    assert codes.indices[1, 1] == 0
    torch.testing.assert_close(codes.residual, torch.tensor([[0.0, 0.0], [0.0, -0.12], [-1.0, -1.0]]))


def test_a_row_stops_at_the_threshold_or_when_it_picks_a_latent_again():
    x = torch.tensor([[1.0, 1.0]])
    assert (matching(x, W, 3, threshold=0.21).values != 0).sum() == 1  # sqrt(.16^2 + .12^2) = .2 is left
    assert (matching(x, W, 3, threshold=0.19).values != 0).sum() == 2
    x, W_near = torch.tensor([[0.2, 1.0]]), torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    picks = matching(x, W_near, 6).indices[0].tolist()
    assert picks[:4] == [1, 0, 1, 0] or picks[:3] == [1, 0, 0]
    stopped = matching(x, W_near, 6, once=True)
    again = next(t for t in range(6) if picks[t] in picks[:t])
    assert (stopped.values[0] != 0).sum() <= again + 1


@pytest.mark.parametrize("signed", [False, True])
def test_energy_falls_by_the_square_of_each_coefficient(case, signed):
    x, W = case
    codes = matching(x, W, 6, signed=signed)
    before = x.square().sum(dim=1)
    for t in range(6):
        after = matching(x, W, t + 1, signed=signed).residual.square().sum(dim=1)
        torch.testing.assert_close(before - after, codes.values[:, t].square(), atol=1e-4, rtol=1e-4)
        before = after
    z = torch.zeros(len(x), len(W)).scatter_add(1, codes.indices, codes.values)
    torch.testing.assert_close(x - z @ W, codes.residual, atol=1e-5, rtol=1e-5)
    assert (z >= 0).all() != signed


def test_products_made_anew_and_products_corrected_pick_the_same(case, monkeypatch):
    x, W = case
    corrected = matching(x, W, 6)
    monkeypatch.setattr("sae.pursuit.AT_ONCE", 0)
    anew = matching(x, W, 6)
    assert torch.equal(corrected.indices, anew.indices)
    torch.testing.assert_close(corrected.values, anew.values, atol=1e-5, rtol=1e-5)


def test_the_gradient_is_that_of_all_steps_by_autograd(case):
    x, W = (tensor.double() for tensor in case)
    x.requires_grad_()
    W.requires_grad_()
    codes = matching(x.detach(), W.detach(), 6)
    again = (codes.indices[:, :, None] == codes.indices[:, None]).sum(dim=(1, 2)) > 6
    assert again.any()  # a latent picked twice is among the rows
    weight = torch.randn_like(x)
    (Matching.apply(x, W, codes) * weight).sum().backward()
    ours = x.grad.clone(), W.grad.clone()
    x.grad = W.grad = None
    r = x
    for t in range(6):
        w = W[codes.indices[:, t]]
        r = r - (r * w).sum(dim=1, keepdim=True).relu() * w
    (r * weight).sum().backward()
    torch.testing.assert_close(ours, (x.grad, W.grad))


def test_merged_codes_have_each_latent_once():
    values, indices = merged(torch.tensor([[1.0, 2.0, 4.0, 0.0]]), torch.tensor([[7, 3, 7, 3]]))
    assert indices.tolist() == [[3, 3, 7, 7]]
    assert values.tolist() == [[2, 0, 5, 0]]


def test_orthogonal_pursuit_is_least_squares_on_its_support(case):
    x, W = case
    codes = orthogonal(x, W, 5)
    for n in range(0, len(x), 37):
        chosen: list[int] = []
        left = x[n].numpy()
        for _ in range(5):
            fit = np.abs(W.numpy() @ left)
            fit[chosen] = -1
            chosen.append(int(fit.argmax()))
            S = W[chosen].numpy().T
            solved = np.linalg.lstsq(S, x[n].numpy(), rcond=None)[0]
            left = x[n].numpy() - S @ solved
        assert codes.indices[n].tolist() == chosen
        np.testing.assert_allclose(codes.values[n], solved, atol=1e-4)
        np.testing.assert_allclose(codes.residual[n], left, atol=1e-4)


def test_orthogonal_pursuit_stops_at_a_row_of_the_dictionary(case):
    _, W = case
    codes = orthogonal(3 * W, W, 5)
    assert torch.equal(codes.indices[:, 0], torch.arange(len(W)))
    torch.testing.assert_close(codes.values, torch.cat([torch.full((40, 1), 3.0), torch.zeros(40, 4)], dim=1))


def test_gradient_pursuit_takes_the_best_step_and_lies_between_the_other_two(case):
    _, W = case
    x = torch.rand(300, 40, generator=torch.Generator().manual_seed(1)).pow(8) @ W
    one = gradient(x, W, 1)
    torch.testing.assert_close(one.values, matching(x, W, 1).values)
    left = [pursue(x, W, 6).residual.square().sum().item() for pursue in (orthogonal, gradient, matching)]
    assert left[0] < left[1] < left[2]
    codes = gradient(x, W, 6)
    assert (codes.values >= 0).all()
    z = torch.zeros(len(x), len(W)).scatter_add(1, codes.indices, codes.values)
    torch.testing.assert_close(x - z @ W, codes.residual, atol=1e-5, rtol=1e-5)


# The dictionary


def made(case, **changes) -> MatchingPursuitSAE:
    x, W = case
    sae = MatchingPursuitSAE(MatchingPursuitConfig(d_in=12, d_sae=40, k=6, **changes))
    with torch.no_grad():
        sae.W_dec.copy_(W)
        sae.b_dec.copy_(x.mean(dim=0))
    return sae


def test_its_loss_is_the_fvu_of_its_reconstruction_and_trains_b_dec_too(case):
    x, sae = case[0], made(case)
    loss = sae.loss(x, x, State())
    error = (x - sae.reconstruct(x)).square().sum() / (x - x.mean(dim=0)).square().sum()
    torch.testing.assert_close(loss.total, error)
    assert loss.terms["l0"] == (sae.encode(x) != 0).sum(dim=1).float().mean()
    loss.total.backward()
    assert sae.b_dec.grad is not None
    step, slope = 1e-2 * sae.b_dec.grad / sae.b_dec.grad.norm(), sae.b_dec.grad.norm()
    with torch.no_grad():
        sae.b_dec += step
        higher = sae.loss(x, x, State()).total
        sae.b_dec -= 2 * step
    lower = sae.loss(x, x, State()).total.detach()
    assert ((higher - lower) / 2e-2).item() == pytest.approx(slope.item(), rel=0.1)  # few picks change


def test_fewer_steps_at_inference_are_a_prefix(case):
    x, sae = case[0], made(case)
    assert torch.equal(sae.encode_sparse(x, k=1)[1][:, 0], matching(x - sae.b_dec, sae.W_dec, 6).indices[:, 0])
    assert sae.encode_sparse(x, k=3)[0].shape == (300, 3)


def test_the_threshold_shrinks_with_the_rows(case):
    x, sae = case[0], made(case, residual_threshold=6.0)
    z = sae.encode(4 * x)
    assert (z != 0).sum() < (made(case).encode(4 * x) != 0).sum()
    sae.unscale(4.0)
    assert sae.cfg.residual_threshold == 1.5
    torch.testing.assert_close(4 * sae.encode(x), z, atol=1e-4, rtol=1e-4)


def test_it_is_saved_with_the_fields_and_weights_that_saelens_reads(case, tmp_path):
    save_sae(made(case), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["max_iterations"] == 6
    assert not cfg["stop_on_duplicate_support"]
    assert cfg["residual_threshold"] == 0
    del cfg["k"]  # as SAELens writes it
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    loaded = load_sae(tmp_path)
    assert loaded.cfg == made(case).cfg
    assert {name for name, _ in loaded.named_parameters()} == {"W_dec", "b_dec"}
