"""Architectures with a penalty, and the coefficient that follows L0: by hand, by dense formulas, on planted truth."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae import entries, load_sae
from sae.architectures.gated import GatedConfig, GatedSAE
from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from sae.architectures.standard import StandardConfig, StandardSAE
from sae.base import SAE, ConfigError, Dead, State
from sae.controller import Controller, PenaltyConfig
from sae.files import save_sae
from sae.ksparse import centred
from sae.registry import REGISTRY
from sae.resample import resample
from sae.settings import Training
from sae.stepper import Stepper
from sae.train import train
from tests.tiny import HOOK, planted_rows, planted_run

D_IN, D_SAE, TARGET = 12, 30, 5

# Two inputs, three latents: e1, e2 and their opposite direction -e1.
W_ENC = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
X = torch.tensor([[3.0, 1.0], [-2.0, 0.5], [-1.0, -4.0]])
SPREAD = 14 + 17.25 - 3 * (2.5 / 3) ** 2
"""Of X around its mean (0, -2.5 / 3)."""


def by_hand(sae: SAE, **values: list[float]) -> SAE:
    with torch.no_grad():
        sae.W_enc.copy_(W_ENC)
        sae.W_dec.copy_(W_ENC.T)
        for name, value in values.items():
            sae.get_parameter(name).copy_(torch.tensor(value))
    return sae


# The coefficient


def test_the_coefficient_rises_by_a_hundredth_of_the_log_distance_of_l0_and_falls_below_it():
    controller = Controller(PenaltyConfig(d_in=4, d_sae=100, target_l0=10), start=0.01)
    assert controller.term(torch.tensor(3.0), torch.tensor(20.0), 1.0).item() == pytest.approx(0.01 * 3 / 10)
    controller.follow(1.0)
    assert controller.coefficient.item() == pytest.approx(0.01 * 2**0.01)
    controller.term(torch.tensor(3.0), torch.tensor(0.0), 1.0)  # log 0: a step of at most 1 %
    controller.follow(1.0)
    assert controller.coefficient.item() == pytest.approx(0.01 * 2**0.01 * math.exp(-0.01))


def test_while_it_warms_up_the_coefficient_follows_an_aim_that_falls_to_the_target():
    controller = Controller(PenaltyConfig(d_in=4, d_sae=100, target_l0=10, start_l0=4.0), start=0.01)
    for warm, aim in ((torch.tensor(0.0), 40.0), (torch.tensor(0.5), 20.0), (1.0, 10.0)):
        assert controller.term(torch.tensor(3.0), torch.tensor(aim), warm).item() == pytest.approx(0.01 * 3 / 10)
        controller.follow(warm)
        assert controller.coefficient.item() == pytest.approx(0.01, rel=1e-5)


def test_a_fixed_weight_is_that_beside_the_squared_error_of_rows_of_norm_sqrt_d_in_and_warms_up():
    controller = Controller(PenaltyConfig(d_in=4, d_sae=100, target_l0=10, weight=6.0), start=0.01)
    for warm in (0.25, 1.0, 1.0):
        term = controller.term(torch.tensor(3.0), torch.tensor(99.0), warm)
        assert term.item() == pytest.approx(warm * 6 / 4 * 3)
        controller.follow(warm)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (StandardConfig, {"weight": -1.0}, "weight=-1.0 is out of range"),
        (StandardConfig, {"start_l0": 0.0}, "start_l0=0.0 is out of range"),
        (StandardConfig, {"rows": "any"}, "rows='any' is unknown: expected one of unit, free"),
        (StandardConfig, {"p_end": 0.0}, "p_end=0.0, anneal_start=0.3: expected"),
        (StandardConfig, {"anneal_start": 1.0}, "anneal_start=1.0: expected"),
        (GatedConfig, {"target_l0": 30}, "target_l0=30 is out of range"),
        (JumpReLUConfig, {"loss": "l1"}, "loss='l1' is unknown: expected one of step, tanh"),
        (JumpReLUConfig, {"bandwidth": 0.0}, "bandwidth=0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        config(**{"d_in": D_IN, "d_sae": D_SAE, "target_l0": TARGET, **changes})


# By hand


def test_standard_by_hand():
    sae = by_hand(StandardSAE(StandardConfig(d_in=2, d_sae=3, target_l0=1)), b_enc=[-1, 0, -0.5], b_dec=[0, 0.5])
    assert sae.encode(X).tolist() == [[2, 0.5, 0], [0, 0, 1.5], [0, 0, 0.5]]
    assert sae.reconstruct(X).tolist() == [[2, 1], [-1.5, 0.5], [-0.5, 0.5]]
    loss = sae.loss(X, X, State())
    assert loss.terms["l0"].item() == pytest.approx(4 / 3)
    fvu = (1 + 0.25 + 0.25 + 4.5**2) / SPREAD
    assert loss.terms["fvu"].item() == pytest.approx(fvu)
    assert loss.total.item() == pytest.approx(fvu + 0.1 * (2 + 0.5 + 1.5 + 0.5) / 3)


def test_gated_by_hand():
    sae = by_hand(
        GatedSAE(GatedConfig(d_in=2, d_sae=3, target_l0=1)),
        b_gate=[-2.5, 1, -1.5],
        b_mag=[1, -0.75, 0],
        r_mag=[math.log(2), 0, math.log(3)],
    )
    # gates 0.5, 2, -4.5 | -4.5, 1.5, 0.5 | -3.5, -3, -0.5; magnitudes 2 * 3 + 1, 1 - 0.75, ... | 0.5 - 0.75 < 0
    torch.testing.assert_close(sae.encode(X), torch.tensor([[7.0, 0.25, 0], [0, 0, 6], [0, 0, 0]]))
    loss = sae.loss(X, X, State())
    assert loss.terms["l0"].item() == pytest.approx(1)
    assert loss.fired.tolist() == [True, True, True]
    fvu = (4**2 + 0.75**2 + 4**2 + 0.5**2 + 1 + 4**2) / SPREAD
    aux = ((3 - 0.5) ** 2 + (1 - 2) ** 2 + (-2 + 0.5) ** 2 + (0.5 - 1.5) ** 2 + 1 + 4**2) / SPREAD
    assert loss.terms["fvu"].item() == pytest.approx(fvu)
    assert loss.terms["aux"].item() == pytest.approx(aux)
    assert loss.total.item() == pytest.approx(fvu + aux + 0.1 * (0.5 + 2 + 1.5 + 0.5) / 3)


# Gradients


def fvu(error: Tensor, x: Tensor) -> Tensor:
    return error.square().sum() / (x - x.mean(dim=0)).square().sum()


def dense_standard(sae: StandardSAE, x: Tensor) -> Tensor:
    z = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    return fvu(x - z @ sae.W_dec - sae.b_dec, x) + 0.3 * (z * sae.W_dec.norm(dim=1)).sum(dim=1).mean()


def dense_gated(sae: GatedSAE, x: Tensor) -> Tensor:
    centred = x - sae.b_dec
    gate = centred @ sae.W_enc + sae.b_gate
    z = (gate > 0) * torch.relu(centred @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag)
    main = fvu(x - z @ sae.W_dec - sae.b_dec, x)
    aux = fvu(x - torch.relu(gate) @ sae.W_dec.detach() - sae.b_dec.detach(), x)
    return main + aux + 0.3 * torch.relu(gate).sum(dim=1).mean()


def dense_tanh(sae: JumpReLUSAE, x: Tensor) -> Tensor:
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    on = (pre > sae.threshold).float()
    ramp = ((pre - sae.threshold) / sae.cfg.bandwidth).clamp(-0.5, 0.5)
    z = pre * on + sae.threshold.detach() * (ramp - ramp.detach())  # the step's value, the ramp's slope
    total = fvu(x - z @ sae.W_dec - sae.b_dec, x) + 0.3 * torch.tanh(2.5 * z).sum(dim=1).mean()
    missing = torch.relu(sae.threshold - pre)[:, [3, 7]].sum(dim=1).mean()
    return total + sae.cfg.dead_weight / D_IN * missing


GRADIENTS: dict[str, tuple[type[SAE], PenaltyConfig, Callable[..., Tensor]]] = {
    "standard": (StandardSAE, StandardConfig(d_in=D_IN, d_sae=D_SAE, target_l0=TARGET, rows="free"), dense_standard),
    "gated": (GatedSAE, GatedConfig(d_in=D_IN, d_sae=D_SAE, target_l0=TARGET), dense_gated),
    "tanh": (
        JumpReLUSAE,
        JumpReLUConfig(
            d_in=D_IN, d_sae=D_SAE, target_l0=TARGET, bandwidth=0.8, loss="tanh", tanh_scale=2.5, dead_weight=0.7
        ),
        dense_tanh,
    ),
}


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("name", list(GRADIENTS))
def test_loss_and_gradients_are_those_of_the_dense_formula_by_autograd(name, form, monkeypatch):
    if form == "dense":  # a GPU's
        monkeypatch.setattr(entries, "SPARSE_ON", ())
    torch.manual_seed(0)
    kind, config, formula = GRADIENTS[name]
    sae, x = kind(config), torch.randn(40, D_IN)
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.5)
    if name == "gated":
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    sae.controller.coefficient.fill_(0.3 * TARGET)
    dead = Dead(torch.tensor([3, 7, 0]), torch.tensor([True, True, False]), torch.tensor(2.0))
    made = sae.loss(x, x, State(dead=dead))
    made.total.backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    expected = formula(sae, x)
    expected.backward()
    torch.testing.assert_close(made.total, expected)
    for name, p in sae.named_parameters():
        assert p.grad.abs().max() > 1e-4, name
        torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert torch.equal(made.fired, (sae.encode(x) != 0).any(dim=0))


def test_both_forms_of_the_step_loss_give_the_same(monkeypatch):
    torch.manual_seed(0)
    x, gradients = torch.randn(40, D_IN), []
    sae = JumpReLUSAE(JumpReLUConfig(d_in=D_IN, d_sae=D_SAE, target_l0=TARGET))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.5)
    for devices in (("cpu",), ()):
        monkeypatch.setattr(entries, "SPARSE_ON", devices)
        sae.zero_grad()
        loss = sae.loss(x, x, State())
        loss.total.backward()
        gradients.append([loss.total.detach(), loss.fired, *(p.grad.clone() for p in sae.parameters())])
    for sparse, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse, dense, atol=1e-6, rtol=1e-5)


# p


def test_a_falling_p_makes_large_latents_cheaper_and_leaves_the_penalty_as_large():
    config = StandardConfig(d_in=2, d_sae=3, target_l0=1, p_end=0.5, anneal_start=0.5, weight=4.0)
    sae = by_hand(StandardSAE(config), b_enc=[-1, 0, -0.5], b_dec=[0, 0.5])
    before = sae.loss(X, X, State(progress=0.5))
    assert (before.total - before.terms["fvu"]).item() == pytest.approx(4 / 2 * 4.5 / 3)
    for progress, p in ((0.75, 0.75), (1.0, 0.5)):
        after = sae.loss(X, X, State(progress=progress))
        assert sae.p.item() == p
        torch.testing.assert_close(after.total, before.total)
    z = torch.tensor([2.0, 0.5, 1.5, 0.5])
    plain = by_hand(StandardSAE(dataclasses.replace(config, weight=0.0)), b_enc=[-1, 0, -0.5], b_dec=[0, 0.5])
    for each in (sae, plain):
        each.loss(X, X, State()).total.backward()
    # of z^p, rescaled: latent 0 was 2 in one row, latent 1 .5 in one, latent 2 1.5 and .5
    slopes = 4 / 2 / 3 * 4.5 / z.sqrt().sum() * 0.5 / z.sqrt()
    found = sae.b_enc.grad - plain.b_enc.grad
    torch.testing.assert_close(found, torch.stack([slopes[0], slopes[1], slopes[2] + slopes[3]]))


def test_p_falls_over_the_run_and_a_small_latent_has_a_bounded_slope():
    rows, _ = planted_rows(2000, 16, 24, 3, signed=False)
    sizes = {"d_sae": 32, "target_l0": 3, "p_end": 0.2}
    settings = Training(architecture="standard", hook=HOOK, sizes=sizes, n_tokens=64 * 100, batch=64, matmul="float32")
    sae = StandardSAE(settings.config(16))
    sae.initialise(rows, 0)
    stepper, seen = Stepper(sae, settings, 1.0), []
    for step in range(100):
        stepper.step(rows[step * 16 : step * 16 + 64])
        seen.append(sae.p.item())
    assert seen[29] == 1.0
    assert seen[64] == pytest.approx(1 - 0.8 / 2)
    assert seen[99] == pytest.approx(0.2)
    assert math.isfinite(stepper.figures()["grad_norm"])


# What is saved


def test_free_rows_are_saved_at_norm_one_as_the_same_dictionary(tmp_path):
    rows, _ = planted_rows(3000, 16, 24, 3, signed=False)
    sizes = {"d_sae": 32, "target_l0": 3, "rows": "free"}
    settings = Training(
        architecture="standard", hook=HOOK, sizes=sizes, n_tokens=64 * 300, batch=64, lr=1e-2, matmul="float32"
    )
    sae = StandardSAE(settings.config(16))
    sae.initialise(rows * 2.5, 0)
    stepper = Stepper(sae, settings, 2.5)
    for step in range(300):
        stepper.step(rows[step * 8 : step * 8 + 64])
    norms = sae.W_dec.detach().norm(dim=1)
    assert norms.std() > 0.05  # or they were not free
    z, x_hat = sae.encode(rows * 2.5) * norms / 2.5, sae.reconstruct(rows * 2.5) / 2.5
    save_sae(stepper.finish(), tmp_path / "d")
    saved = load_sae(tmp_path / "d")
    torch.testing.assert_close(saved.W_dec.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(saved.encode(rows), z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(saved.reconstruct(rows), x_hat, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "latents"),
    [("standard", {"b_enc"}), ("gated", {"b_gate", "b_mag", "r_mag"}), ("jumprelu", {"b_enc", "threshold"})],
)
def test_the_saved_tensors_are_those_that_saelens_reads(tmp_path, name, latents):
    entry = REGISTRY[name]
    save_sae(entry.sae(entry.config(d_in=4, d_sae=6, target_l0=2)), tmp_path / "d")
    weights = load_file(tmp_path / "d/sae_weights.safetensors")
    shapes = {"W_enc": (4, 6), "W_dec": (6, 4), "b_dec": (4,), **dict.fromkeys(latents, (6,))}
    assert {key: tuple(tensor.shape) for key, tensor in weights.items()} == shapes
    assert entry.saelens == name


# Training


def test_latents_start_on_the_share_of_rows_that_was_asked_for_however_many_are_looked_at_at_once(monkeypatch):
    rows, _ = planted_rows(2000, D_IN, 20, 3, signed=False)
    sae = GatedSAE(GatedConfig(d_in=D_IN, d_sae=D_SAE, target_l0=TARGET, start_l0=1.2))
    sae.initialise(rows, 0)
    assert (sae.encode(rows) != 0).sum(dim=1).float().mean().item() == pytest.approx(6, rel=0.01)
    whole = sae.b_gate.clone()
    monkeypatch.setattr(entries, "INITIAL_ROWS", 7)
    torch.testing.assert_close(-entries.quantile(sae.W_enc.T, centred(sae, rows), 6 / D_SAE), whole)


def test_resampled_gated_latents_begin_with_biases_of_nothing():
    rows, _ = planted_rows(256, D_IN, 20, 3, signed=False)
    sae = GatedSAE(GatedConfig(d_in=D_IN, d_sae=D_SAE, target_l0=TARGET))
    sizes = {"d_sae": D_SAE, "target_l0": TARGET}
    settings = Training(architecture="gated", hook=HOOK, sizes=sizes, n_tokens=6400, batch=64, matmul="float32")
    sae.initialise(rows, 0)
    stepper = Stepper(sae, settings, 1.0)
    for _ in range(3):
        stepper.step(rows)
    dead = torch.tensor([2, 11])
    resample(sae, stepper.optimizer, dead, rows, torch.Generator().manual_seed(0))
    for name in ("b_gate", "b_mag", "r_mag"):
        assert not sae.get_parameter(name)[dead].any()
        assert not stepper.optimizer.tensors[f"adam.{name}.exp_avg"][dead].any()
        assert stepper.optimizer.tensors[f"adam.{name}.exp_avg"].any()


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("standard", {}),
        ("standard", {"rows": "free"}),
        ("standard", {"p_end": 0.2}),
        ("gated", {"start_l0": 1.5}),
        ("jumprelu", {"start_l0": 1.5, "loss": "tanh", "bandwidth": 2.0}),
    ],
)
def test_training_ends_at_the_l0_that_was_asked_for_with_the_planted_directions(tmp_path, architecture, changes):
    rows, directions = planted_rows(12_000, 32, 24, 3, signed=False)
    run = planted_run(tmp_path / "run", rows)
    settings = Training(
        architecture=architecture,
        hook=HOOK,
        sizes={"d_sae": 24, "target_l0": 3, **changes},
        n_tokens=300_000,
        batch=256,
        lr=5e-3,
    )
    sae = load_sae(train(run, settings))
    cosines = (directions @ sae.W_dec.T).max(dim=1).values
    assert cosines.min() > 0.9
    assert (sae.encode(rows) != 0).sum(dim=1).float().mean().item() == pytest.approx(3, rel=0.05)


def test_a_cpu_takes_the_entries_above_the_floor_alone_only_while_they_are_few():
    x = torch.randn(80, D_IN)
    sae = StandardSAE(StandardConfig(d_in=D_IN, d_sae=D_SAE, target_l0=TARGET))
    sae.initialise(x, seed=0)
    rows = centred(sae, x)
    assert entries.encode(sae, rows, sae.b_enc - 100.0).sparse
    assert not entries.encode(sae, rows, sae.b_enc + 100.0).sparse
