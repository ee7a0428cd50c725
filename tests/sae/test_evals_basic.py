"""Metrics of weights and cached rows equal what was worked out by hand; controls are what they say."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from activations.cache import held_out_mask
from activations.errors import InputError
from activations.files import read_json, write_json
from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import SAE, Statistics
from sae.evals.baselines import baselines
from sae.evals.controls import controls, principal, projection
from sae.evals.cost import cost
from sae.evals.density import density
from sae.evals.geometry import geometry
from sae.evals.reconstruction import reconstruction
from sae.evals.subject import Options, Subject
from sae.evals.suite import TABLE, evaluate, reads_model
from sae.files import save_sae
from sae.settings import Training
from sae.statistics import latent_statistics
from tests.tiny import HOOK, planted_rows, planted_run


def of_rows(rows: torch.Tensor, *, signed: bool = False) -> SAE:
    kind, config = (AbsTopKSAE, AbsTopKConfig) if signed else (TopKSAE, TopKConfig)
    sae = kind(config(d_in=rows.shape[1], d_sae=len(rows), k=1))
    sae.W_dec.data, sae.W_enc.data = rows, rows.T
    return sae


@pytest.fixture
def run(tmp_path):
    return planted_run(tmp_path / "run", planted_rows(6000, 8, 12, 3, signed=False)[0] + 2.0, n_docs=200)


@pytest.fixture
def cache(run):
    return run.activations(HOOK)


def values(metrics):
    return {name: metric.value for name, metric in metrics.items()}


def test_cosines_of_three_known_rows():
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    found = values(geometry(of_rows(rows), chunk=2))
    # Products: 0.6, -1, -0.6; the nearest of each: 0.6, 0.6, -0.6.
    assert found["geometry.nearest"] == pytest.approx(0.2)
    assert found["geometry.nearest_max"] == pytest.approx(0.6)
    assert found["geometry.mean_abs_cosine"] == pytest.approx((0.6 + 1 + 0.6) / 3)
    assert found["geometry.encoder_decoder"] == pytest.approx(1)
    assert found["geometry.duplicates"] == 0
    signed = values(geometry(of_rows(rows, signed=True), chunk=2))
    assert signed["geometry.nearest"] == pytest.approx((1 + 0.6 + 1) / 3)
    assert signed["geometry.duplicates"] == pytest.approx(2 / 3)


def test_geometry_does_not_depend_on_the_chunk_or_on_norms():
    rows = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    whole, parts = values(geometry(of_rows(rows))), values(geometry(of_rows(rows * 3), chunk=4))
    assert whole == pytest.approx(parts)
    assert geometry(of_rows(rows[:1]))["geometry.nearest"].value == 0


def test_densities_are_counted_in_their_classes():
    sae = of_rows(torch.eye(4))
    zeros = torch.zeros(4)
    sae.statistics = Statistics(torch.tensor([0.9, 0.1, 0, 0]), zeros, zeros, 10, 1.0, 1.0)
    found = values(density(sae))
    assert found["dead"] == 0.5
    assert found["density.dense"] == 0.25  # 0.9 is, 0.1 is not
    assert found["density.q05"] == pytest.approx(0.1)
    assert found["density.q95"] == pytest.approx(0.9)


def test_norm_ratio_and_bias_of_a_dictionary_that_halves(cache):
    half = projection(torch.zeros(8), torch.eye(8))
    half.W_dec.data *= 0.5
    found = reconstruction(half, cache)
    assert found["norm_ratio"].value == pytest.approx(0.5)
    assert found["shrinkage"].value == pytest.approx(0.5)
    assert found["l0_median"].value == found["l0_q95"].value == found["l0"].value == 8


def test_the_interval_of_fvu_is_that_of_documents_drawn_again(cache):
    sae = of_rows(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)) / 3)
    found = reconstruction(sae, cache)["fvu"]
    rows = torch.cat([cache.rows(i)[held_out_mask(cache, i)] for i in range(cache.n_shards)])
    docs = torch.cat([cache.tokens(i).docs[held_out_mask(cache, i)] for i in range(cache.n_shards)])
    error = (rows - sae.reconstruct(rows)).detach().square().sum(dim=1)
    power = (rows - rows.mean(dim=0)).square().sum(dim=1)
    assert found.value == pytest.approx(float(error.sum() / power.sum()), rel=1e-5)
    parts = [(error[docs == doc].sum(), power[docs == doc].sum()) for doc in docs.unique()]
    sums = torch.tensor(parts)[torch.randint(len(parts), (4000, len(parts)), generator=torch.manual_seed(0))].sum(dim=1)
    lo, hi = (sums[:, 0] / sums[:, 1]).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert found.hi - found.lo == pytest.approx(hi - lo, rel=0.15)
    assert found.lo < found.value < found.hi


def test_parameters_and_bytes_are_counted_and_the_speed_is_above_0():
    found = values(cost(of_rows(torch.eye(8))))
    assert found["cost.parameters"] == 8 * 8 * 2 + 8 + 8
    assert found["cost.bytes"] == 4 * found["cost.parameters"]
    assert found["cost.encode_speed"] > 0


def test_controls_are_the_ends_and_pca_with_all_components_is_exact(cache):
    trained = of_rows(torch.randn(16, 8))
    made = controls(trained, cache, k=3)
    found = {name: values(reconstruction(sae, cache)) for name, sae in made.items()}
    assert found["identity"]["fvu"] == pytest.approx(0, abs=1e-9)
    assert found["mean"]["explained_variance"] == pytest.approx(0, abs=1e-2)  # the mean of rows that are trained on
    assert found["pca"]["l0"] == 3
    assert found["random"]["l0"] == pytest.approx(3, abs=0.05)  # a row may have fewer than 3 latents above 0
    rows = torch.cat([cache.rows(i)[cache.mask(i)] for i in range(cache.n_shards)])
    left = torch.linalg.svdvals(rows - rows.mean(dim=0)).square()
    assert found["pca"]["fvu"] == pytest.approx(float(left[3:].sum() / left.sum()), abs=0.02)
    assert 0 < found["pca"]["fvu"] < found["random"]["fvu"]
    exact = values(reconstruction(controls(trained, cache, k=8)["pca"], cache))
    assert exact["fvu"] == pytest.approx(0, abs=1e-9)


def test_principal_components_are_those_of_the_covariance(cache):
    mean, components = principal(cache, device=torch.device("cpu"))
    assert torch.allclose(components @ components.T, torch.eye(8), atol=1e-5)
    rows = torch.cat([cache.rows(i)[cache.mask(i) & ~held_out_mask(cache, i)] for i in range(cache.n_shards)])
    assert torch.allclose(mean, rows.mean(dim=0), atol=1e-5)
    spread = ((rows - mean) @ components.T).var(dim=0)
    assert torch.equal(spread, spread.sort(descending=True).values)


def test_controls_have_the_sign_and_the_width_of_what_they_stand_beside(cache):
    trained = of_rows(torch.randn(16, 8), signed=True)
    made = controls(trained, cache, k=2)["random"]
    assert (made.signed, made.d_sae) == (True, 16)
    subject = Subject(sae=trained, cache=cache, options=Options())
    trained.statistics = latent_statistics([trained], cache)[0]
    assert subject.l0 == 1
    assert {name.split(".")[1] for name in baselines(subject)} == {"random", "pca", "identity", "mean"}


@pytest.fixture
def folder(run, cache):
    sae = of_rows(torch.nn.functional.normalize(torch.randn(16, 8), dim=1))
    sae.statistics = latent_statistics([sae], cache)[0]
    sae.metadata = {"hook_name": HOOK}
    save_sae(sae, run.dictionary("one"))
    settings = Training(architecture="topk", hook=HOOK, sizes={"d_sae": sae.d_sae, "k": 1}, n_tokens=4096)
    write_json(run.dictionary("one") / "train.json", asdict(settings))
    return run.dictionary("one")


def test_one_metric_keeps_the_others_and_replaces_its_own(folder):
    evaluate(folder, None)
    record = read_json(folder / "eval.json")["metrics"]
    assert {each["row"] for each in record.values()} == {"reconstruction", "density", "sinks", "geometry", "cost"}
    record["geometry.gone"] = dict(record["geometry.nearest"])
    record["fvu"]["value"] = 7.0
    write_json(folder / "eval.json", {"metrics": record})
    evaluate(folder, None, names=["geometry"])
    again = read_json(folder / "eval.json")["metrics"]
    assert "geometry.gone" not in again
    assert again["fvu"]["value"] == 7.0
    assert again.keys() == record.keys() - {"geometry.gone"}


def test_an_eval_json_of_before_the_suite_is_kept(folder):
    write_json(folder / "eval.json", {"seed": 0, "metrics": {"delta_ce": {"value": 1.0}, "dead": {"value": 0.5}}})
    evaluate(folder, None, names=["density"])
    record = read_json(folder / "eval.json")["metrics"]
    assert record["delta_ce"] == {"value": 1.0}
    assert record["dead"]["row"] == "density"


def test_unknown_metrics_and_missing_needs_are_one_line(folder):
    with pytest.raises(InputError, match="No metric 'geometri': expected one of reconstruction, density"):
        evaluate(folder, None, names=["geometri"])
    with pytest.raises(InputError, match="The metric splice needs the language model"):
        evaluate(folder, None, names=["splice"])


def test_every_metric_says_its_definition_and_units(folder):
    for name, metric in evaluate(folder, None, names=[n for n in TABLE if TABLE[n].needs in ((), ("cache",))]).items():
        assert metric.definition, name
        assert metric.of, name
        assert metric.n > 0, name


def test_the_docs_list_what_the_table_has():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*?\| (always|on request) \|", page, flags=re.M))
    assert rows == {name: "always" if row.cheap else "on request" for name, row in TABLE.items()}


def test_the_model_is_loaded_only_for_what_reads_it():
    assert not reads_model(["geometry", "dark_matter", "stability"])
    assert reads_model(["geometry", "controls"])
    assert reads_model([])
