"""The loop: resumed it gives the same bytes, it refuses what cannot be, and it says what happened."""

import json

import pytest
import torch

import sae.train
from activations.errors import InputError
from sae import checkpoint, load_sae
from sae.settings import Training
from sae.train import train
from tests.tiny import HOOK, planted_rows, planted_run


@pytest.fixture
def run(tmp_path):
    return planted_run(tmp_path / "run", planted_rows(4000, 16, 20, 3, signed=False)[0])


def settings(**changes) -> Training:
    sizes = changes.pop("sizes", {"d_sae": 64, "k": 2})
    return Training(
        **{"architecture": "topk", "hook": HOOK, "sizes": sizes, "n_tokens": 25_600, "batch": 64, **changes}
    )


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("topk", {"d_sae": 64, "k": 2}),
        ("abstopk", {"d_sae": 64, "k": 2}),
        ("jumprelu", {"d_sae": 64, "target_l0": 2}),
        ("kron", {"d_sae": 64, "k": 2}),
        ("matching_pursuit", {"d_sae": 64, "k": 2}),
    ],
)
def test_killed_and_resumed_it_ends_in_the_same_bytes(run, monkeypatch, architecture, sizes):
    wanted = settings(architecture=architecture, sizes=sizes)
    whole = train(run, wanted, name="whole")
    save = checkpoint.save
    kills = []

    def save_and_die(*args):
        save(*args)
        kills.append(args[2].step)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            train(run, wanted, name="broken", checkpoint_seconds=0.0)
    monkeypatch.setattr(checkpoint, "save", save)
    broken = train(run, wanted, name="broken")
    assert kills == [20, 40, 60, 80]
    assert any(json.loads(line)["n_dead"] for line in (whole / "train.jsonl").read_text().splitlines()) or (
        architecture != "topk"
    )  # the dead are part of the state that must come back
    for name in ("sae_weights.safetensors", "statistics.safetensors", "train.jsonl"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


def test_the_last_checkpoints_stay(run):
    folder = train(run, settings(), checkpoint_seconds=0.0, keep=3)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [f"step-{n:09d}" for n in (360, 380, 400)]


def test_other_settings_in_the_same_folder_are_refused(run):
    train(run, settings(), name="a")
    with pytest.raises(InputError, match="was begun with seed=0, not 1: use the same, another --name, or --overwrite"):
        train(run, settings(seed=1), name="a")


def test_a_finished_dictionary_is_not_trained_again(run, monkeypatch):
    folder = train(run, settings(), name="a")
    monkeypatch.setattr(sae.train, "Shuffled", None)
    assert train(run, settings(), name="a") == folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "banana"}, "'banana' is unknown: expected one of topk"),
        ({"sizes": {"d_sae": 8, "k": 9}}, "k=9 is out of range: expected 0 < k <= d_sae=8"),
        ({"n_tokens": 10}, "10 tokens make no batch of 64"),
        ({"hook": "blocks.9.hook_resid_post"}, "has no activations at 'blocks.9.hook_resid_post' .*sae collect"),
        ({"lr": 1e30}, "not finite at step .* lower --lr"),
    ],
)
def test_wrong_input_is_one_plain_line(run, changes, message):
    with pytest.raises(InputError, match=message) as error:
        train(run, settings(**changes))
    assert "\n" not in str(error.value)


def test_statistics_are_those_of_the_latents(run):
    made = load_sae(train(run, settings()))
    cache = run.activations(HOOK)
    z = made.encode(torch.cat([cache.rows(i)[cache.mask(i)] for i in range(cache.n_shards)]))
    assert made.statistics is not None
    torch.testing.assert_close(made.statistics.density, (z != 0).float().mean(dim=0))
    torch.testing.assert_close(made.statistics.max, z.max(dim=0).values.clamp(min=0), atol=1e-5, rtol=1e-5)
    assert made.statistics.n_tokens == len(z)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "cfg.json").write_text('{"architecture": "evil"}'), "architecture 'evil'"),
        (lambda f: (f / "cfg.json").write_text("{"), "is damaged"),
        (lambda f: (f / "sae_weights.safetensors").write_bytes(b"junk"), "missing or damaged"),
        (lambda f: (f / "sae_weights.safetensors").unlink(), "missing or damaged"),
        (
            lambda f: (f / "cfg.json").write_text(
                (f / "cfg.json").read_text().replace('"d_sae": 64', '"d_sae": 999999999')
            ),
            "cfg.json says",
        ),
        (
            lambda f: (f / "cfg.json").write_text(
                (f / "cfg.json").read_text().replace('"none"', '"expected_average_only_in"', 1)
            ),
            "folded in first",
        ),
    ],
)
def test_damaged_dictionaries_are_refused_by_name(run, change, message):
    folder = train(run, settings())
    change(folder)
    with pytest.raises(InputError, match=message):
        load_sae(folder)
