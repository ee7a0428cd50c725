"""`sae train` and `sae eval` of dictionaries that read or predict other hooks, as commands on a real small model."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from activations.capture import collect
from activations.errors import InputError
from activations.joined import Joined
from activations.model import Model
from activations.run import Run
from app.cli.eval import command as eval_command
from app.cli.index import command as index_command
from app.cli.sweep import command as sweep_command
from app.cli.train import command as train_command
from sae import checkpoint, load_sae
from sae.architectures.skip_transcoder import SkipTranscoderSAE
from sae.architectures.transcoder import TranscoderConfig
from sae.evals.splice_loss import splice_loss
from sae.heads import heads_of
from sae.train import begun_with, train
from steering import SteeringVector
from tests.activations.test_capture import contexts, new_run
from tests.tiny import tiny_model, tiny_tokenizer

READ, PREDICTED = "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"
POSTS = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
SMALL = ["--d-sae", "48", "-k", "4", "--tokens", "20000", "--batch", "64", "--json"]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """A tiny random Llama's activations at an MLP's input and output, and after each block."""
    model = Model("tiny", "0", tiny_model(), tiny_tokenizer())
    monkeypatch.setattr("activations.model.load_model", lambda *_args, **_kwargs: model)
    made = new_run(tmp_path / "run", n_tokens=4000)
    collect(made, model, [READ, PREDICTED, *POSTS], contexts(250), dtype="float32")
    return made


def said(command, *words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)


def trained(run: Run, name: str, *words: str) -> Path:
    result = said(train_command, run.path, "--name", name, *SMALL, *words)
    assert result.exit_code == 0, result.output
    return run.dictionary(name)


def metrics_of(run: Run, name: str) -> dict[str, dict[str, float]]:
    result = said(eval_command, run.path / name, "--contexts", 8, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("arch", ["transcoder", "skip_transcoder"])
def test_a_transcoder_is_trained_and_its_prediction_spliced_in(run, arch):
    trained(run, "t", "--arch", arch, "--hook", READ, "--target-hook", PREDICTED)
    metrics = metrics_of(run, "t")
    assert 0 < metrics["fvu"]["value"] < 0.9
    assert metrics["l0"]["value"] == pytest.approx(4, abs=0.5)
    assert "delta_ce" in metrics
    with pytest.raises(InputError, match="An index takes a dictionary that reads and gives back one hook"):
        said(index_command, run.path / "t")
    with pytest.raises(InputError, match="Steering takes a dictionary"):
        SteeringVector.from_latent(load_sae(run.dictionary("t")), 0)


def test_an_exact_prediction_costs_nothing_spliced_in(tmp_path):
    before, after = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"  # one tensor, two names
    model = Model("tiny", "0", tiny_model(), tiny_tokenizer())
    run = new_run(tmp_path / "run", n_tokens=1600)
    collect(run, model, [before, after], contexts(100), dtype="float32")
    sae = SkipTranscoderSAE(TranscoderConfig(d_in=32, d_out=32, d_sae=4, k=1))
    sae.W_skip.data = torch.eye(32)
    metrics = splice_loss(sae, model, Joined([run.activations(before), run.activations(after)]), n_contexts=4)
    assert metrics["kl"].value == pytest.approx(0, abs=1e-9)
    sae.W_skip.data = -torch.eye(32)
    metrics = splice_loss(sae, model, Joined([run.activations(before), run.activations(after)]), n_contexts=4)
    assert metrics["kl"].value > 1e-6


def test_pooled_hooks_are_measured_each(run):
    trained(run, "p", *(word for hook in POSTS for word in ("--hook", hook)))
    metrics = metrics_of(run, "p")
    each = [metrics[f"fvu {hook}"]["value"] for hook in POSTS]
    assert metrics["fvu"]["value"] == pytest.approx(sum(each) / 3)
    assert all(0 < value < 0.9 for value in each)
    assert {f"delta_ce {hook}" for hook in POSTS} < metrics.keys()


def test_a_crosscoder_is_measured_at_each_hook(run):
    trained(run, "c", "--arch", "crosscoder", *(word for hook in POSTS for word in ("--hook", hook)))
    metrics = metrics_of(run, "c")
    assert all(0 < metrics[f"fvu {hook}"]["value"] < 0.9 for hook in POSTS)
    assert {f"delta_ce {hook}" for hook in POSTS} < metrics.keys()
    assert metrics["l0"]["value"] == pytest.approx(4, abs=0.5)


def test_a_cross_layer_transcoder_predicts_the_mlps_of_all_layers(run):
    ends = {side: [f"blocks.{layer}.hook_mlp_{side}" for layer in range(3)] for side in ("in", "out")}
    model = Model("tiny", "0", tiny_model(), tiny_tokenizer())
    collect(run, model, [*ends["in"], *ends["out"]], contexts(250), dtype="float32")
    reads = [word for hook in ends["in"] for word in ("--hook", hook)]
    writes = [word for hook in ends["out"] for word in ("--target-hook", hook)]
    trained(run, "clt", "--arch", "clt", *reads, *writes)
    metrics = metrics_of(run, "clt")
    assert all(0 < metrics[f"fvu {hook}"]["value"] < 0.95 for hook in ends["out"])
    assert {f"delta_ce {hook}" for hook in ends["out"]} < metrics.keys()


def test_a_boost_goes_on_a_dictionary_of_the_run(run):
    trained(run, "base", "--hook", POSTS[1], "--d-sae", "16")
    trained(run, "more", "--arch", "boost", "--hook", POSTS[1], "--base", "base")
    assert metrics_of(run, "more")["fvu"]["value"] < 0.9 * metrics_of(run, "base")["fvu"]["value"]


@pytest.fixture
def gradients(tmp_path) -> Run:
    model = Model("tiny", "0", tiny_model(), tiny_tokenizer())
    made = new_run(tmp_path / "gradients", n_tokens=4000)
    collect(made, model, [POSTS[1]], contexts(250), dtype="float32", gradients=True)
    return made


def test_a_gsae_chooses_otherwise_for_its_gradients_and_resumes(run, gradients, monkeypatch):
    files = ("sae_weights.safetensors", "train.jsonl")
    whole = trained(gradients, "g", "--arch", "gsae")
    plain = trained(gradients, "t", "--arch", "topk")
    assert (whole / files[0]).read_bytes() != (plain / files[0]).read_bytes()
    save = checkpoint.save

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    wanted = begun_with(whole)
    with pytest.raises(KeyboardInterrupt):
        train(gradients, wanted, name="broken", checkpoint_seconds=0.0)
    monkeypatch.setattr(checkpoint, "save", save)
    broken = train(gradients, wanted, name="broken")
    assert all((whole / name).read_bytes() == (broken / name).read_bytes() for name in files)
    with pytest.raises(InputError, match="cached without gradients"):
        said(train_command, run.path, "--hook", POSTS[1], "--arch", "gsae", *SMALL)


def test_a_dictionary_of_heads_says_how_many(run):
    hook = "blocks.1.attn.hook_z"
    collect(run, Model("tiny", "0", tiny_model(), tiny_tokenizer()), [hook], contexts(250), dtype="float32")
    folder = trained(run, "z", "--hook", hook)
    assert heads_of(load_sae(folder)) == 4
    assert json.loads((folder / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    with pytest.raises(InputError, match="has no heads"):
        heads_of(load_sae(trained(run, "plain", "--hook", POSTS[0])))


def test_transcoders_are_swept(run, tmp_path):
    grid = tmp_path / "grid.toml"
    grid.write_text(
        f"""[base]
arch = "transcoder"
hook = "{READ}"
target-hook = "{PREDICTED}"
d-sae = 48
tokens = 6400
batch = 64
[grid]
k = [2, 4]
""",
        encoding="utf-8",
    )
    result = said(sweep_command, run.path, grid, "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)) == 2
