"""BatchTopK, BatchAbsTopK and Matryoshka: by hand, against dense formulas under autograd, and on planted truth."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae import checkpoint, load_sae
from sae.architectures.batchabstopk import BatchAbsTopKConfig, BatchAbsTopKSAE
from sae.architectures.batchtopk import BatchTopKConfig, BatchTopKSAE
from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from sae.architectures.matryoshka import MatryoshkaConfig
from sae.base import ConfigError, Dead, State
from sae.batchwise import CAP, KEEPS, BatchwiseSAE, flat
from sae.files import save_sae
from sae.ksparse import Codes
from sae.registry import REGISTRY
from sae.select import largest_of_batch
from sae.settings import Training
from sae.stepper import Stepper
from sae.train import train
from tests.tiny import HOOK, planted_run

N, D, F = 37, 12, 64


def small(architecture: str, **changes) -> BatchwiseSAE:
    """With random weights of all kinds."""
    torch.manual_seed(0)
    entry = REGISTRY[architecture]
    sae = entry.sae(entry.config(**{"d_in": D, "d_sae": F, "k": 4.5, "auxk_weight": 0.5} | changes))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.3)
    return sae


# By hand


def test_a_batch_shares_its_places_by_hand():
    """Rows (3, 1), (-2, .5), (-1, -4) on latents e1, e2, -e1: the batch's three largest are 3, 2 and 1 of (3, 1)."""
    sae = BatchTopKSAE(BatchTopKConfig(d_in=2, d_sae=3, k=1))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]]))
        sae.W_dec.copy_(sae.W_enc.T)
    x = torch.tensor([[3.0, 1.0], [-2.0, 0.5], [-1.0, -4.0]])
    made = sae.loss(x, x, State())
    # Of the two ones, (3, 1)'s second latent and (-1, -4)'s third, the first row's stays.
    assert made.terms["l0"].item() == 1
    assert made.fired.tolist() == [True, True, True]
    assert sae.threshold.tolist() == [1, 1, 1]
    error = torch.tensor([[0.0, 0.0], [0.0, 0.5], [-1.0, -4.0]])
    assert made.terms["fvu"].item() == pytest.approx((error**2).sum().item() / ((x - x.mean(0)) ** 2).sum().item())
    sae.threshold.fill_(0.75)
    assert sae.encode(x).tolist() == [[3, 1, 0], [0, 0, 2], [0, 0, 1]]


def test_the_signed_batch_compares_magnitudes_by_hand():
    sae = BatchAbsTopKSAE(BatchAbsTopKConfig(d_in=2, d_sae=2, k=0.5))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
    x = torch.tensor([[3.0, 1.0], [-2.0, 0.5], [-1.0, -4.0], [0.1, 0.2]])
    sae.loss(x, x, State())
    assert sae.threshold.tolist() == [3, 3]
    sae.threshold.fill_(1.5)
    assert sae.encode(x).tolist() == [[3, 0], [-2, 0], [0, -4], [0, 0]]


def test_of_equals_the_first_rows_stay_and_zeros_never():
    sizes = torch.tensor([[2.0, 1.0], [1.0, 0.0], [1.0, 3.0]])
    kept, least = largest_of_batch(sizes, 4)
    assert kept.tolist() == [[True, True], [True, False], [False, True]]
    assert least == 1
    kept, least = largest_of_batch(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), 3)
    assert kept.sum() == 1
    assert least == 2
    assert largest_of_batch(torch.zeros(2, 2), 3)[1].isinf()


def test_a_gpus_flat_table_is_the_same_with_places_left_over_at_its_end():
    torch.manual_seed(0)
    kept = torch.rand(6, 5) < 0.4
    table = Codes(torch.randn(6, 5), torch.randint(F, (6, 5)), None)
    short, long = flat(table, kept, 30, static=False), flat(table, kept, 30, static=True)
    n = int(kept.sum())
    assert short.bags is not None
    assert long.bags is not None
    assert len(short.values) == n < len(long.values) == 30
    assert torch.equal(long.bags.starts, short.bags.starts)
    assert (long.values[n:] == 0).all()
    for ours, theirs in ((long.values, short.values), (long.indices, short.indices), (long.bags.row, short.bags.row)):
        assert torch.equal(ours[:n], theirs)


def test_the_threshold_takes_the_first_value_and_then_a_running_mean():
    sae = small("batchtopk")
    first, second = (torch.randn(N, D, generator=torch.Generator().manual_seed(s)) for s in (0, 1))

    def least(x: Tensor) -> float:
        pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
        return pre.flatten().topk(round(4.5 * N)).values[-1].item()

    sae.loss(first, first, State())
    assert sae.threshold[3].item() == pytest.approx(least(first))
    sae.loss(second, second, State())
    assert sae.threshold.tolist() == pytest.approx([KEEPS * least(first) + (1 - KEEPS) * least(second)] * F)
    before = sae.threshold.clone()
    sae.b_enc.data.fill_(-1e6)
    sae.loss(first, first, State())  # nothing is chosen
    assert torch.equal(sae.threshold, before)


def test_a_row_that_needs_more_than_the_cap_is_counted():
    sae = small("batchtopk", k=2)
    x = torch.zeros(N, D)
    x[0] = 100 * sae.W_enc.detach().sum(dim=1) / F**0.5
    made = sae.loss(x, x, State())
    assert made.terms["at_cap"].item() == pytest.approx(1 / N)
    assert made.terms["l0"].item() == pytest.approx(2, abs=1e-6)
    assert CAP * 2 < (x[0] @ sae.W_enc + sae.b_enc > 0).sum()


# Against dense formulas


def dense_loss(sae: BatchwiseSAE, x: Tensor, dead: Tensor) -> Tensor:
    """The loss through dense latents and autograd alone."""
    cfg = sae.cfg

    def batch_topk(pre: Tensor) -> Tensor:
        z = pre if sae.signed else pre.relu()
        least = z.abs().flatten().topk(round(cfg.k * len(x))).values[-1]
        return z * (z.abs() >= least)

    def fvu(error: Tensor) -> Tensor:
        row = error.square().sum(dim=1)
        weights = torch.softmax(cfg.tilt * row.detach() / row.detach().mean(), dim=0) * len(x)
        return (weights * row).sum() / (x - x.mean(dim=0)).square().sum()

    centre = x - sae.b_dec
    pre = centre @ sae.W_enc + sae.b_enc
    for _ in range(cfg.refine):
        pre = pre + cfg.refine_step * (centre - batch_topk(pre) @ sae.W_dec) @ sae.W_enc
    z = batch_topk(pre)
    error = z @ sae.W_dec + sae.b_dec - x
    total = fvu(error)
    if isinstance(cfg, MatryoshkaConfig):
        order = torch.arange(F)
        if cfg.sort_by_frequency:
            order = (z != 0).sum(dim=0).argsort(descending=True, stable=True)
        below, first = sae.b_dec, 0
        for end in cfg.levels[:-1]:
            block, first = order[first:end], end
            part = z[:, block] @ sae.W_dec[block]
            total = total + cfg.inner_weight * fvu(below + part - x)
            below = (below + part).detach() if cfg.detach_inner else below + part
        total = total / (1 + cfg.inner_weight * (len(cfg.levels) - 1))
    if len(dead):
        z_dead = pre[:, dead] if sae.signed else pre[:, dead].relu()
        kept = z_dead.abs() >= z_dead.abs().topk(min(8, len(dead))).values[:, -1:]
        e = error.detach()
        aux = (e + (z_dead * kept) @ sae.W_dec[dead]).square().sum() / (e - e.mean(dim=0)).square().sum()
        total = total + cfg.auxk_weight * min(len(dead) / 8, 1.0) * aux
    return total


@pytest.mark.parametrize("n_dead", [0, 20])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("batchtopk", {}),
        ("batchtopk", {"refine": 1}),
        ("batchtopk", {"refine": 2, "refine_step": 0.1, "tilt": 0.3}),
        ("batchabstopk", {}),
        ("batchabstopk", {"refine": 1}),
        ("matryoshka", {}),
        ("matryoshka", {"prefixes": (5, 9, 30), "inner_weight": 0.3, "detach_inner": True}),
        ("matryoshka", {"prefixes": (5, 9, 30), "sort_by_frequency": True, "tilt": 0.2}),
        ("matryoshka", {"prefixes": (5, 30), "sort_by_frequency": True, "detach_inner": True, "refine": 1}),
    ],
)
def test_loss_and_gradients_are_those_of_the_dense_form(architecture, changes, n_dead):
    sae = small(architecture, **changes)
    x, dead = torch.randn(N, D), torch.randperm(F)[:n_dead]
    state = State(dead=Dead(dead, torch.ones(n_dead, dtype=torch.bool), torch.tensor(float(n_dead))))
    made = sae.loss(x, x, state if n_dead else State())
    assert made.terms["at_cap"] == 0
    made.total.backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    expected = dense_loss(sae, x, dead)
    expected.backward()
    torch.testing.assert_close(made.total, expected)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_refined_rows_are_encoded_alone_as_the_dense_form_says():
    sae = small("batchabstopk", refine=2)
    sae.threshold.copy_(torch.tensor([0.8, 1.1, 1.0]).expand(F, 3))
    x = torch.randn(N, D)
    centre = x - sae.b_dec
    pre = centre @ sae.W_enc + sae.b_enc
    for threshold in (0.8, 1.1):
        pre = pre + 0.25 * (centre - (pre * (pre.abs() > threshold)) @ sae.W_dec) @ sae.W_enc
    torch.testing.assert_close(sae.encode(x), (pre * (pre.abs() > 1.0)).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_inner_prefixes_train_their_own_block_alone_when_detached(detach):
    """With the whole's FVU subtracted, what is left of the gradient is the inner prefixes'."""
    x = torch.randn(N, D)
    grads = {}
    for weight in (0.0, 1.0):
        options = {"detach_inner": detach, "sort_by_frequency": False}
        sae = small("matryoshka", prefixes=(8, 16, 32), inner_weight=weight, **options)
        (sae.loss(x, x, State()).total * (1 + 3 * weight)).backward()
        grads[weight] = sae.W_dec.grad
    inner = (grads[1.0] - grads[0.0]).norm(dim=1)
    assert (inner[32:] < 1e-6).all()
    assert (inner[:32] > 1e-6).any()
    z_only_first = small("matryoshka", prefixes=(8,), sort_by_frequency=False)
    (z_only_first.loss(x, x, State()).total * 2).backward()
    first = z_only_first.W_dec.grad - grads[0.0]
    assert torch.allclose((grads[1.0] - grads[0.0])[:8], first[:8], atol=1e-6) == detach


# On disk


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_it_is_saved_as_the_jumprelu_that_it_is_without_its_neighbours(architecture, tmp_path):
    sae = small(architecture, k=3.5)
    x = torch.randn(N, D)
    sae.loss(x, x, State())
    save_sae(sae, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["architecture"] == REGISTRY[architecture].saelens == "jumprelu"
    assert cfg["k"] == 3.5
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)
    }  # fmt: skip
    jump = JumpReLUSAE(JumpReLUConfig(d_in=D, d_sae=F, target_l0=1))
    jump.load_state_dict(weights, strict=False)
    assert torch.equal(jump.encode(x), sae.encode(x))
    loaded = load_sae(tmp_path)
    assert loaded.architecture == architecture
    assert loaded.cfg == sae.cfg


@pytest.mark.parametrize(("architecture", "refine"), [("batchabstopk", 0), ("batchtopk", 1), ("matryoshka", 2)])
def test_what_saelens_has_not_is_saved_under_its_own_name(architecture, refine, tmp_path):
    sae = small(architecture, refine=refine)
    x = torch.randn(N, D)
    sae.loss(x, x, State())
    save_sae(sae, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == architecture
    assert torch.equal(load_sae(tmp_path).encode(x), sae.encode(x))


def test_latents_end_in_the_order_of_their_frequency():
    sae = small("matryoshka", sort_by_frequency=True, prefixes=(4, 16))
    x = torch.randn(N, D)
    sae.loss(x, x, State())
    before, x_hat = sae.encode(x), sae.reconstruct(x)
    order = sae.frequency.argsort(descending=True, stable=True)
    sae.after_training()
    assert (sae.frequency.diff() <= 0).all()
    torch.testing.assert_close(sae.encode(x), before[:, order])
    torch.testing.assert_close(sae.reconstruct(x), x_hat)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (BatchTopKConfig, {"refine": -1}, "refine=-1.*expected 0 or more steps"),
        (BatchTopKConfig, {"refine_step": 0.0}, "a step above 0"),
        (BatchAbsTopKConfig, {"tilt": -1.0}, "a tilt of 0 or more"),
        (MatryoshkaConfig, {"prefixes": (4, 4)}, "expected whole numbers that rise, from 1"),
        (MatryoshkaConfig, {"prefixes": (0, 4)}, "expected whole numbers that rise, from 1"),
        (MatryoshkaConfig, {"inner_weight": -0.5}, "inner_weight=-0.5: expected 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(config, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        config(**{"d_in": D, "d_sae": F, "k": 3} | changes)
    assert "\n" not in str(error.value)


def test_prefixes_default_to_powers_and_end_in_the_whole():
    config = MatryoshkaConfig(d_in=D, d_sae=256, k=3)
    assert config.levels == (8, 16, 32, 64, 128, 256)
    assert dataclasses.replace(config, prefixes=[16, 64, 256, 512]).levels == (16, 64, 256)
    assert MatryoshkaConfig(d_in=D, d_sae=4, k=3).levels == (1, 2, 4)


# On planted truth


def planted(n: int = 8000) -> Tensor:
    """Rows of 6 of 200 directions, the first of which are far more frequent than the last."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(200, 64, generator=generator))
    chosen = torch.multinomial(1 / torch.arange(1, 201).expand(n, 200), 6, generator=generator)
    z = torch.zeros(n, 200).scatter_(1, chosen, 1 + torch.rand(n, 6, generator=generator))
    return z @ directions + 0.01 * torch.randn(n, 64, generator=generator)


def trained(rows: Tensor, architecture: str, *, k: float = 6.5, steps: int = 250, **sizes) -> tuple[BatchwiseSAE, dict]:
    """(the dictionary of 256 latents, the figures of the last step)."""
    settings = Training(
        architecture=architecture, hook=HOOK, sizes={"d_sae": 256, "k": k, **sizes}, n_tokens=256 * steps, batch=256,
        lr=3e-3, matmul="float32", k_from=16,
    )  # fmt: skip
    made = REGISTRY[architecture].sae(settings.config(64))
    made.initialise(rows[:2048], 0)
    stepper, generator = Stepper(made, settings, 1.0), torch.Generator().manual_seed(0)
    for _ in range(steps):
        stepper.step(rows[torch.randint(len(rows), (256,), generator=generator)])
    figures = stepper.figures()
    return stepper.finish(), figures


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("batchtopk", {}),
        ("batchtopk", {"refine": 1}),
        ("batchabstopk", {}),
        ("matryoshka", {"sort_by_frequency": True, "detach_inner": True}),
    ],
)
def test_rows_alone_have_the_l0_that_was_asked_for(architecture, sizes):
    rows = planted()
    sae, figures = trained(rows, architecture, **sizes)
    assert figures["l0"] == 6.5
    assert figures["at_cap"] < 1e-2
    assert (sae.encode(rows) != 0).sum(dim=1).float().mean().item() == pytest.approx(6.5, rel=0.03)


def test_prefixes_reconstruct_better_than_the_same_latents_of_a_dictionary_without():
    rows = planted()
    spread = (rows - rows.mean(dim=0)).square().sum()
    fvus = {}
    for architecture in ("batchtopk", "matryoshka"):
        sae, _ = trained(rows, architecture, k=6)
        z = sae.encode(rows)
        fvus[architecture] = [
            ((z[:, :m] @ sae.W_dec[:m] + sae.b_dec - rows).square().sum() / spread).item() for m in (8, 32, 64, 128)
        ]
    assert all(ours < 0.95 * theirs for ours, theirs in zip(fvus["matryoshka"], fvus["batchtopk"], strict=True)), fvus


def test_killed_and_resumed_it_ends_in_the_same_bytes(tmp_path, monkeypatch):
    run = planted_run(tmp_path / "run", planted(2000))
    sizes = {"d_sae": 128, "k": 4.5, "refine": 1, "sort_by_frequency": True, "detach_inner": True, "prefixes": [16, 64]}
    settings = Training(
        architecture="matryoshka", hook=HOOK, sizes=sizes, n_tokens=64 * 100, batch=64, k_from=9, dead_tokens=64 * 20
    )
    whole = train(run, settings, name="whole")
    save = checkpoint.save

    def save_and_die(*given):
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(run, settings, name="broken", checkpoint_seconds=0.0)
    monkeypatch.setattr(checkpoint, "save", save)
    broken = train(run, settings, name="broken")
    for name in ("sae_weights.safetensors", "statistics.safetensors", "train.jsonl"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
