"""Each architecture on a case worked by hand, and on planted truth."""

import pytest
import torch

from sae import load_sae
from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import SAE, Dead, State
from sae.evals.truth import match
from sae.jump import jump, jump_backward
from sae.settings import Training
from sae.train import train
from tests.tiny import HOOK, planted_rows, planted_run

# Two inputs, three latents: e1, e2 and their opposite direction -e1.
W_ENC = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
X = torch.tensor([[3.0, 1.0], [-2.0, 0.5], [-1.0, -4.0]])


def by_hand(sae: SAE) -> SAE:
    with torch.no_grad():
        sae.W_enc.copy_(W_ENC)
        sae.W_dec.copy_(W_ENC.T)
    return sae


def test_topk_by_hand():
    sae = by_hand(TopKSAE(TopKConfig(d_in=2, d_sae=3, k=1)))
    assert sae.encode(X).tolist() == [[3, 0, 0], [0, 0, 2], [0, 0, 1]]
    assert sae.reconstruct(X).tolist() == [[3, 0], [-2, 0], [-1, 0]]


def test_topk_keeps_fewer_when_fewer_are_positive():
    sae = by_hand(TopKSAE(TopKConfig(d_in=2, d_sae=3, k=2)))
    assert sae.encode(torch.tensor([[-1.0, -4.0]])).tolist() == [[0, 0, 1]]


def test_abstopk_keeps_the_sign_and_takes_the_largest_magnitude():
    sae = by_hand(AbsTopKSAE(AbsTopKConfig(d_in=2, d_sae=2 + 1, k=1)))
    z = sae.encode(torch.tensor([[0.5, -4.0]]))
    assert z.tolist() == [[0, -4, 0]]
    assert sae.reconstruct(torch.tensor([[0.5, -4.0]])).tolist() == [[0, -4]]


def test_jumprelu_by_hand():
    sae = by_hand(JumpReLUSAE(JumpReLUConfig(d_in=2, d_sae=3, target_l0=1)))
    sae.threshold.data = torch.tensor([2.5, 0.75, 1.5])
    assert sae.encode(X).tolist() == [[3, 1, 0], [0, 0, 2], [0, 0, 0]]


def test_jumprelu_gradient_is_the_formula():
    # d/dp = 1[p > t] g + (t g + h) K / w, d/dt = -(t g + h) K / w, with K = 1 inside |p - t| < w / 2
    pre, threshold = torch.tensor([[0.9, 1.2, 3.0, 0.2]]), torch.full((4,), 1.0)
    z, counts = jump(pre, threshold)
    assert z[0].tolist() == pytest.approx([0, 1.2, 3.0, 0])
    assert counts.tolist() == [0, 1, 1, 0]
    dp, db, dt = jump_backward(pre, threshold, torch.full((1, 4), 2.0), torch.tensor(3.0), 0.5)
    step = (1.0 * 2.0 + 3.0) / 0.5
    assert dp[0].tolist() == db.tolist() == pytest.approx([step, 2 + step, 2, 0])
    assert dt.tolist() == pytest.approx([-step, -step, 0, 0])


def test_jumprelu_gradient_is_the_slope_of_the_mean():
    """Over rows spread evenly round the threshold, the estimator's mean is the slope of the mean L0."""
    pre = torch.linspace(0, 2, 40_001)[:, None]

    def mean_l0(t: float) -> float:
        return float((pre > t).float().mean())

    weight = torch.tensor(1 / len(pre))
    slope = jump_backward(pre, torch.tensor([1.0]), torch.zeros_like(pre), weight, 0.2)[2]
    assert slope.item() == pytest.approx((mean_l0(1.01) - mean_l0(0.99)) / 0.02, rel=0.01)


def test_jumprelu_gradients_are_those_of_the_dense_form_by_autograd():
    torch.manual_seed(0)
    x, width, l0_weight = torch.randn(40, 12), 0.8, 0.3
    sae = JumpReLUSAE(JumpReLUConfig(d_in=12, d_sae=30, target_l0=5, bandwidth=width, weight=1.0))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.5)
    sae.controller.coefficient.fill_(l0_weight * 5)
    made = sae.loss(x, x, State(penalty=0.5)).total
    made.backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    on = (pre > sae.threshold).float()
    ramp = ((pre - sae.threshold) / width).clamp(-0.5, 0.5)
    step = on + ramp - ramp.detach()  # the step's value, the ramp's slope
    z = pre * on + sae.threshold.detach() * (step - on)
    error = x - z @ sae.W_dec - sae.b_dec
    total = error.square().sum() / (x - x.mean(dim=0)).square().sum() + 0.5 * l0_weight * step.sum(dim=1).mean()
    total.backward()
    torch.testing.assert_close(made, total)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_auxk_reaches_the_encoder_rows_of_dead_latents():
    rows, _ = planted_rows(256, 16, 32, 4, signed=False)
    sae = TopKSAE(TopKConfig(d_in=16, d_sae=32, k=4))
    sae.initialise(rows, seed=0)
    dead = torch.arange(32) >= 24
    sae.b_enc.data[dead] = -1.0  # low enough never to be chosen, high enough to be above 0 now and then
    pre = (rows - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert not torch.isin(pre.topk(4).indices, dead.nonzero()).all()
    sae.loss(rows, rows, State()).total.backward()
    quiet = sae.W_enc.grad.T[dead].norm(dim=1)
    sae.zero_grad()
    sae.loss(
        rows, rows, State(dead=Dead(dead.nonzero().squeeze(1), torch.ones(8, dtype=torch.bool), torch.tensor(8.0)))
    ).total.backward()
    assert (sae.W_enc.grad.T[dead].norm(dim=1) > quiet + 1e-6).any()


def trained(tmp_path, rows, architecture: str, d_sae: int, field: str = "k") -> SAE:
    run = planted_run(tmp_path / architecture, rows)
    settings = Training(
        architecture=architecture, hook=HOOK, sizes={"d_sae": d_sae, field: 3}, n_tokens=150_000, batch=256, lr=3e-3
    )
    return load_sae(train(run, settings))


def test_abstopk_recovers_a_planted_dictionary_of_opposites_with_half_the_latents(tmp_path):
    rows, directions = planted_rows(12_000, 32, 24, 3, signed=True)
    signed = trained(tmp_path, rows, "abstopk", 24)
    assert match(signed.W_dec, directions).mcc > 0.95
    assert signed.statistics is not None
    assert (signed.statistics.max > 0.5).all()
    assert (signed.statistics.min < -0.5).all()  # both poles of every latent are used
    assert match(trained(tmp_path, rows, "topk", 24).W_dec, directions).mcc < 0.9  # TopK needs one latent a pole


@pytest.mark.parametrize(("architecture", "field"), [("topk", "k"), ("jumprelu", "target_l0")])
def test_positive_planted_dictionaries_are_recovered(tmp_path, architecture, field):
    rows, directions = planted_rows(12_000, 32, 24, 3, signed=False)
    sae = trained(tmp_path, rows, architecture, 24, field)
    assert match(sae.W_dec, directions).mcc > 0.95
    assert (sae.encode(rows) != 0).sum(dim=1).float().mean().item() == pytest.approx(3, rel=0.05)
