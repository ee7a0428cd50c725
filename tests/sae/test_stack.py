"""Dictionaries trained together end in the bytes of those trained alone, whatever is beside them or breaks."""

import json
import shutil

import pytest
import torch

from activations.errors import InputError
from sae import checkpoint
from sae.dense import product
from sae.registry import REGISTRY
from sae.settings import Training
from sae.stack import Together
from sae.stepper import Stepper
from sae.train import train, train_together
from tests.tiny import HOOK, planted_rows, planted_run

FILES = ("sae_weights.safetensors", "statistics.safetensors", "train.jsonl")


@pytest.fixture
def run(tmp_path):
    return planted_run(tmp_path / "run", planted_rows(4000, 16, 20, 3, signed=False)[0])


def settings(architecture: str = "topk", k: float = 2, **changes) -> Training:
    sizes = {"d_sae": changes.pop("d_sae", 64), REGISTRY[architecture].sparsity: k}
    return Training(
        **{"architecture": architecture, "hook": HOOK, "sizes": sizes, "n_tokens": 12_800, "batch": 64, **changes}
    )


CELLS = {
    "k2": settings(),
    "k4": settings(k=4),
    "annealed": settings(k=3, k_from=20),
    "signed": settings("abstopk"),
    "seed1": settings(seed=1, order_seed=0),
    "resampled": settings(k=1, resample_every=2_560, dead_tokens=640),
    "averaged": settings(ema=0.9),
    "wide": settings(d_sae=128),
    "jump": settings("jumprelu", k=2.0),
}


def same(run, name: str, other: str) -> bool:
    return all((run.dictionary(name) / f).read_bytes() == (run.dictionary(other) / f).read_bytes() for f in FILES)


def small_stepper(k: int, seed: int, matmul: str = "float32") -> Stepper:
    plan = settings(k=k, seed=seed, matmul=matmul)
    made = REGISTRY["topk"].sae(plan.config(16))
    made.initialise(torch.randn(100, 16, generator=torch.Generator().manual_seed(seed)), seed)
    return Stepper(made, plan, 1.5)


@pytest.mark.parametrize("matmul", ["float32", "bfloat16"])
def test_each_ends_in_the_bytes_of_one_trained_alone(run, matmul):
    from dataclasses import replace

    cells = {name: replace(plan, matmul=matmul) for name, plan in CELLS.items()}
    outcomes = train_together(run, cells)
    for name, plan in cells.items():
        assert outcomes[name].n_tokens == 12_800
        train(run, plan, name=f"{name}-alone")
        assert same(run, name, f"{name}-alone"), name


@pytest.mark.parametrize("matmul", ["float32", "bfloat16"])
def test_one_product_gives_what_each_would_have_made(matmul):
    steppers = [small_stepper(k, seed, matmul) for seed, k in enumerate((2, 5, 3))]
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(9))
    alone = []
    for stepper in steppers:
        x = (rows * 1.5 - stepper.sae.b_dec).detach().to(stepper.matmul)
        alone.append(product(x, stepper.sae.W_enc.detach().T, stepper.sae.b_enc.detach()))
    together = Together(steppers, everywhere=True)
    ((_, encoders),) = together._groups
    assert encoders is not None
    pre = encoders.pre(rows)
    assert pre.dtype == alone[0].dtype
    torch.testing.assert_close(pre, torch.stack(alone), rtol=1e-5 if matmul == "float32" else 1e-2, atol=1e-5)


def test_parameters_are_parts_of_the_stack_and_steps_reach_it():
    steppers = [small_stepper(2, seed) for seed in range(3)]
    together = Together(steppers, everywhere=True)
    ((_, encoders),) = together._groups
    assert encoders is not None
    before = encoders.W_enc.clone()
    together.step(torch.randn(64, 16, generator=torch.Generator().manual_seed(9)))
    assert (encoders.W_enc != before).flatten(1).any(dim=1).all()
    for i, stepper in enumerate(steppers):
        assert torch.equal(stepper.sae.W_enc, encoders.W_enc[i])
        assert stepper.sae.W_enc.data_ptr() == encoders.W_enc[i].data_ptr()


def test_a_stack_that_would_need_too_much_memory_is_split():
    steppers = [small_stepper(2, seed) for seed in range(5)]
    each = 64 * 64 * 4
    sizes = lambda budget: [len(group) for group, _ in Together(steppers, budget, everywhere=True)._groups]  # noqa: E731
    assert sizes(5 * each) == [5]
    assert sizes(3 * each - 1) == [2, 2, 1]
    assert sizes(1) == [5]  # none stacked
    assert [encoders for _, encoders in Together(steppers, 1, everywhere=True)._groups] == [None]


def test_killed_between_the_checkpoints_of_one_moment_they_go_on_together(run, monkeypatch):
    cells = {name: CELLS[name] for name in ("k2", "k4", "resampled")}
    train_together(run, cells)
    save = checkpoint.save

    def die_at(step: int, n: int):
        saved = []

        def save_and_die(*args):
            save(*args)
            saved.append(args[2].step)
            if saved.count(step) == n:
                raise KeyboardInterrupt

        return save_and_die

    broken = {f"{name}-broken": plan for name, plan in cells.items()}
    for step, n in ((40, 1), (60, 2), (80, 3)):
        monkeypatch.setattr(checkpoint, "save", die_at(step, n))
        with pytest.raises(KeyboardInterrupt):
            train_together(run, broken, checkpoint_seconds=0.0, keep=1)
    monkeypatch.setattr(checkpoint, "save", save)
    outcomes = train_together(run, broken)
    assert {outcome.n_tokens for outcome in outcomes.values()} == {12_800 - 80 * 64}
    for name in cells:
        assert same(run, name, f"{name}-broken"), name


def test_what_is_added_later_leaves_the_finished_and_the_begun_alone(run, monkeypatch):
    cells = {name: CELLS[name] for name in ("k2", "k4", "seed1", "wide")}
    alone = {name: train(run, plan, name=f"{name}-alone") for name, plan in cells.items()}
    finished = train(run, cells["k2"], name="k2")
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir() if not path.name.startswith(".")}
    save = checkpoint.save

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(run, cells["k4"], name="k4", checkpoint_seconds=0.0)
    monkeypatch.setattr(checkpoint, "save", save)
    outcomes = train_together(run, cells)
    assert {name: outcome.n_tokens for name, outcome in outcomes.items()} == {
        "k2": 0,
        "k4": 12_800 - 20 * 64,
        "seed1": 12_800,
        "wide": 12_800,
    }
    assert before == {path: path.stat().st_mtime_ns for path in finished.iterdir() if not path.name.startswith(".")}
    for name in alone:
        assert same(run, name, f"{name}-alone"), name


def test_dictionaries_of_two_hooks_see_the_rows_that_each_would_see_alone(run):
    other = "blocks.1.hook_resid_post"
    folder = run.path / "activations"
    shutil.copytree(folder / HOOK, folder / other)
    manifest = json.loads((folder / other / "manifest.json").read_text())
    (folder / other / "manifest.json").write_text(json.dumps(manifest).replace(HOOK, other))
    cells = {"here": settings(), "there": settings(hook=other), "here4": settings(k=4)}
    train_together(run, cells)
    for name, plan in cells.items():
        train(run, plan, name=f"{name}-alone")
        assert same(run, name, f"{name}-alone"), name


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (settings(batch=128), "share batch: expected one, not 64 and 128"),
        (settings(seed=1), "share rows_seed: expected one, not 0 and 1"),
        (settings(hook="blocks.9.hook_resid_post"), "has no activations at 'blocks.9.hook_resid_post'"),
        (settings(k=65), "k=65 is out of range"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(run, second, message):
    with pytest.raises(InputError, match=message):
        train_together(run, {"first": settings(), "second": second})
    assert not list(run.path.glob("dictionaries/*/train.json"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs that are replayed side by side are a GPU's")
def test_side_by_side_on_a_gpu_they_end_as_those_that_were_alone():
    """cuBLAS splits sums over many rows through memory that belongs to a stream: nobody may share it."""
    rows = torch.randn(40, 2048, 576, generator=torch.Generator().manual_seed(0)).cuda()
    kinds = ("jumprelu", "batchtopk", "matryoshka", "jumprelu", "batchtopk")

    def made(architecture: str, seed: int) -> Stepper:
        plan = settings(architecture, k=32, d_sae=4608, seed=seed, matmul="bfloat16", batch=2048, n_tokens=2048 * 200)
        sae = REGISTRY[architecture].sae(plan.config(576))
        sae.initialise(rows[0].cpu(), seed)
        stepper = Stepper(sae.cuda(), plan, 1.0)
        stepper._last_fired[:1000] = -(2048 * 1000)  # dead from the first count on, so that AuxK has work
        stepper.recount()
        return stepper

    together, alone = ([made(kind, seed) for seed, kind in enumerate(kinds)] for _ in range(2))
    everyone = Together(together)
    for step in range(200):
        everyone.step(rows[step % len(rows)])
    for stepper in alone:
        for step in range(200):
            stepper.step(rows[step % len(rows)])
    for ours, single in zip(together, alone, strict=True):
        for name, parameter in ours.sae.named_parameters():
            torch.testing.assert_close(parameter, single.sae.get_parameter(name), atol=1e-6, rtol=1e-5)
