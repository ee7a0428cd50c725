"""`sae import` and `sae export`: what comes from elsewhere becomes a dictionary like any other, step by step."""

import hashlib
import json
import shutil
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from activations.errors import InputError
from activations.run import Run
from app.cli import _input_errors, main
from app.cli.export import FORMATS
from data.store import open_store
from sae import load_sae
from sae.evals.suite import evaluate
from sae.files import save_sae
from sae.interop.run import bring_in, give_out
from tests.planted import planted_store
from tests.sae.test_interop import DL_CASES, GEMMA, SPARSIFY, SPARSIFY_CFG, X, check, put, random_sae
from tests.tiny import HOOK, planted_run


def sae(*words: object) -> Result:
    """A command, in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def one_line(done: Result, says: str) -> None:
    assert isinstance(done.exception, _input_errors()), done.output
    assert says in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """One of sparsify's dictionaries, in a run of its own that says which model it is of."""
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    return put(tmp_path / "layers.3", "sae.safetensors", SPARSIFY_CFG, **SPARSIFY)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    torch.manual_seed(0)
    return planted_run(tmp_path / "run", torch.randn(2048, 6))


@pytest.fixture
def six_wide(tmp_path: Path) -> Path:
    """A topk of 6 values and 16 latents, in sparsify's form."""
    made = random_sae("topk")
    give_out(saved(made, tmp_path / "ours"), "sparsify", tmp_path / "layers.0")
    return tmp_path / "layers.0"


def saved(made, folder: Path) -> Path:
    save_sae(made, folder)
    return folder


# In


def test_a_new_run_begins_with_a_dictionary_from_elsewhere(layer, tmp_path):
    done = sae("import", layer, tmp_path / "new", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    name = "blocks.3.hook_resid_post-topk-d4-sparsify"
    assert Path(told["dictionary"]) == tmp_path / "new" / "dictionaries" / name
    assert (told["format"], told["source"]) == ("sparsify", str(layer))
    for file in ("cfg.json", "sae.safetensors"):
        assert told["sha256"][file] == hashlib.sha256((layer / file).read_bytes()).hexdigest()
    loaded = load_sae(tmp_path / "new")
    check(loaded, X, [0.0, 3.0, 0.0, 0.0], [1.0, 7.0])
    assert loaded.statistics is None
    assert loaded.model_name == "EleutherAI/pythia-70m"
    assert loaded.metadata["imported"]["sha256"] == told["sha256"]
    assert "no model yet" in sae("runs", tmp_path).output


def test_it_is_named_placed_and_not_replaced_unasked(layer, tmp_path):
    words = ("import", layer, tmp_path / "r", "--name", "a", "--hook", "blocks.9.hook_mlp_out", "--model", "gpt2")
    assert sae(*words).exit_code == 0
    loaded = load_sae(tmp_path / "r" / "a")
    assert (loaded.hook, loaded.model_name) == ("blocks.9.hook_mlp_out", "gpt2")
    one_line(sae(*words), "is there already: take another --name, or --overwrite")
    assert sae(*words, "--overwrite").exit_code == 0
    one_line(sae(*words[:3], "--name", "../a"), "'../a' cannot be a name")


def test_what_the_files_do_not_say_is_asked_for(tmp_path):
    folder = put(tmp_path / "unknown", "params.npz", None, **GEMMA)
    one_line(sae("import", folder, tmp_path / "r"), "does not say which hook it reads: add --hook")
    one_line(sae("import", folder, tmp_path / "r", "--hook", "a"), "does not say which model it is of: add --model")
    transcoder = put(tmp_path / "tc", "sae.safetensors", SPARSIFY_CFG | {"transcode": True}, **SPARSIFY)
    one_line(sae("import", transcoder, tmp_path / "r", "--hook", "a"), "add --target-hook")
    assert not (tmp_path / "r").exists()
    done = sae("import", transcoder, tmp_path / "r", "--hook", "a", "--target-hook", "b", "--model", "m")
    assert done.exit_code == 0, done.output
    assert load_sae(tmp_path / "r").metadata["hook_names_out"] == ["b"]


def test_a_trained_dictionary_is_never_written_over(layer, run):
    folder = run.dictionary("mine")
    folder.mkdir(parents=True)
    (folder / "train.json").write_text("{}")
    with pytest.raises(InputError, match="was trained here"):
        bring_in(layer, run.path, name="mine", overwrite=True)


def test_a_width_that_the_run_has_not_is_refused(layer, run):
    one_line(sae("import", layer, run.path, "--hook", HOOK), "reads 2 values, but blocks.0.hook_resid_post of")


def test_before_there_are_activations_commands_say_what_to_do(layer, tmp_path):
    sae("import", layer, tmp_path / "r", "--name", "a")
    collect = f"run `sae collect {tmp_path / 'r'} --model M --hook H`"
    one_line(sae("eval", tmp_path / "r"), collect)
    one_line(sae("index", tmp_path / "r"), collect)
    one_line(sae("steer", tmp_path / "r", "--feature", 1, "--prompt", "x"), f"run `sae eval {tmp_path / 'r' / 'a'}`")
    one_line(sae("label", tmp_path / "r", "--explainer", "lexical"), "build it with `sae index")


def test_collecting_into_it_settles_what_the_run_is_of(layer, tmp_path):
    bring_in(layer, tmp_path / "r")
    identity = {"model": "m", "revision": "1", "model_dtype": "float32", "corpus": "c", "corpus_hash": ""}
    made = Run.create(tmp_path / "r", **identity, context=16, n_tokens=64)
    assert made.model_name == Run.open(tmp_path / "r").model_name == "m"
    with pytest.raises(InputError, match="was made with model 'm', not 'other'"):
        Run.create(tmp_path / "r", **{**identity, "model": "other"}, context=16, n_tokens=64)


def test_its_statistics_are_made_by_eval_and_saved(six_wide, run):
    folder = bring_in(six_wide, run.path, name="a")
    assert load_sae(folder).model_name == "none"  # the run's
    found = evaluate(folder, None, names=["density", "reconstruction"])
    assert found["l0"].value == pytest.approx(4.0, abs=0.5)
    known = load_sae(folder).statistics
    assert known is not None
    cache = run.activations(HOOK)
    z = load_sae(folder).encode(torch.cat([cache.rows(i)[cache.mask(i)] for i in range(4)]).float())
    torch.testing.assert_close(known.max, z.max(dim=0).values)
    torch.testing.assert_close(known.density, (z != 0).float().mean(dim=0))
    assert known.n_tokens == len(z) == cache.n_ordinary
    (folder / "explanations").mkdir()
    again = bring_in(six_wide, run.path, name="a", overwrite=True)
    assert load_sae(again).statistics is None  # those were of the other one
    left = {each.name for each in again.iterdir() if not each.name.startswith(".")}
    assert left == {"cfg.json", "sae_weights.safetensors"}


def test_a_comparison_asks_for_the_others_statistics(six_wide, run):
    for name in ("a", "b"):
        bring_in(six_wide, run.path, name=name)
    folder = run.dictionary("a")
    with pytest.raises(InputError, match="has no statistics yet: run `sae eval"):
        evaluate(folder, None, names=["stability"], against=f"{run.path}/b")
    evaluate(run.dictionary("b"), None, names=["density"])
    assert evaluate(folder, None, names=["stability"], against=f"{run.path}/b")


def test_an_imported_transcoder_is_measured_between_its_hooks(tmp_path):
    torch.manual_seed(0)
    target = "blocks.1.hook_mlp_out"
    run = planted_run(tmp_path / "run", {HOOK: torch.randn(2048, 6), target: torch.randn(2048, 6)})
    give_out(saved(random_sae("skip_transcoder"), tmp_path / "ours"), "sparsify", tmp_path / "tc")
    folder = bring_in(tmp_path / "tc", run.path, hook=HOOK, target_hook=target)
    found = evaluate(folder, None, names=["reconstruction", "density"])
    assert found["l0"].value == pytest.approx(4.0, abs=0.5)
    known = load_sae(folder).statistics
    assert known is not None
    assert known.n_tokens == run.activations(HOOK).n_ordinary


def test_a_boost_away_from_its_base_is_not_measured(run, tmp_path):
    folder = bring_in(saved(random_sae("boost"), tmp_path / "ours"), run.path, name="a", hook=HOOK)
    with pytest.raises(InputError, match="measured in the run that trained it"):
        evaluate(folder, None, names=["density"])


# Out


@pytest.mark.parametrize("form", ["saelens", "dictionary_learning", "sparsify"])
def test_a_dictionary_goes_out_and_comes_back(form, tmp_path):
    torch.manual_seed(0)
    made, x = random_sae("topk"), torch.randn(16, 6)
    saved(made, tmp_path / "ours")
    assert sae("export", tmp_path / "ours", tmp_path / "out", "--format", form).exit_code == 0
    more = ("--hook", "blocks.2.hook_resid_post", "--model", "m")
    assert sae("import", tmp_path / "out", tmp_path / "r", *more).exit_code == 0
    torch.testing.assert_close(load_sae(tmp_path / "r").encode(x), made.encode(x), atol=1e-5, rtol=1e-5)
    one_line(sae("export", tmp_path / "ours", tmp_path / "out", "--format", form), "expected a new or an empty folder")


def test_an_architecture_that_a_format_cannot_hold_is_one_line(tmp_path):
    saved(random_sae("groupmax"), tmp_path / "ours")
    for form in ("saelens", "dictionary_learning"):
        done = sae("export", tmp_path / "ours", tmp_path / "out", "--format", form)
        one_line(done, "has no form for this groupmax dictionary: expected one of")
    assert not (tmp_path / "out").exists()
    done = sae("export", tmp_path / "ours", tmp_path / "out", "--format", "onnx")
    assert done.exit_code == 2
    assert all(name in done.output for name in FORMATS)


def test_features_go_to_neuronpedia_and_explanations_come_from_there(tmp_path):
    folder = planted_store(tmp_path / "r" / "dictionaries" / "p", n_documents=20)
    (tmp_path / "r" / "run.json").write_text(json.dumps({"format": 1, "model": "planted", "corpus": "words"}))
    done = sae("export", tmp_path / "r", tmp_path / "out", "--format", "neuronpedia", "--json")
    assert done.exit_code == 0, done.output
    assert (Path(json.loads(done.output)["written"]) / "features" / "batch-0.jsonl.gz").is_file()
    row = {"modelId": "m", "layer": "0-p", "index": "2", "description": "dates", "typeName": "t"}
    (tmp_path / "batch-0.jsonl").write_text(json.dumps(row) + "\n")
    done = sae("import", tmp_path / "batch-0.jsonl", tmp_path / "r" / "p")
    assert done.output == f"1 explanations of m/0-p added to {tmp_path / 'r' / 'p'}.\n"
    with open_store(folder) as store:
        assert [each.text for each in store.explanations()] == ["dates"]
    assert sae("import", tmp_path / "batch-0.jsonl", tmp_path / "r" / "p", "--name", "x").exit_code == 2


# What docs/interop.md shows


def test_the_commands_in_the_page_work(tmp_path, monkeypatch):
    """Each command line of the page, on a run and files of the names that it uses."""
    page = (Path(__file__).parents[2] / "docs" / "interop.md").read_text(encoding="utf-8")
    block = page.split("```")[1]
    lines = [line.split("#")[0].split() for line in block.strip().splitlines()]
    assert len(lines) == 8
    monkeypatch.chdir(tmp_path)
    planted_store(tmp_path / "runs" / "mine" / "dictionaries" / "a", n_documents=20)
    (tmp_path / "runs" / "mine" / "run.json").write_text(json.dumps({"format": 1, "model": "planted", "corpus": "x"}))
    put(tmp_path / "layers.3", "sae.safetensors", SPARSIFY_CFG, **SPARSIFY)
    about = {"trainer": {"dict_class": "BatchTopKSAE", "layer": 3, "lm_name": "EleutherAI/pythia-70m"}}
    put(tmp_path / "trainer_0", "ae.pt", about, **DL_CASES["BatchTopKSAE"][0])
    gemma = put(tmp_path / "hub" / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k", "params.npz", None, **GEMMA)
    monkeypatch.setattr("sae.interop.hub.fetch", lambda _: gemma)
    (tmp_path / "explanations").mkdir()
    row = {"modelId": "m", "layer": "0-p", "index": "2", "description": "dates"}
    (tmp_path / "explanations" / "batch-0.jsonl").write_text(json.dumps(row))
    for line in lines:
        assert line[0] == "sae"
        done = sae(*line[1:])
        assert done.exit_code == 0, (line, done.exception)
    shutil.rmtree(tmp_path / "runs")


def test_the_pages_tables_name_what_is_read_and_written():
    from sae.interop.detect import READERS
    from sae.interop.run import WRITERS

    page = (Path(__file__).parents[2] / "docs" / "interop.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(" `"): cells[2].strip() for line in page.splitlines() if len(cells := line.split("|")) > 4}
    named = {name: says for name, says in rows.items() if name in {*READERS, *WRITERS}}
    assert set(named) == set(READERS)
    for name, says in named.items():
        assert says == ("in, out" if name in WRITERS else "in"), name
    assert isinstance(main.get_command(click.Context(main), "import"), click.Command)
