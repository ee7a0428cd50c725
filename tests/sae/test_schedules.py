"""Each schedule does in a real training what it says, and all of them together survive kills."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sae.stepper
from activations.cache import CachedActivations
from activations.errors import InputError
from activations.run import Run
from sae import checkpoint, load_sae
from sae.registry import REGISTRY
from sae.settings import Training
from sae.stepper import Stepper
from sae.train import train
from tests.tiny import HOOK, planted_rows, planted_run

D_IN, BATCH = 16, 64
SIZES = {"topk": {"d_sae": 64, "k": 3}, "abstopk": {"d_sae": 64, "k": 3}, "jumprelu": {"d_sae": 64, "target_l0": 3}}


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return planted_rows(4000, D_IN, 20, 3, signed=False)[0]


@pytest.fixture
def run(tmp_path, rows) -> Run:
    return planted_run(tmp_path / "run", rows)


def settings(architecture: str = "topk", *, steps: int = 400, **changes) -> Training:
    sizes = {**SIZES[architecture], **changes.pop("sizes", {})}
    batch = changes.pop("batch", BATCH)
    plain = {"architecture": architecture, "hook": HOOK, "matmul": changes.pop("matmul", "float32")}
    return Training(**plain, sizes=sizes, batch=batch, n_tokens=steps * batch, **changes)


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def stepper_of(wanted: Training, rows: torch.Tensor) -> Stepper:
    made = REGISTRY[wanted.architecture].sae(wanted.config(D_IN))
    made.initialise(rows, wanted.seed)
    return Stepper(made, wanted, 1.0)


# Learning rate and clipping


def test_the_learning_rate_rises_stays_and_falls_to_nothing(run):
    lines = log_of(train(run, settings(lr=1e-3, warmup=0.25, decay=0.5)))
    rates = {line["step"]: line["lr"] for line in lines}
    assert rates[20] == pytest.approx(1e-3 * 20 / 100)
    assert rates[100] == rates[200] == 1e-3
    assert rates[300] == pytest.approx(1e-3 * 101 / 200)
    assert rates[400] == pytest.approx(1e-3 / 200)


def test_the_gradient_that_adam_sees_is_clipped_and_the_log_has_the_whole_norm(rows):
    def first_step(clip: float) -> tuple[float, float]:
        stepper = stepper_of(settings(clip=clip), rows)
        stepper.step(rows[:BATCH])
        means = [tensor for name, tensor in stepper.tensors.items() if name.endswith("exp_avg")]
        return math.sqrt(sum(float(mean.square().sum()) for mean in means)), stepper.figures()["grad_norm"]

    seen, whole = first_step(1e6)
    # The first moment after one step is 1 - beta of the gradient, which then has no part along the decoder's rows.
    assert 0.05 * whole < seen < 0.1 * whole
    assert first_step(whole / 7) == pytest.approx((seen / 7, whole), rel=1e-4)


# Sparsity


def test_k_falls_in_a_straight_line_and_inference_uses_k(run, rows):
    folder = train(run, settings(k_from=43, k_anneal=0.5, sizes={"auxk_weight": 0.0}))
    for line in log_of(folder):
        expected = max(43 - (43 - 3) * (line["step"] - 1) / 199, 3)
        # Where fewer than k pre-activations are positive a row has fewer.
        assert line["l0"] == pytest.approx(round(expected), abs=0.01) or line["l0"] < expected, line
    assert log_of(folder)[-1]["l0"] == pytest.approx(3, abs=0.01)
    made = load_sae(folder)
    assert made.cfg.k == 3
    assert (made.encode(rows) != 0).sum(dim=1).max() == 3


def test_k_falls_in_a_straight_line_where_every_place_is_filled(rows):
    """AbsTopK fills all k places, so L0 is k to the digit."""
    stepper = stepper_of(settings("abstopk", steps=100, k_from=43, k_anneal=0.4), rows)
    seen = []
    for _ in range(60):
        stepper.step(rows[:BATCH])
        seen.append(stepper.figures()["l0"])
    assert seen == [round(43 - 40 * step / 39) for step in range(40)] + [3] * 20


def test_a_run_that_says_nothing_starts_where_the_registry_says():
    sizes = {"d_sae": 64, "k": 4}
    plan = Training(architecture="matryoshka", hook=HOOK, sizes=sizes, n_tokens=100 * BATCH, batch=BATCH)
    assert [plan.k_at(step) for step in (0, 49, 50)] == [12, 4, None]
    assert (plan.largest_k, plan.mean_k) == (12, 4 + 8 * 0.5 / 2)
    for wide in (replace(plan, k_from=4), replace(plan, architecture="topk")):
        assert wide.k_at(0) in (4, None)
        assert (wide.largest_k, wide.mean_k) == (4, 4)
    jump = replace(plan, architecture="jumprelu", sizes={"d_sae": 64, "target_l0": 4})
    assert [jump.penalty_at(step) for step in (0, 39, 79)] == [1 / 80, 0.5, 1.0]
    assert replace(jump, sparsity_warmup=0.0).penalty_at(0) == 1.0
    assert replace(jump, sizes={**jump.sizes, "weight": 0.1}).penalty_at(0) == 1.0, "a fixed weight has none unasked"


def test_l0_falls_slowly_while_a_penalty_warms_up_and_ends_at_the_target_all_the_same(run):
    plain, warmed = (
        log_of(train(run, settings("jumprelu", steps=2000, sparsity_warmup=share), name=f"w{share}"))
        for share in (0.0, 0.5)
    )
    assert warmed[25]["l0"] > plain[25]["l0"]
    assert max(line["coefficient"] for line in warmed) < 2 * max(line["coefficient"] for line in plain)
    for lines in (plain, warmed):
        assert lines[-1]["l0"] == pytest.approx(3, rel=0.15)


# Mean of the weights


def test_the_mean_that_is_saved_is_the_running_mean_of_every_steps_weights(rows):
    stepper = stepper_of(settings(steps=50, ema=0.9), rows)
    means = {name: p.detach().clone() for name, p in stepper.sae.named_parameters()}
    for step in range(50):
        stepper.step(rows[step * BATCH : (step + 1) * BATCH])
        for name, p in stepper.sae.named_parameters():
            means[name] = 0.9 * means[name] + 0.1 * p.detach()
    last = stepper.sae.W_enc.detach().clone()
    made = stepper.finish()
    means["W_dec"] /= means["W_dec"].norm(dim=1, keepdim=True)
    for name, mean in means.items():
        torch.testing.assert_close(getattr(made, name).detach(), mean, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(made.W_enc, last)


# Dead latents


@pytest.mark.parametrize("batch", [32, 128])
def test_a_latent_is_dead_after_so_many_tokens_whatever_the_batch(rows, batch):
    wanted = settings(steps=100, batch=batch, dead_tokens=1024, sizes={"auxk_weight": 0.0})
    stepper = stepper_of(wanted, rows)
    with torch.no_grad():
        stepper.sae.b_enc[:5] = -1e4  # never fire
    dead = {}
    for step in range(1, 2048 // batch):
        stepper.step(rows[torch.arange(step * batch, (step + 1) * batch) % len(rows)])
        stepper.recount()
        dead[step * batch] = {0, 1, 2, 3, 4} <= set(() if stepper._dead is None else stepper._dead.latents.tolist())
    assert dead == {tokens: tokens > 1024 for tokens in dead}


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_resampling_revives_dead_latents_and_beats_none(run, architecture):
    """No AuxK, and latents that never fire at the start: only resampling brings them back."""
    sizes = {"d_sae": 32, **({"auxk_weight": 0.0} if architecture == "topk" else {"start_l0": 1.5})}
    ends = {}
    for every in (None, 100 * BATCH):
        wanted = settings(architecture, steps=2000, resample_every=every, dead_tokens=50 * BATCH, sizes=sizes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(REGISTRY[architecture].sae, "initialise", _mostly_dead(REGISTRY[architecture].sae.initialise))
            folder = train(run, wanted, name=f"every{every}")
        ends[every] = log_of(folder)[-1]
    assert ends[None]["n_dead"] >= 24
    assert ends[100 * BATCH]["n_dead"] <= 20  # 20 directions were planted, so some of 32 latents stay idle
    assert ends[100 * BATCH]["fvu"] < 0.75 * ends[None]["fvu"]
    assert ends[100 * BATCH]["l0"] == pytest.approx(3, rel=0.15)


def _mostly_dead(initialise):
    def changed(made, x, seed):
        initialise(made, x, seed)
        with torch.no_grad():
            made.b_enc[:24] = -1e3

    return changed


# All of it, broken off


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_killed_and_resumed_with_everything_on_it_ends_in_the_same_bytes(run, monkeypatch, architecture):
    sparsity = {"k_from": 12, "k_anneal": 0.4} if architecture == "topk" else {"sparsity_warmup": 0.4}
    on = {"ema": 0.97, "dead_tokens": 20 * BATCH, "resample_every": 50 * BATCH, "clip": 0.1, "seed": 3}
    wanted = settings(architecture, steps=300, warmup=0.3, decay=0.3, **on, **sparsity)
    resampled = []
    monkeypatch.setattr(
        "sae.stepper.resample",
        lambda *given, real=sae.stepper.resample: (resampled.append(len(given[2])), real(*given)),
    )
    whole = train(run, wanted, name="whole")
    assert architecture == "jumprelu" or any(resampled), "something was resampled"
    save = checkpoint.save

    def save_and_die(*given):
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    for _ in range(9):
        with pytest.raises(KeyboardInterrupt):
            train(run, wanted, name="broken", checkpoint_seconds=0.0)
    monkeypatch.setattr(checkpoint, "save", save)
    broken = train(run, wanted, name="broken")
    for name in ("sae_weights.safetensors", "statistics.safetensors", "train.jsonl"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


# Not finite


@pytest.mark.parametrize("resample_every", [None, 10 * BATCH])
def test_rows_that_are_not_finite_stop_it_and_the_last_good_checkpoint_is_named(
    run, monkeypatch, tmp_path, resample_every
):
    poisoned = torch.cat([planted_rows(8192, D_IN, 20, 3, signed=False)[0], torch.full((96, D_IN), math.nan)])
    monkeypatch.setattr(CachedActivations, "check", lambda _: None)
    run = planted_run(tmp_path / "poisoned", poisoned, n_docs=1)
    wanted = settings(steps=400, order="stream", resample_every=resample_every, dead_tokens=10 * BATCH)
    with pytest.raises(InputError, match=r"not finite at step \d+ .* Last good checkpoint: (\S+)\.") as error:
        train(run, wanted, name="a", checkpoint_seconds=0.0)
    assert "\n" not in str(error.value)
    named = Path(str(error.value).split("checkpoint: ")[1].rstrip("."))
    files = [load_file(path) for path in named.glob("*.safetensors")]
    assert files
    assert all(tensor.isfinite().all() for file in files for tensor in file.values())
    step = checkpoint.steps_of(run.dictionary("a"))[-1]
    assert named == checkpoint.path_of(run.dictionary("a"), step)
    assert [line["step"] for line in log_of(run.dictionary("a"))][-1] == step


def test_a_rate_that_is_far_too_high_stops_it_before_anything_bad_is_saved(run):
    with pytest.raises(InputError, match=r"not finite at step \d+ .*: lower --lr"):
        train(run, settings(lr=1e25, warmup=1.0), name="a", checkpoint_seconds=0.0)
    for step in checkpoint.steps_of(run.dictionary("a")):
        saved = load_file(checkpoint.path_of(run.dictionary("a"), step) / checkpoint.STATE)
        assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_from": 2}, "k_from=2 is out of range: expected k=3 to d_sae=64"),
        ({"k_from": 65}, "k_from=65 is out of range"),
        ({"sparsity_warmup": 0.1}, "topk has no penalty; use k_from"),
        ({"architecture": "jumprelu", "k_from": 9}, "jumprelu has no k; use sparsity_warmup"),
        ({"warmup": 1.5}, "warmup=1.5 is no share of the run: expected 0 to 1"),
        ({"ema": 1.0}, "ema=1.0 is out of range"),
        ({"clip": math.nan}, "expected both above 0"),
        ({"dead_tokens": 0}, "dead_tokens=0 is no number of tokens: expected at least 1"),
        ({"matmul": "int8"}, "expected one of float32, bfloat16, float8"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        settings(**changes).config(D_IN)
    assert "\n" not in str(error.value)
