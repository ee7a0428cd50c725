"""The loss effect of a latent against forwards of the whole model with the latent ablated by `steer`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from activations.capture import collect
from activations.model import Model
from activations.run import Run
from autointerp import loss_effect
from autointerp.codes import code_tables, tokens_table
from autointerp.loss_effect import measure_effects, read_text, spread, summary
from autointerp.scratch import Scratch
from sae.architectures.topk import TopKSAE
from steering import steer
from steering.edit import ablate
from tests.activations.test_capture import new_run, ragged
from tests.tiny import HOOK, tiny_dictionary, tiny_model, tiny_tokenizer

LENGTHS = [16, 9, 2, 16, 12, 16, 5, 16] * 3
D_SAE = 24


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("tiny", "0", tiny_model(), tiny_tokenizer())


@pytest.fixture
def run(tmp_path: Path, model: Model) -> Run:
    run = new_run(tmp_path / "run", n_tokens=sum(LENGTHS))
    collect(run, model, [HOOK], ragged(LENGTHS), dtype="float32")
    cache = run.activations(HOOK)
    scratch, n = Scratch(tmp_path), cache.rows_of(0)
    scratch.write("codes", 0, code_tables(dictionary(), cache, 0, 0, n, batch=50))
    scratch.write("tokens", 0, [tokens_table(cache, 0, 0, n)])
    return run


def dictionary() -> TopKSAE:
    return tiny_dictionary(D_SAE)


def loss(model: Model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return cross_entropy(model(ids[None])[0, 1:-1], ids[2:], reduction="none")


def test_the_effect_is_that_of_an_ablation_in_the_contexts_where_it_fires(
    run: Run, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_effect, "N_CONTEXTS", 1000)
    sae = dictionary()
    wanted = [5, 2, 11]
    scratch = Scratch(tmp_path)
    text = read_text(scratch.parts("tokens"))
    table = measure_effects(sae, model, text, scratch.parts("codes"), wanted)
    sink = run.activations(HOOK).sink_threshold
    assert sink > max(float(run.activations(HOOK).rows(0).norm(dim=1).max()), 0), "no row is a sink here"
    found = dict(zip(table["feature"].to_pylist(), table["loss"].to_pylist(), strict=True))
    assert list(found) == wanted
    forwards, seen = 0, set()
    for feature in wanted:
        differences = []
        for number, sequence in enumerate(ragged(LENGTHS)):
            ids = torch.from_numpy(sequence.ids).long()
            clean = loss(model, ids)
            with steer(model, ablate(sae, feature)):
                without = loss(model, ids)
            if fires(sae, model, ids, feature):
                differences.append((without - clean).numpy())
                seen.add(number)
                forwards += 2
        whole = np.concatenate(differences)
        assert found[feature]["nats"] == pytest.approx(whole.mean(), abs=1e-6)
        assert np.abs(whole).max() > 0.01
        assert found[feature]["n_tokens"] == len(whole)
        assert found[feature]["n_contexts"] == sum(len(each) > 0 for each in differences)
        assert 0 < found[feature]["error"] < 1
        assert found[feature]["control"] != found[feature]["nats"]
    assert sum(table["n_forwards"].to_pylist()) == forwards + len(seen)


def fires(sae: TopKSAE, model: Model, ids: torch.Tensor, feature: int) -> bool:
    from activations.splice import read

    with read(model, [HOOK]) as got, torch.inference_mode():
        model(ids[None])
        values, indices = sae.encode_sparse(got[HOOK][0, 1:])
    return bool(((indices == feature) & (values != 0)).any())


def test_a_few_contexts_are_drawn_and_the_same_ones_each_time(run: Run, model: Model, tmp_path: Path) -> None:  # noqa: ARG001
    scratch = Scratch(tmp_path)
    text, codes = read_text(scratch.parts("tokens")), scratch.parts("codes")
    some = measure_effects(dictionary(), model, text, codes, spread(codes, 4))
    assert some == measure_effects(dictionary(), model, text, codes, spread(codes, 4))
    assert all(effect["n_contexts"] <= 16 for effect in some["loss"].to_pylist())
    assert len(some) == 4
    assert sum(some["n_forwards"].to_pylist()) <= len(LENGTHS) + 2 * 16 * 4


def test_the_mean_is_over_tokens_and_the_error_over_contexts() -> None:
    without = [torch.tensor([1.0, 3.0]), torch.tensor([4.0]), torch.tensor([])]
    found = summary(without, [torch.zeros(2), torch.ones(1), torch.tensor([])])
    assert found is not None
    assert (found["nats"], found["n_contexts"], found["n_tokens"]) == (pytest.approx(8 / 3), 2, 3)
    assert found["control"] == pytest.approx(1 / 3)
    residuals = np.array([4 - 2 * 8 / 3, 4 - 8 / 3])
    assert found["error"] == pytest.approx(np.sqrt((residuals**2).sum() / 2) / 1.5)
    assert summary([torch.tensor([])], [torch.tensor([])]) is None
