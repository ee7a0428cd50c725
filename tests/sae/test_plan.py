"""Plans: sizes are those of real tensors and files, grow with what they depend on, and say what does not fit."""

import dataclasses

import pytest
import torch

import sae.plan
from activations.errors import InputError
from activations.machine import Machine, built_in, memory_of, this_machine
from sae.base import FittedSAE
from sae.calibrate import step_time, time_steps
from sae.plan import (
    check_memory,
    checkpoint_bytes,
    dictionary_bytes,
    memory,
    n_parameters,
    needed_gpus,
    needed_memory,
    step_flops,
    step_seconds,
)
from sae.registry import REGISTRY
from sae.settings import Training
from sae.train import train, train_together
from tests.tiny import HOOK, planted_rows, planted_run

CPU = torch.device("cpu")
GB = 1_000_000_000


ONE_HOOK = sorted(name for name, e in REGISTRY.items() if e.sae.target == "x" and not e.sae.joint)
"""A plan is of these alone; it says so of others."""
TRAINED = [name for name in ONE_HOOK if not issubclass(REGISTRY[name].sae, FittedSAE)]


def settings(architecture="topk", d_sae=512, k=8, **changes) -> Training:
    sizes = {"d_sae": d_sae, REGISTRY[architecture].sparsity: k}
    return Training(**{"architecture": architecture, "hook": HOOK, "sizes": sizes, "n_tokens": 10**9, **changes})


@pytest.mark.parametrize("architecture", ONE_HOOK)
def test_parameters_are_those_of_the_dictionary(architecture):
    made = REGISTRY[architecture].sae(settings(architecture).config(24))
    assert n_parameters(settings(architecture), 24) == sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("architecture", [name for name in TRAINED if not REGISTRY[name].sae.weighs_gradient])
def test_files_are_as_large_as_was_said(architecture, tmp_path):
    run = planted_run(tmp_path / "run", planted_rows(4000, 64, 70, 3, signed=False)[0])
    wanted = settings(architecture, d_sae=1024, n_tokens=5120, batch=128)
    folder = train(run, wanted, checkpoint_seconds=0.0)
    header = 4096
    for path in (folder / "checkpoints").iterdir():
        size = sum(file.stat().st_size for file in path.iterdir())
        assert 0 <= size - checkpoint_bytes(wanted, 64) < header
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert 0 <= size - dictionary_bytes(wanted, 64) < header


def test_a_gpu_holds_eighteen_bytes_a_parameter_and_what_a_batch_needs():
    wanted = settings(d_sae=1 << 16)
    parts = memory([wanted], 2304, "cuda").of
    n, wide = n_parameters(wanted, 2304), 2 * 2304 * (1 << 16)
    assert parts["weights"] + parts["moments of Adam"] + parts["gradients"] == 16 * n
    assert parts["low-precision copies"] == 2 * wide
    assert memory([wanted], 2304, "cpu").of["low-precision copies"] == 0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("architecture", ONE_HOOK)
def test_memory_and_time_grow_with_width_and_batch(kind, architecture):
    base = settings(architecture, d_sae=1 << 14, batch=2048)
    wider = settings(architecture, d_sae=1 << 15, batch=2048)
    longer = dataclasses.replace(base, batch=4096)
    machine = built_in("h100")
    for more in (wider, longer):
        assert memory([more], 512, kind).total > memory([base], 512, kind).total
        assert step_seconds(more, 512, machine).total > step_seconds(base, 512, machine).total
        assert step_flops(more, 512) == 2 * step_flops(base, 512)


def test_cells_of_a_sweep_share_the_batch_and_the_program():
    one, two = memory([settings()], 64, "cpu").of, memory([settings(), settings()], 64, "cpu").of
    assert two["weights"] == 2 * one["weights"]
    assert two["moments of Adam"] == 2 * one["moments of Adam"]
    for shared in ("batch", "program", "pre-activations", "gradients"):
        assert two[shared] == one[shared]


# (settings, width, GPUs, share of dead latents, MiB that torch had allocated at most, milliseconds of a step)
MEASURED_ON_H100 = {
    "wide": ({"d_sae": 65_536, "k": 64, "batch": 8192}, 2304, 1, 0.0, 5487, 10.7),
    "dead": ({"d_sae": 65_536, "k": 64, "batch": 8192}, 2304, 1, 0.25, 6219, 15.9),
    "small": ({"d_sae": 9216, "k": 32, "batch": 4096}, 576, 1, 0.0, 216, 0.80),
    "wider": ({"d_sae": 131_072, "k": 64, "batch": 16_384}, 2304, 1, 0.0, 11_254, 29.3),
    "of two": ({"d_sae": 131_072, "k": 64, "batch": 16_384}, 2304, 2, 0.0, 6072, 17.6),
    "jumprelu": ({"architecture": "jumprelu", "d_sae": 65_536, "k": 64, "batch": 4096}, 2304, 1, 0.0, None, 13.1),
}


@pytest.mark.parametrize("what", MEASURED_ON_H100)
def test_steps_that_were_measured_on_h100s_are_met(what):
    of, d_in, gpus, dead, mebibytes, milliseconds = MEASURED_ON_H100[what]
    wanted = settings(**of)
    assert 1e3 * step_seconds(wanted, d_in, built_in("h100"), gpus, dead).total == pytest.approx(milliseconds, rel=0.15)
    parts = memory([wanted], d_in, "cuda", shards=gpus)
    apart = parts.of["program"] + (0 if dead else parts.of["dead latents"])
    if mebibytes is not None:
        assert (parts.total - apart) / 2**20 == pytest.approx(mebibytes, rel=0.1)


def test_a_running_mean_is_one_more_copy_of_the_weights():
    plain, with_mean = memory([settings()], 64, "cpu").total, memory([settings(ema=0.99)], 64, "cpu").total
    assert with_mean - plain == 4 * n_parameters(settings(), 64)


def test_small_steps_on_a_gpu_keep_their_memory_and_large_ones_take_turns():
    small, large = settings(), settings(d_sae=1 << 17, batch=1 << 14)
    for cell, times in ((small, 2), (large, 1)):
        one, two = memory([cell], 576, "cuda").of, memory([cell, cell], 576, "cuda").of
        assert two["gradients"] == times * one["gradients"]


def test_sixteen_million_latents_take_the_smallest_number_of_gpus_that_holds_them():
    wanted = settings(d_sae=16_000_000, k=32, batch=2048)
    n = needed_gpus([wanted], 12_288, 80 * GB)
    assert memory([wanted], 12_288, "cuda", shards=n).total <= sae.plan.FILLED * 80 * GB
    assert memory([wanted], 12_288, "cuda", shards=n - 1).total > sae.plan.FILLED * 80 * GB
    assert 18 * 2 * 12_288 * 16_000_000 / (80 * GB) < n < 1.2 * 18 * 2 * 12_288 * 16_000_000 / (80 * GB)
    assert needed_gpus([wanted], 12_288, 140 * GB) < n
    assert needed_gpus([settings()], 576, 80 * GB) == 1


def test_more_gpus_take_less_time_until_they_only_talk():
    wanted, machine = settings(d_sae=1 << 20, k=32, batch=1 << 14), built_in("h100")
    times = [step_seconds(wanted, 4096, machine, gpus) for gpus in (1, 2, 8)]
    assert times[0].total > times[1].total > times[2].total
    assert "links" not in times[0].of
    assert step_seconds(wanted, 4096, machine, 16).of["links"] > times[2].of["links"]


def test_a_batch_that_no_number_of_gpus_holds_is_refused():
    with pytest.raises(InputError, match="does not fit 8.0 GB however many GPUs .* lower --batch"):
        needed_gpus([settings(batch=1 << 20)], 12_288, 8 * GB)


def test_what_the_machine_cannot_hold_is_refused_before_it_starts():
    there = memory_of(CPU)[1]
    check_memory([settings()], 64, CPU)
    wanted = settings(d_sae=there // 512)
    assert needed_memory([wanted], 512, CPU) > there
    with pytest.raises(InputError, match=r"this machine has .* GB free: lower --d-sae") as error:
        check_memory([wanted], 512, CPU)
    assert "\n" not in str(error.value)


def test_training_without_the_memory_for_it_says_so_and_writes_nothing(tmp_path, monkeypatch):
    run = planted_run(tmp_path / "run", planted_rows(2000, 16, 20, 3, signed=False)[0])
    one = settings(d_sae=64, k=4, n_tokens=2048, batch=128)
    cells = {"one": one, "two": dataclasses.replace(one, seed=1, order_seed=0)}
    enough = needed_memory([one], 16, CPU)
    monkeypatch.setattr(sae.plan, "memory_of", lambda _: (enough, GB))
    with pytest.raises(InputError, match="Training 2 dictionaries with 128 latents together .* train fewer at a time"):
        train_together(run, cells, device="cpu")
    assert not list(run.path.rglob("train.json"))
    assert (train(run, one, name="one", device="cpu") / "cfg.json").exists()


@pytest.mark.parametrize("architecture", TRAINED)
def test_real_steps_are_timed(architecture):
    took = time_steps(settings(architecture, batch=128), 16, CPU, torch.randn(4096, 16), seconds=0.01)
    assert took.basis == "measured"
    assert min(took.step, took.step_dead, took.encode) > 0


def test_a_width_that_takes_too_long_is_fitted_from_narrower_ones(monkeypatch):
    seen = []

    def fake(narrow, *_args, **_kwargs):
        width = narrow.sizes["d_sae"]
        seen.append(width)
        return sae.calibrate.StepTime(1 + width / 1000, 1 + width / 500, 0.0, width / 1000, "measured")

    monkeypatch.setattr(sae.calibrate, "time_steps", fake)
    took = step_time(settings(d_sae=1_000_000), 16, CPU, patience=40.0)
    assert took[:4] == pytest.approx((1001, 2001, 0, 1000))
    assert took.basis == "fitted"
    assert max(seen) <= 20_000
    assert step_time(settings(d_sae=10_000), 16, CPU, patience=40.0).basis == "measured"


def test_rates_of_this_machine_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_CACHE", str(tmp_path))
    first = this_machine(CPU, tmp_path)
    assert first.source == "measured"
    rates = (*first.matmul.values(), first.copy, first.gather, first.adam, first.write, first.read, first.hash)
    assert min(rates) > 1e6
    monkeypatch.setattr("activations.machine._measure", None)
    assert this_machine(CPU, tmp_path) == first
    assert not list(tmp_path.glob(".plan-*"))


def test_an_unknown_machine_is_refused_and_a_built_in_one_says_that_it_is():
    assert isinstance(built_in("H100"), Machine)
    assert built_in("h100").source == "built-in"
    with pytest.raises(InputError, match="Machine 'abacus' is unknown: expected here, h100"):
        built_in("abacus")
