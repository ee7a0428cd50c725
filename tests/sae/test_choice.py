"""Mutual Choice and Feature Choice: quotas, the law they follow, thresholds, and gradients of the dense form."""

import pytest
import torch
from torch import Tensor

from activations.errors import InputError
from sae import zipf
from sae.architectures.featurechoice import FeatureChoiceConfig, FeatureChoiceSAE
from sae.architectures.mutualchoice import MutualChoiceConfig, MutualChoiceSAE
from sae.base import SAE, ConfigError, State
from sae.batchwise import KEEPS
from sae.settings import Training


def filled(sae: SAE) -> SAE:
    torch.manual_seed(0)
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.5)
    return sae


def dense_fvu(sae: SAE, x: Tensor, kept: Tensor) -> Tensor:
    """FVU of x from the kept latents, all dense; by autograd."""
    z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu() * kept
    error = z @ sae.W_dec + sae.b_dec - x
    return error.square().sum() / (x - x.mean(dim=0)).square().sum()


def same_gradients(sae: SAE, ours: Tensor, dense: Tensor) -> None:
    torch.testing.assert_close(ours, dense)
    wanted = torch.autograd.grad(dense, list(sae.parameters()))
    got = torch.autograd.grad(ours, list(sae.parameters()))
    for (name, _), a, b in zip(sae.named_parameters(), got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def test_the_law_is_found_again_in_frequencies_that_follow_it():
    rank = torch.arange(1, 201, dtype=torch.float32)
    law = 2.0 / (rank + 8) ** 1.3
    shuffled = torch.randperm(200)
    torch.testing.assert_close(zipf.expected(law[shuffled]), law[shuffled], rtol=1e-3, atol=0)


def test_latents_below_the_law_are_dying_and_no_others():
    rank = torch.arange(1, 201, dtype=torch.float32)
    frequency = 2.0 / (rank + 8) ** 1.3
    frequency[190:] *= 0.1
    dying = zipf.dying(frequency)
    assert len(dying.latents) == 200 // zipf.DYING_PART
    assert sorted(dying.latents[dying.real].tolist()) == list(range(190, 200))
    assert dying.n == 10
    assert zipf.dying(torch.zeros(200)).n == 0  # nothing is known yet


def test_quotas_are_one_each_and_the_rest_by_share():
    # 2 each leaves 12 of 16 - 4: 12 * (1/2, 1/3, 1/6, 0)
    assert zipf.quotas(torch.tensor([3.0, 2.0, 1.0, 0.0]), 16, 100).tolist() == [7, 5, 3, 1]
    assert zipf.quotas(torch.tensor([3.0, 2.0, 1.0, 0.0]), 16, 5).tolist() == [5, 5, 3, 1]
    assert zipf.quotas(torch.zeros(4), 16, 100).tolist() == [4, 4, 4, 4]
    uneven = zipf.quotas(torch.rand(37), 1000, 10_000)
    assert uneven.sum() == 1000
    assert uneven.min() >= 1
    assert zipf.quotas(torch.rand(37), 10, 100).sum() == 10  # too few for all


def test_feature_choice_gives_each_latent_its_rows_with_the_dense_gradient():
    sae, x = filled(FeatureChoiceSAE(FeatureChoiceConfig(d_in=12, d_sae=30, k=4, auxk_weight=0))), torch.randn(40, 12)
    sae.frequency.copy_(torch.rand(30))
    share = torch.zeros(40, 30).flatten()
    p = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    share[p.flatten().topk(160).indices] = 1
    after = KEEPS * sae.frequency + (1 - KEEPS) * share.view(40, 30).mean(dim=0)
    quotas = zipf.quotas(zipf.expected(after), 160, 40)
    kept = torch.zeros(40, 30)
    for i in range(30):
        kept[p[:, i].topk(int(quotas[i])).indices, i] = 1
    made = sae.loss(x, x, State())
    torch.testing.assert_close(sae.frequency, after)
    same_gradients(sae, made.total, dense_fvu(sae, x, kept))
    least = torch.where((kept * p) > 0, p, torch.inf).amin(dim=0)
    torch.testing.assert_close(sae.threshold, least)
    assert made.fired.all()


def test_feature_choice_is_mutual_choice_while_its_penalty_rises():
    x = torch.randn(40, 12)
    makers = (
        FeatureChoiceSAE(FeatureChoiceConfig(d_in=12, d_sae=30, k=4)),
        MutualChoiceSAE(MutualChoiceConfig(d_in=12, d_sae=30, k=4)),
    )
    feature, mutual = (filled(sae).loss(x, x, State(penalty=0.5)).total for sae in makers)
    torch.testing.assert_close(feature, mutual)


def test_mutual_choice_has_the_gradient_of_the_dense_form():
    sae, x = filled(MutualChoiceSAE(MutualChoiceConfig(d_in=12, d_sae=30, k=4, auxk_weight=0))), torch.randn(40, 12)
    p = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    kept = torch.zeros(1200)
    kept[p.flatten().topk(160).indices] = 1
    same_gradients(sae, sae.loss(x, x, State()).total, dense_fvu(sae, x, kept.view(40, 30)))


@pytest.mark.parametrize(
    "sae",
    [
        MutualChoiceSAE(MutualChoiceConfig(d_in=12, d_sae=30, k=2)),
        FeatureChoiceSAE(FeatureChoiceConfig(d_in=12, d_sae=30, k=2)),
    ],
)
def test_dying_latents_learn_from_what_is_left_over(sae):
    filled(sae)
    x = torch.randn(40, 12)
    sae.frequency.copy_(torch.linspace(0.2, 0.1, 30))
    sae.frequency[27:] = 1e-4
    with torch.no_grad():
        sae.b_enc[27:] = -3.0
    made = sae.loss(x, x, State(penalty=0.5))
    assert made.terms["dying"] == 3
    assert made.terms["auxk"] > 0
    assert not made.fired[27:].any()
    made.total.backward()
    assert (sae.W_enc.grad[:, 27:].norm(dim=0) > 0).any()


def test_the_share_of_mutual_choice_is_a_setting_of_the_run():
    common = {"hook": "h", "sizes": {"d_sae": 30, "k": 4}, "n_tokens": 10_000, "sparsity_warmup": 0.5}
    assert Training(architecture="featurechoice", **common).penalty_at(0) < 1
    with pytest.raises(InputError, match="mutualchoice has no penalty"):
        Training(architecture="mutualchoice", **common)


def test_feature_choice_refuses_what_it_has_not():
    with pytest.raises(ConfigError, match="featurechoice has neither"):
        FeatureChoiceConfig(d_in=12, d_sae=30, k=4, refine=1)
