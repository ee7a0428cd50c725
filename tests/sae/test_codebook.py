"""Codebook features: the mean of the k nearest codes."""

import pytest
import torch
from torch.nn.functional import normalize

from sae.architectures.codebook import CodebookConfig, CodebookSAE
from sae.base import State
from sae.settings import Training
from sae.stepper import Stepper
from tests.tiny import HOOK, planted_rows


def test_a_row_is_the_mean_of_its_nearest_codes_by_hand():
    sae = CodebookSAE(CodebookConfig(d_in=2, d_sae=3, k=2))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        sae.size.copy_(torch.tensor([2.0, 4.0, 6.0]))
    x = torch.tensor([[3.0, 1.0], [-9.0, 1.0], [5.0, -7.0]])
    # The nearest two of (3, 1) are the codes (2, 0) and (0, 4); one code alone points towards (5, -7).
    assert sae.encode(x).tolist() == [[1, 2, 0], [0, 2, 3], [1, 0, 0]]
    assert sae.reconstruct(x).tolist() == [[1, 2], [-3, 2], [1, 0]]


def test_gradients_are_those_of_the_mean_of_codes_by_autograd():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=generator)
    sae = CodebookSAE(CodebookConfig(d_in=8, d_sae=20, k=3))
    sae.initialise(x, seed=0)
    sae.size.data = 1 + torch.rand(20, generator=generator)
    made = sae.loss(x, x, State()).total
    made.backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    chosen = ((x - sae.b_dec) @ sae.W_dec.T).detach().topk(3, dim=1).indices
    codes = sae.size[:, None] * sae.W_dec
    error = codes[chosen].mean(dim=1) + sae.b_dec - x
    total = error.square().sum() / (x - x.mean(dim=0)).square().sum()
    total.backward()
    torch.testing.assert_close(made, total)
    assert set(ours) == {"W_dec", "b_dec", "size"}
    for name, p in sae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_codes_start_at_different_rows_and_of_the_best_common_size():
    x = planted_rows(50, 8, 12, 3, signed=False)[0]
    sae = CodebookSAE(CodebookConfig(d_in=8, d_sae=50, k=2))
    sae.initialise(x, seed=3)
    fits = normalize(x - x.mean(dim=0), dim=1) @ sae.W_dec.T
    assert sorted(fits.argmax(dim=0).tolist()) == list(range(50))
    losses = []
    for factor in (0.9, 1.0, 1.1):
        sae.size.data *= factor
        losses.append(sae.loss(x, x, State()).total.item())
        sae.size.data /= factor
    assert losses[1] == min(losses)


def test_dead_codes_start_anew_without_being_asked():
    away = torch.zeros(16)
    away[0] = 1.0
    rows = planted_rows(4000, 16, 20, 3, signed=False)[0] + 20 * away
    wanted = Training(
        architecture="codebook", hook=HOOK, sizes={"d_sae": 64, "k": 2}, n_tokens=25_600, batch=64, matmul="float32"
    )
    assert sum(wanted.resamples_at(step) for step in range(wanted.n_steps)) == 20
    sae = CodebookSAE(CodebookConfig(d_in=16, d_sae=64, k=2))
    sae.initialise(rows, seed=0)
    with torch.no_grad():
        sae.W_dec[:10] = -away  # of no row among the nearest
        sae.b_dec.zero_()
    stepper = Stepper(sae, wanted, 1.0)
    for step in range(60):
        stepper.step(rows[step * 64 : step * 64 + 64])
    stepper.recount()
    before, n_dead = sae.W_dec[:10].clone(), stepper.n_dead
    assert n_dead >= 10
    stepper.resample(rows[:1000])
    assert stepper.n_dead == 0
    moved = 1 - (before * sae.W_dec[:10]).sum(dim=1)
    assert (moved > 0.5).all()


@pytest.mark.parametrize("architecture", ["topk", "matching_pursuit"])
def test_others_are_not_resampled_unasked(architecture):
    wanted = Training(architecture=architecture, hook=HOOK, sizes={"d_sae": 64, "k": 2}, n_tokens=2560, batch=64)
    assert not any(wanted.resamples_at(step) for step in range(wanted.n_steps))
