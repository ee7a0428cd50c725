"""Steered search: what is raised comes up, what is lowered goes down, and the rest of the query stays."""

import pytest
import torch

from activations.errors import InputError
from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import Statistics
from steering.retrieve import Change, changed, retrieve
from tests.tiny import HOOK, planted_run

D, TOPICS, ROWS = 24, 8, 800


def topics() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)))[0][:TOPICS].contiguous()


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one topic each and some noise; (rows, topic of each)."""
    generator = torch.Generator().manual_seed(0)
    topic = torch.arange(ROWS) % TOPICS
    rows = topics()[topic] + 0.1 * torch.randn(ROWS, D, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True), topic


def dictionary(*, signed: bool = False) -> TopKSAE | AbsTopKSAE:
    """Latent i is topic i; more latents on nothing that is written about."""
    rest = torch.randn(4, D, generator=torch.Generator().manual_seed(2))
    W = torch.cat([topics(), rest / rest.norm(dim=1, keepdim=True)])
    sizes = {"d_in": D, "d_sae": len(W), "k": 2}
    sae = AbsTopKSAE(AbsTopKConfig(**sizes)) if signed else TopKSAE(TopKConfig(**sizes))
    with torch.no_grad():
        sae.W_dec.copy_(W)
        sae.W_enc.copy_(W.T)
    z = sae.encode(texts()[0]).detach()
    sae.statistics = Statistics(
        density=(z != 0).float().mean(dim=0),
        max=z.amax(dim=0).clamp(min=0),
        min=z.amin(dim=0).clamp(max=0),
        n_tokens=ROWS,
        median_norm=1.0,
        sink_threshold=1e6,
    )
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return planted_run(tmp_path_factory.mktemp("run") / "run", texts()[0]).activations(HOOK)


def test_raising_a_topic_brings_its_rows_up_and_keeps_the_query(cache):
    rows, topic = texts()
    found = retrieve(dictionary(), cache, rows[0], [Change(latent=3, amount=1.5, relative=True)], n=20)
    assert {int(topic[hit.row]) for hit in found.base} == {0}
    assert {int(topic[hit.row]) for hit in found.steered} == {3}
    value = {name: metric.value for name, metric in found.metrics.items()}
    assert value["base.latent_3.fires"] < 0.3
    assert value["steered.latent_3.fires"] == 1.0
    assert value["steered.latent_3.auc"] > value["base.latent_3.auc"] + 0.2
    assert abs(value["control.random.latent_3.auc"] - value["base.latent_3.auc"]) < 0.15
    assert value["base.similarity"] == pytest.approx(1)
    assert 0.4 < value["steered.similarity"] < 0.9
    assert value["steered.kept"] < value["base.kept"]
    assert (value["base.shared"], value["steered.shared"]) == (1.0, 0.0)
    control = found.metrics["control.random.latent_3.auc"]
    assert control.lo is not None
    assert control.lo <= control.value <= control.hi


def test_lowering_the_querys_own_topic_takes_its_rows_away(cache):
    rows, topic = texts()
    found = retrieve(dictionary(), cache, rows[0], [Change(latent=0, amount=0.0)], n=20)
    assert next(iter(found.query)) == 0
    assert sum(int(topic[hit.row]) == 0 for hit in found.steered) < 10
    assert found.metrics["steered.latent_0.auc"].value < found.metrics["base.latent_0.auc"].value - 0.2


def test_the_edit_moves_the_query_along_the_latent_and_leaves_its_error():
    sae, x = dictionary(), texts()[0][5]
    unit = sae.statistics.max
    moved = changed(sae, x, [Change(latent=2, amount=0.5)])
    torch.testing.assert_close(moved, x + 0.5 * unit[2] * sae.W_dec[2])
    torch.testing.assert_close(changed(sae, x, []), x)
    gone = changed(sae, x, [Change(latent=5, amount=-9.0, relative=True)])  # topic 5 is the query's
    torch.testing.assert_close(gone, x - sae.encode(x[None])[0, 5] * sae.W_dec[5])
    signed = dictionary(signed=True)
    signed.statistics.min[2] = -3.0  # its largest size is below 0
    below = changed(signed, x, [Change(latent=2, amount=-0.5, relative=True)])
    torch.testing.assert_close(below, x - 1.5 * signed.W_dec[2])


def test_without_changes_it_is_a_search_by_cosine_and_a_row_is_not_its_own_result(cache):
    rows, _ = texts()
    found = retrieve(dictionary(), cache, rows[40], n=5, skip=40, batch=7)
    cosines = rows @ rows[40]
    ordinary = torch.cat([cache.mask(i) for i in range(cache.n_shards)])
    cosines[~ordinary], cosines[40] = -2, -2
    assert [hit.row for hit in found.base] == cosines.topk(5).indices.tolist()
    assert (found.steered, found.metrics) == ([], {})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ([Change(latent=99, amount=1)], "no latent 99: expected 0 to 11"),
        ([Change(latent=1, amount=1), Change(latent=1, amount=2)], "changed twice"),
    ],
)
def test_changes_that_cannot_be_are_refused(cache, changes, part):
    with pytest.raises(InputError, match=part):
        retrieve(dictionary(), cache, texts()[0][0], changes)


def test_a_latent_that_never_fires_and_a_dictionary_without_statistics_are_refused(cache):
    sae = dictionary()
    sae.statistics.max[11] = sae.statistics.min[11] = 0
    assert 11 not in retrieve(sae, cache, sae.W_dec[11]).query
    with pytest.raises(InputError, match="never fires"):
        retrieve(sae, cache, texts()[0][0], [Change(latent=11, amount=1)])
    sae.statistics = None
    with pytest.raises(InputError, match="no statistics"):
        retrieve(sae, cache, texts()[0][0])
