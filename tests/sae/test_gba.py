"""Group bias adaptation: by hand, against the dense formula, and its rule for thresholds."""

import pytest
import torch

from sae import entries, load_sae
from sae.architectures.gba import GBASAE, GBAConfig
from sae.base import ConfigError, State
from sae.settings import Training
from sae.train import train
from tests.tiny import HOOK, planted_rows, planted_run

# Two inputs, three latents: e1, e2 and their opposite direction -e1.
W_DEC = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
X = torch.tensor([[3.0, 1.0], [-2.0, 0.5], [-1.0, -4.0]])


def small(**changes) -> GBASAE:
    sae = GBASAE(GBAConfig(**{"d_in": 2, "d_sae": 3, "target_l0": 1.5, "n_groups": 1, **changes}))
    with torch.no_grad():
        sae.W_dec.copy_(W_DEC)
        sae.gain.copy_(torch.tensor([0.5, 2.0, 1.0]))
        sae.threshold.copy_(torch.tensor([2.5, 0.75, 1.5]))
    return sae


def test_latents_by_hand():
    sae = small()
    assert sae.encode(X).tolist() == [[1.5, 2, 0], [0, 0, 2], [0, 0, 0]]
    assert sae.reconstruct(X).tolist() == [[1.5, 2], [-2, 0], [0, 0]]
    loss = sae.loss(X, X, State())
    spread = 14 + 17.25 - 3 * (2.5 / 3) ** 2
    assert loss.total.item() == pytest.approx((1.5**2 + 1 + 0.5**2 + 1 + 16) / spread)
    assert loss.terms["l0"].item() == pytest.approx(1)
    assert loss.fired.tolist() == [True, True, True]


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_gradients_are_those_of_the_dense_formula_and_thresholds_have_none(form, monkeypatch):
    monkeypatch.setattr(entries, "FEW", 1 if form == "sparse" else -1)
    torch.manual_seed(0)
    sae, x = GBASAE(GBAConfig(d_in=12, d_sae=30, target_l0=5)), torch.randn(40, 12)
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.5)
    sae.threshold.uniform_(0, 1)
    made = sae.loss(x, x, State()).total
    made.backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    assert set(ours) == {"W_dec", "gain", "b_dec"}
    sae.zero_grad()
    y = (x - sae.b_dec) @ sae.W_dec.T
    error = x - (sae.gain * y * (y > sae.threshold)) @ sae.W_dec - sae.b_dec
    total = error.square().sum() / (x - x.mean(dim=0)).square().sum()
    total.backward()
    torch.testing.assert_close(made, total)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_what_fires_too_often_rises_what_never_fires_falls_and_the_rest_stays(form, monkeypatch):
    monkeypatch.setattr(entries, "FEW", 1 if form == "sparse" else -1)
    sae = small(target_l0=1.2, update_rows=6, rate=0.1)  # a bound of 0.4 for each latent
    sae.threshold.copy_(torch.tensor([2.5, 0.25, 5.0]))  # it fires in 1, 2 and 0 of 3 rows, by 0.5 and 0.75 at most
    sae.loss(X, X, State())
    sae.after_step(State())
    assert sae.threshold.tolist() == [2.5, 0.25, 5.0]  # three rows are not six
    sae.loss(X, X, State())
    sae.after_step(State())
    floor = torch.tensor(2.0).sqrt()  # no threshold is above the norm of the rows, sqrt(d_in)
    torch.testing.assert_close(sae.threshold, torch.stack([floor, torch.tensor(0.25 + 0.075), floor]))
    assert not sae.n_fired.any()
    assert not sae.n_rows.any()
    sae.threshold.copy_(torch.tensor([1.2, 0.6, 1.4]))  # 1, 1 and 1 of the first two rows, by 1.8, 0.4 and 0.6
    sae.W_dec.data[2] = torch.tensor([0.0, -1.0])  # now never
    for _ in range(3):
        sae.loss(X[:2], X[:2], State())
    sae.after_step(State())
    # 1/2 is above the bound: latent 0 rises by 0.18, latent 1 by 0.04; latent 2 falls by a tenth of their mean, 1.1
    expected = torch.tensor([1.38, 0.64, 1.4 - 0.11])
    torch.testing.assert_close(sae.threshold, expected)


def test_bounds_fall_geometrically_and_sum_to_the_target():
    bounds = GBAConfig(d_in=4, d_sae=100, target_l0=10, n_groups=5, spread=16).bounds
    assert [a / b for a, b in zip(bounds, bounds[1:], strict=False)] == pytest.approx([2.0] * 4)
    assert sum(bounds) * 20 == pytest.approx(10)


@pytest.mark.parametrize("changes", [{"n_groups": 0}, {"n_groups": 31}, {"spread": 0.5}, {"rate": 1.0}])
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigError, match="expected 1 to d_sae=30 groups"):
        GBAConfig(**{"d_in": 12, "d_sae": 30, "target_l0": 5, **changes})


def test_training_stays_below_its_bound_and_finds_planted_directions_whose_frequency_it_was_told(tmp_path):
    rows, directions = planted_rows(12_000, 32, 24, 3, signed=False)
    sizes = {"d_sae": 24, "target_l0": 3, "n_groups": 1, "update_rows": 2560}
    run = planted_run(tmp_path / "run", rows)
    settings = Training(architecture="gba", hook=HOOK, sizes=sizes, n_tokens=300_000, batch=256, lr=5e-3)
    sae = load_sae(train(run, settings))
    assert isinstance(sae, GBASAE)
    assert 2 < (sae.encode(rows) != 0).sum(dim=1).float().mean().item() < 3.1
    assert (directions @ sae.W_dec.T).max(dim=1).values.mean() > 0.9
