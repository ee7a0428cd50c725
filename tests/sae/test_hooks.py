"""Dictionaries that read or predict other hooks: trained, resumed, measured, and worked by hand."""

import dataclasses
import json

import pytest
import torch

from activations.errors import InputError
from activations.joined import Joined, Pooled
from activations.run import Run
from sae import checkpoint, load_sae
from sae.architectures.skip_transcoder import SkipTranscoderSAE
from sae.architectures.transcoder import TranscoderConfig, TranscoderSAE
from sae.base import Dead, State
from sae.settings import Training
from sae.train import train
from tests.tiny import HOOK, planted_rows, planted_run

OUT, LAST = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"


def joint_run(path) -> Run:
    """Three hooks: rows of width 16, a map of them of width 12 at another scale, and rows with other noise."""
    rows = planted_rows(4000, 16, 20, 3, signed=False)[0]
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(16, 12, generator=generator)
    noisy = 5 * (rows + 0.1 * torch.randn(rows.shape, generator=generator))
    return planted_run(path, {HOOK: rows, OUT: torch.relu(rows @ mixing) + 3, LAST: noisy})


@pytest.fixture
def run(tmp_path) -> Run:
    return joint_run(tmp_path / "run")


def settings(architecture: str = "transcoder", **changes) -> Training:
    sizes = {"d_sae": 64, "k": 3, **changes.pop("sizes", {})}
    if architecture in ("transcoder", "skip_transcoder"):
        sizes |= {"d_out": 12}
        changes = {"target_hooks": (OUT,), **changes}
    return Training(
        **{"architecture": architecture, "hook": HOOK, "sizes": sizes, "n_tokens": 12_800, "batch": 64, **changes}
    )


RESUMED = [settings(), settings("skip_transcoder"), settings("topk", hooks=(HOOK, LAST))]


@pytest.mark.parametrize("wanted", RESUMED, ids=lambda wanted: wanted.architecture)
def test_killed_and_resumed_it_ends_in_the_same_bytes(run, monkeypatch, wanted):
    whole = train(run, wanted, name="whole")
    save, kills = checkpoint.save, []

    def save_and_die(*args):
        save(*args)
        kills.append(args[2].step)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(run, wanted, name="broken", checkpoint_seconds=0.0)
    monkeypatch.setattr(checkpoint, "save", save)
    broken = train(run, wanted, name="broken")
    assert kills == [20, 40, 60]
    for name in ("sae_weights.safetensors", "statistics.safetensors", "train.jsonl", "cfg.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


def test_rows_are_side_by_side_where_all_are_ordinary(run):
    sources = [run.activations(hook) for hook in (HOOK, OUT)]
    both = Joined(sources)
    assert both.d_in == 28
    assert torch.equal(both.rows(1), torch.cat([source.rows(1) for source in sources], dim=1))
    assert torch.equal(both.mask(1), sources[0].mask(1) & sources[1].mask(1))


def test_pooled_rows_take_turns_and_have_one_scale(run):
    first, last = (run.activations(hook) for hook in (HOOK, LAST))
    pooled = Pooled([first, last], [1.0, 0.2])
    assert torch.equal(pooled.rows(2), first.rows(1))
    torch.testing.assert_close(pooled.rows(3), last.rows(1) * 0.2)
    assert not pooled.has(2 * first.n_shards)
    with pytest.raises(InputError, match="have one width"):
        Pooled([first, run.activations(OUT)], [1.0, 1.0])


def test_rows_of_other_tokens_cannot_be_side_by_side(run, tmp_path):
    other = planted_run(tmp_path / "other", planted_rows(4000, 8, 20, 3, signed=False)[0], first_id=1)
    with pytest.raises(InputError, match="not of the same tokens"):
        Joined([run.activations(HOOK), other.activations(HOOK)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_hooks": ()}, "transcoder predicts other hooks: name them with --target-hook"),
        ({"architecture": "topk"}, "topk gives back what it reads: no --target-hook"),
        ({"hooks": (HOOK, LAST)}, "transcoder reads one hook, not 2"),
        ({"hooks": (LAST, HOOK)}, "expected several hooks, each once, and blocks.0.hook_resid_post first"),
        ({"base": "x"}, "transcoder has no --base"),
        ({"resample_every": 640}, "transcoder has none; its AuxK revives latents"),
        ({"target_hooks": ("blocks.7.hook_mlp_out",)}, "has no activations at 'blocks.7.hook_mlp_out'"),
    ],
)
def test_hooks_that_do_not_fit_are_one_plain_line(run, changes, message):
    with pytest.raises(InputError, match=message) as error:
        train(run, dataclasses.replace(settings(), **changes))
    assert "\n" not in str(error.value)


def test_a_transcoder_predicts_the_other_hook_in_its_own_units(run):
    folder = train(run, settings(n_tokens=64_000))
    made = load_sae(folder)
    x, y = (torch.cat([run.activations(hook).rows(i) for i in range(3)]) for hook in (HOOK, OUT))
    error = (made.reconstruct(x) - y).square().sum() / (y - y.mean(dim=0)).square().sum()
    assert error < 0.35
    assert made.d_out == 12
    assert made.statistics is not None
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(64))
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == HOOK
    assert cfg["metadata"]["hook_names_out"] == [OUT]
    with pytest.raises(InputError, match="Steering takes a dictionary .* predicts blocks.0.hook_mlp_out"):
        made.only_hook("Steering")


def test_unscaling_columns_gives_the_same_dictionary_of_unscaled_rows():
    sae = SkipTranscoderSAE(TranscoderConfig(d_in=6, d_out=4, d_sae=10, k=10))
    for parameter in sae.parameters():
        parameter.data.normal_()
    x, reads, writes = torch.randn(20, 6), torch.rand(6) + 0.5, torch.rand(4) + 0.5
    y_hat = sae.reconstruct(x * reads) / writes
    sae.unscale_columns(reads, writes)
    torch.testing.assert_close(sae.reconstruct(x), y_hat)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(10))


@pytest.mark.parametrize("kind", [TranscoderSAE, SkipTranscoderSAE])
def test_transcoder_gradients_are_those_of_the_dense_form_by_autograd(kind):
    torch.manual_seed(0)
    sae = kind(TranscoderConfig(d_in=8, d_out=5, d_sae=12, k=3))
    for parameter in sae.parameters():
        parameter.data.normal_()
    x, y = torch.randn(30, 8), torch.randn(30, 5)
    dead = Dead(torch.tensor([1, 5]), torch.tensor([True, True]), torch.tensor(2.0))
    made = sae.loss(x, y, State(dead=dead)).total
    made.backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    z = torch.relu(x @ sae.W_enc + sae.b_enc)
    skip = x @ sae.W_skip.T if isinstance(sae, SkipTranscoderSAE) else 0
    error = z * (z >= z.topk(3).values[:, -1:]) @ sae.W_dec + skip + sae.b_dec - y
    left = error.detach()
    of_dead = z[:, [1, 5]] @ sae.W_dec[[1, 5]]
    spread = (y - y.mean(dim=0)).square().sum(), (left - left.mean(dim=0)).square().sum()
    total = error.square().sum() / spread[0] + 1 / 32 * (left + of_dead).square().sum() / spread[1] * 2 / 4
    total.backward()
    torch.testing.assert_close(made, total)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)
