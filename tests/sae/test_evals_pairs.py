"""Two dictionaries beside each other: the same one in another order is found whole, a random one is not."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from activations.errors import InputError
from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import SAE
from sae.evals.matching import match, nearest
from sae.evals.stability import stability
from sae.evals.universality import Correlations, Rsa, Svcca, correlations, pairs, universality
from tests.tiny import HOOK, planted_rows, planted_run


def directions(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def of_rows(decoder: torch.Tensor, encoder: torch.Tensor | None = None, *, signed: bool = False, k: int = 3) -> SAE:
    kind, config = (AbsTopKSAE, AbsTopKConfig) if signed else (TopKSAE, TopKConfig)
    sae = kind(config(d_in=decoder.shape[1], d_sae=len(decoder), k=k))
    sae.W_dec.data = decoder
    sae.W_enc.data = (decoder if encoder is None else encoder).T
    return sae.requires_grad_(False)


def values(metrics):
    return {name: metric.value for name, metric in metrics.items()}


def test_a_permuted_dictionary_is_shared_whole_also_with_other_norms():
    rows, order = directions(50, 16), torch.randperm(50, generator=torch.manual_seed(1))
    found = values(stability(of_rows(rows), of_rows(rows[order] * 3, 0.1 * rows[order]), "r/b", seed=7))
    for name in ("shared", "decoder_shared", "mmcs", "pw_mcc"):
        assert found[f"stability.{name}"] == pytest.approx(1), name
    assert found["control.random.stability.mmcs"] < 0.8


def test_signs_are_flipped_for_nothing_in_a_signed_dictionary_and_half_is_lost_in_another():
    rows = directions(200, 32)
    flipped = rows * (torch.arange(200) % 2 * 2 - 1)[:, None]
    signed = values(stability(of_rows(rows, signed=True), of_rows(flipped, signed=True), "r/b"))
    assert signed["stability.shared"] == signed["stability.pw_mcc"] == pytest.approx(1)
    plain = values(stability(of_rows(rows), of_rows(flipped), "r/b"))
    assert plain["stability.shared"] == pytest.approx(0.5)


def test_shared_wants_the_same_partner_by_encoder_and_by_decoder():
    rows, swapped = directions(20, 64), directions(20, 64)
    swapped[:5] = rows[[1, 2, 3, 4, 0]]
    found = values(stability(of_rows(rows), of_rows(rows, swapped), "r/b"))
    assert found["stability.shared"] == pytest.approx(0.75)
    assert found["stability.decoder_shared"] == pytest.approx(1)


def test_a_dictionary_of_another_hook_width_is_refused():
    with pytest.raises(InputError, match="activations of 16 and 8 numbers have no rows to compare"):
        stability(of_rows(directions(9, 16)), of_rows(directions(9, 8)), "r/b")


def test_the_hungarian_match_has_the_best_sum_and_the_greedy_one_the_best_first_pair():
    # Products: 1.0 and 0.9 in the first row, 0.9 and 0.1 in the second: 0.9 + 0.9 beats 1.0 + 0.1.
    a = torch.tensor([[1.0, 0.9], [0.9, 0.1]])
    b = torch.eye(2)
    assert match(a, b, signed=False)[0].tolist() == [1, 0]
    partner, similarity = match(a, b, signed=False, exact=1)
    assert partner.tolist() == [0, 1]
    assert similarity == pytest.approx([1.0, 0.1])


def test_greedy_finds_a_permutation_and_leaves_nobody_with_two():
    rows, order = directions(300, 24), torch.randperm(300, generator=torch.manual_seed(2))
    partner, similarity = match(rows, rows[order], signed=True, exact=10)
    assert torch.equal(order[torch.as_tensor(partner)], torch.arange(300))
    assert similarity == pytest.approx(np.ones(300), abs=1e-5)
    taken = match(directions(300, 24), directions(300, 24, seed=5), signed=False, exact=10)[0]
    assert len(set(taken[taken >= 0])) == (taken >= 0).sum()


def test_dictionaries_of_unlike_size_leave_the_rest_alone():
    rows = directions(30, 16)
    partner, similarity = match(rows, rows[:10], signed=False)
    assert partner[:10].tolist() == list(range(10))
    assert (partner[10:] == -1).all()
    assert (similarity[10:] == 0).all()
    assert nearest(rows, rows[:10], False)[:10] == pytest.approx(np.ones(10), abs=1e-6)


@pytest.fixture
def rotated(tmp_path):
    """Two runs of the same tokens: the rows of the second are those of the first, rotated; a dictionary of each."""
    rows, true = planted_rows(3000, 24, 40, 3, signed=False)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.manual_seed(3))).Q
    caches = [planted_run(tmp_path / name, x).activations(HOOK) for name, x in (("a", rows), ("b", rows @ turn))]
    order = torch.randperm(40, generator=torch.manual_seed(4))
    return caches, (of_rows(true), of_rows((true @ turn)[order])), order


def test_correlations_are_numpys(rotated):
    caches, (a, b), _ = rotated
    found = correlations(a, caches[0], b, caches[1], n_rows=500)
    assert found.n == 500
    rows = [torch.cat([each.rows(i)[each.mask(i)] for i in range(each.n_shards)])[:500] for each in caches]
    z = np.concatenate([a.encode(rows[0])[:, found.a].numpy(), b.encode(rows[1])[:, found.b].numpy()], axis=1)
    assert found.r.numpy() == pytest.approx(np.corrcoef(z.T)[: len(found.a), len(found.a) :], abs=1e-3)


def test_latents_of_a_rotated_world_pair_up_and_their_geometry_agrees(rotated):
    caches, (a, b), order = rotated
    mine, theirs = pairs(correlations(a, caches[0], b, caches[1], n_rows=3000))
    assert torch.equal(mine, order[theirs])
    assert len(mine) == 40
    found = values(universality(a, caches[0], b, caches[1], "b/one"))
    assert found["universality.correlation"] > 0.99
    assert found["universality.pairs"] == 1
    assert found["universality.svcca"] == pytest.approx(1, abs=1e-3)
    assert found["universality.rsa"] > 0.9  # correlations between rows are not quite what a turn leaves alone
    assert found["universality.rsa_p"] == pytest.approx(1 / 201)
    assert abs(found["control.shuffled.universality.rsa"]) < 0.1
    assert found["control.shuffled.universality.svcca"] < 0.9


def test_rows_that_have_nothing_to_do_with_each_other_do_no_better_than_shuffled():
    rng = np.random.default_rng(0)
    a, b = directions(200, 10), directions(200, 12, seed=9)
    for measure in (Svcca(a, b), Rsa(a, b, rng)):
        null = [measure(rng.permutation(200)) for _ in range(50)]
        assert min(null) < measure(None) < max(null)


def test_of_latents_that_take_the_same_one_the_best_stays():
    r = torch.tensor([[0.9, 0.95, 0.05], [0.2, 0.1, 0.02]])
    mine, theirs = pairs(Correlations(r, torch.tensor([4, 5]), torch.tensor([7, 8, 9]), 10))
    assert (mine.tolist(), theirs.tolist()) == ([4], [8])


def test_runs_of_other_tokens_are_refused(tmp_path):
    a = planted_run(tmp_path / "a", torch.randn(64, 8)).activations(HOOK)
    b = planted_run(tmp_path / "b", torch.randn(96, 8)).activations(HOOK)
    sae = of_rows(directions(9, 8))
    with pytest.raises(InputError, match="The two runs hold other tokens"):
        universality(sae, a, sae, b, "b/one")
