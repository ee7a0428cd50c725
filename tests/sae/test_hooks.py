"""Dictionaries that read or predict other hooks: trained, resumed, measured, and worked by hand."""

import dataclasses
import json

import pytest
import torch

from activations.errors import InputError
from activations.joined import Joined, Pooled
from activations.run import Run
from sae import checkpoint, load_sae
from sae.architectures.clt import CLT, CLTConfig
from sae.architectures.crosscoder import CrosscoderConfig, CrosscoderSAE, exclusiveness
from sae.architectures.gsae import GSAE, GSAEConfig
from sae.architectures.mlsae import MLSAE, MLSAEConfig
from sae.architectures.skip_transcoder import SkipTranscoderSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.architectures.transcoder import TranscoderConfig, TranscoderSAE
from sae.base import ConfigError, Dead, State
from sae.evals.suite import evaluate
from sae.frozen import stitched
from sae.groups import angular_distances, complete_linkage, layer_groups
from sae.heads import head_attribution, head_shares
from sae.registry import REGISTRY
from sae.settings import Training
from sae.stepper import Stepper
from sae.train import train
from tests.tiny import HOOK, planted_rows, planted_run

OUT, OUT_2, LAST = "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"


def joint_run(path) -> Run:
    """Rows of width 16, two maps of them of width 12, and rows that are five times as long and have other noise."""
    rows = planted_rows(4000, 16, 20, 3, signed=False)[0]
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(16, 12, generator=generator)
    noisy = 5 * (rows + 0.1 * torch.randn(rows.shape, generator=generator))
    mapped = torch.relu(rows @ mixing)
    return planted_run(path, {HOOK: rows, OUT: mapped + 3, LAST: noisy, OUT_2: 2 * mapped.flip(1)})


@pytest.fixture
def run(tmp_path) -> Run:
    return joint_run(tmp_path / "run")


OF_HOOKS = {
    "transcoder": ({"d_out": 12}, {"target_hooks": (OUT,)}),
    "skip_transcoder": ({"d_out": 12}, {"target_hooks": (OUT,)}),
    "crosscoder": ({"widths": (16, 16)}, {"hooks": (HOOK, LAST)}),
    "mlsae": ({}, {"hooks": (HOOK, LAST)}),
    "boost": ({}, {"base": "base"}),
    "clt": ({"layers": 2, "d_out": 24}, {"hooks": (HOOK, LAST), "target_hooks": (OUT, OUT_2)}),
}


def settings(architecture: str = "transcoder", **changes) -> Training:
    sizes, hooks = OF_HOOKS.get(architecture, ({}, {}))
    sizes, changes = {"d_sae": 64, "k": 3, **sizes, **changes.pop("sizes", {})}, {**hooks, **changes}
    return Training(
        **{"architecture": architecture, "hook": HOOK, "sizes": sizes, "n_tokens": 12_800, "batch": 64, **changes}
    )


RESUMED = [*map(settings, OF_HOOKS), settings("topk", hooks=(HOOK, LAST))]


@pytest.mark.parametrize("wanted", RESUMED, ids=lambda wanted: wanted.architecture)
def test_killed_and_resumed_it_ends_in_the_same_bytes(run, monkeypatch, wanted):
    if wanted.base:
        train(run, settings("topk", n_tokens=6400), name=wanted.base)
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


# Two hooks of width 1: a shared latent, one of each hook, chosen by z times the sum of both decoder norms.
def crosscoder(k: int = 1, **changes) -> CrosscoderSAE:
    sae = CrosscoderSAE(CrosscoderConfig(d_in=2, d_sae=3, k=k, widths=(1, 1), **changes))
    sae.W_enc.data = torch.tensor([[0.6, 1.0, 0.0], [0.8, 0.0, 1.0]])
    sae.W_dec.data = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    return sae


def test_crosscoder_by_hand():
    # pre (2.0, 2.5, 0.625), scores (2.0 * 1.4, 2.5, 0.625): the shared latent wins, though its value is smaller
    z = crosscoder().encode(torch.tensor([[2.5, 0.625]]))
    assert z.tolist() == [[pytest.approx(2.0), 0, 0]]
    torch.testing.assert_close(crosscoder().reconstruct(torch.tensor([[2.5, 0.625]])), torch.tensor([[1.2, 1.6]]))
    assert exclusiveness(crosscoder()).tolist() == pytest.approx([(0.2 / 0.8 + 1) / 2, 0, 1])


def test_crosscoder_chooses_the_same_latents_of_unscaled_rows():
    torch.manual_seed(0)
    sae = CrosscoderSAE(CrosscoderConfig(d_in=8, d_sae=20, k=4, widths=(5, 3)))
    sae.W_enc.data.normal_()
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn(20, 8) * (torch.rand(20, 8) > 0.5) + 1e-3, dim=1)
    x, scales = torch.randn(50, 8), torch.tensor([0.3] * 5 + [4.0] * 3)
    z, x_hat, exclusive = sae.encode(x * scales), sae.reconstruct(x * scales) / scales, exclusiveness(sae)
    sae.unscale_columns(scales, scales)
    assert torch.equal(sae.encode(x) != 0, z != 0)
    torch.testing.assert_close(sae.reconstruct(x), x_hat, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(exclusiveness(sae), exclusive)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))


def test_weighted_choice_has_the_gradients_of_the_dense_form():
    torch.manual_seed(0)
    sae = CrosscoderSAE(CrosscoderConfig(d_in=8, d_sae=12, k=3, widths=(5, 3)))
    for parameter in sae.parameters():
        parameter.data.normal_()
    x = torch.randn(30, 8)
    made = sae.loss(x, x, State()).total
    made.backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    z = torch.relu(x @ sae.W_enc + sae.b_enc)
    score = z * (sae.W_dec[:, :5].norm(dim=1) + sae.W_dec[:, 5:].norm(dim=1)).detach()
    error = z * (score >= score.topk(3).values[:, -1:]) @ sae.W_dec + sae.b_dec - x
    (error.square().sum() / (x - x.mean(dim=0)).square().sum()).backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_crosscoder_tells_shared_latents_from_those_of_one_hook(tmp_path):
    shared, directions = planted_rows(8000, 16, 10, 2, signed=False)
    other = planted_rows(8000, 16, 10, 2, signed=False, seed=4)[0]
    own = planted_rows(8000, 16, 8, 1, signed=False, seed=5)[0]
    run = planted_run(tmp_path / "two", {HOOK: shared + own, LAST: 7 * (shared.flip(1) + other)})
    wanted = settings("crosscoder", sizes={"d_sae": 28, "k": 5}, n_tokens=200_000, batch=128, lr=3e-3)
    made = load_sae(train(run, wanted))
    assert isinstance(made, CrosscoderSAE)
    share = exclusiveness(made)
    both = torch.cat([directions, directions.flip(1)], dim=1)  # a planted shared direction, at both hooks
    scaled = made.W_dec * torch.tensor(made.cfg.scales).repeat_interleave(16)
    nearest = torch.nn.functional.cosine_similarity(both[:, None], scaled[None], dim=2).argmax(dim=1)
    assert len(set(nearest.tolist())) == 10
    assert ((share[nearest] - 0.5).abs() < 0.25).all()
    assert (share < 0.2).sum() >= 7  # of 8; b_dec is the eighth, since one of them is always there
    assert (share > 0.8).sum() >= 9  # of 10


def test_two_models_of_one_tokenizer_share_a_crosscoder(run, tmp_path):
    other = joint_run(tmp_path / "other")
    sources = {HOOK: run.activations(HOOK), "other": other.activations(LAST)}
    wanted = settings("crosscoder", hooks=(HOOK, "other"))
    folder = train(run, wanted, name="x", source=sources)
    assert load_sae(folder).hooks == (HOOK, "other")


def test_mlsae_by_hand():
    # a row (1, 3, 5, 7): mean 4, std sqrt(5); u = (-3, -1, 1, 3) / sqrt(5); the latent reads and writes (0, 0, 0, 1)
    sae = MLSAE(MLSAEConfig(d_in=4, d_sae=1, k=1))
    sae.W_enc.data, sae.W_dec.data = torch.eye(4)[:, 3:], torch.eye(4)[3:]
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
    torch.testing.assert_close(sae.encode(x), torch.tensor([[3.0]]))  # 3 / sqrt(5), times the std
    torch.testing.assert_close(sae.reconstruct(x), torch.tensor([[4.0, 4.0, 4.0, 7.0]]))
    torch.testing.assert_close(sae.encode(10 * x), torch.tensor([[30.0]]))


def test_a_dictionary_of_pooled_hooks_is_one_of_each(run):
    made = load_sae(train(run, settings("topk", hooks=(HOOK, LAST), n_tokens=64_000)))
    for hook in (HOOK, LAST):
        x = run.activations(hook).rows(0)
        error = (made.at(hook).reconstruct(x) - x).square().sum() / (x - x.mean(dim=0)).square().sum()
        assert error < 0.35
    with pytest.raises(InputError, match=r"does not read 'blocks.0.hook_mlp_out'"):
        made.at(OUT)


def test_layers_are_grouped_by_angles(tmp_path):
    rows = planted_rows(4000, 16, 20, 3, signed=False)[0]
    other = planted_rows(4000, 16, 20, 3, signed=False, seed=9)[0]
    noise = 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
    hooks = {"a": rows, "b": 4 * (rows + noise), "c": other, "d": other - noise}
    run = planted_run(tmp_path / "layers", hooks)
    assert layer_groups(run, list(hooks)) == [("a", "b"), ("c", "d")]
    assert layer_groups(run, list(hooks), limit=0.0) == [("a",), ("b",), ("c",), ("d",)]
    distances = angular_distances([run.activations(hook) for hook in hooks])
    assert distances[0, 1] < 0.1
    assert distances[0, 2].item() == pytest.approx(0.5, abs=0.05)  # of unrelated rows a quarter turn


def test_groups_are_those_of_scipys_complete_linkage():
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    points = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    distances = torch.cdist(points, points).fill_diagonal_(0.0)
    tree = linkage(squareform(distances.numpy(), checks=False), "complete")
    for n in range(1, 13):
        labels = fcluster(tree, n, "maxclust")
        theirs = sorted([i for i in range(12) if labels[i] == label] for label in set(labels))
        assert complete_linkage(distances, n) == theirs


def test_a_boost_learns_what_the_base_leaves_over(run):
    base = load_sae(train(run, settings("topk", sizes={"d_sae": 8, "k": 2}), name="base"))
    boost = load_sae(train(run, settings("boost", n_tokens=64_000), name="more"))
    both = stitched(base, boost)
    x = torch.cat([run.activations(HOOK).rows(i) for i in range(3)])
    torch.testing.assert_close(both.reconstruct(x), base.reconstruct(x) + boost.reconstruct(x))
    torch.testing.assert_close(both.decode(both.encode(x), x), both.reconstruct(x), atol=1e-5, rtol=1e-5)
    assert both.d_sae == 72
    left, after = ((sae.reconstruct(x) - x).square().sum() for sae in (base, both))
    assert after < 0.5 * left
    silent = boost.b_enc.data.clone().fill_(-1e9)
    boost.b_enc.data = silent
    torch.testing.assert_close(both.reconstruct(x), base.reconstruct(x))  # no decoder bias
    assert (
        evaluate(run.dictionary("more"), None)["fvu"].value < 0.5 * evaluate(run.dictionary("base"), None)["fvu"].value
    )


def test_gsae_by_hand():
    # p = (2, 1.5); the loss turns only along the second direction: 2 (1 + 0) < 1.5 (1 + 1 * |1|)
    sae = GSAE(GSAEConfig(d_in=2, d_sae=2, k=1))
    sae.W_enc.data, sae.W_dec.data = torch.eye(2), torch.eye(2)
    x = torch.tensor([[2.0, 1.5]])
    assert sae.encode(x).tolist() == [[2, 0]]
    assert sae.loss(x, x, State(gradient=torch.tensor([[0.0, -1.0]]))).fired.tolist() == [False, True]
    assert sae.loss(x, x, State()).fired.tolist() == [True, False]


def test_clt_by_hand():
    # Two layers of width 1, a latent each; the first writes to both outputs, the second to its own alone.
    sae = CLT(CLTConfig(d_in=2, d_sae=2, d_out=2, layers=2, k=2))
    sae.W_enc.data = torch.tensor([[2.0, 3.0]])
    sae.W_dec.data = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    assert sae.encode(x).tolist() == [[2, 3], [0, 3]]
    torch.testing.assert_close(sae.reconstruct(x), torch.tensor([[1.2, 4.6], [0.0, 3.0]]))
    sae.loss(x, torch.randn(2, 2), State()).total.backward()
    assert sae.W_dec.grad[1, 0] == 0  # a later latent learns nothing of an earlier output


def test_clt_chooses_the_same_latents_of_unscaled_rows():
    torch.manual_seed(0)
    sae = CLT(CLTConfig(d_in=8, d_sae=20, d_out=6, layers=2, k=4))
    sae.initialise(torch.randn(100, 8), seed=0)
    sae.initialise_output(torch.randn(100, 8), torch.randn(100, 6))
    x, reads, writes = torch.randn(50, 8), torch.tensor([0.3] * 4 + [4.0] * 4), torch.tensor([2.0] * 3 + [0.1] * 3)
    z, y_hat = sae.encode(x * reads), sae.reconstruct(x * reads) / writes
    sae.unscale_columns(reads, writes)
    assert torch.equal(sae.encode(x) != 0, z != 0)
    torch.testing.assert_close(sae.reconstruct(x), y_hat, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))
    assert not sae.W_dec[10:, :3].any()


def test_heads_of_a_latent_add_up():
    torch.manual_seed(0)
    sae = TopKSAE(TopKConfig(d_in=12, d_sae=7, k=2))
    for parameter in sae.requires_grad_(False).parameters():
        parameter.normal_()
    x = torch.randn(5, 12)
    each = head_attribution(sae, x, 3, heads=4)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(each.sum(dim=1) + sae.b_enc[3], pre[:, 3])
    torch.testing.assert_close(each[:, 1], (x - sae.b_dec)[:, 3:6] @ sae.W_enc[3:6, 3])
    shares = head_shares(sae, heads=4)
    assert shares[2, 3].item() == pytest.approx(
        float(sae.W_dec[2, 9:].norm() / sum(sae.W_dec[2, i : i + 3].norm() for i in (0, 3, 6, 9)))
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TranscoderConfig(d_in=4, d_out=0, d_sae=8, k=1), "d_out=0: expected at least 1"),
        (lambda: CrosscoderConfig(d_in=4, d_sae=8, k=1, widths=(2, 1)), "do not add up to d_in=4"),
        (lambda: CLTConfig(d_in=4, d_out=6, d_sae=7, k=1, layers=2), "expected multiples of layers=2"),
        (lambda: GSAEConfig(d_in=4, d_sae=8, k=1, beta=-1.0), "beta=-1.0: expected at least 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("architecture", ["transcoder", "gsae"])
def test_a_loss_gets_rows_without_gaps(architecture):
    # A GPU's kernels read whole rows; a slice of a row that holds more than x has gaps.
    plan = settings(architecture, matmul="float32")
    sae = REGISTRY[architecture].sae(plan.config(16))
    columns = 16 + (sae.d_out if architecture == "transcoder" else 16)
    stepper = Stepper(sae, plan, torch.ones(columns))
    for part in stepper._parts_of(torch.randn(8, columns)):
        assert part is None or part.is_contiguous()
