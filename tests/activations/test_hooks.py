"""TransformerLens' names mean the same tensors in every family of models, fused projections and post-norms included."""

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from activations.errors import InputError
from activations.hooks import final_norm_of, heads_of, hook_names, resolve
from activations.splice import follow, read, replace
from tests.tiny import tiny_model

# 2 layers of width 32, 4 heads of width 8 on 2 for keys and values (4 where the family has no groups).
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPS = {"num_key_value_heads": 2}
TINY: dict[str, dict[str, object]] = {
    **{
        family: SIZE | GROUPS | {"head_dim": 8}
        for family in "llama mistral ministral qwen2 qwen3 smollm3 gemma olmo helium arcee seed_oss".split()
    },
    **{family: SIZE | GROUPS | {"head_dim": 8} for family in "gemma2 gemma3_text olmo2 olmo3".split()},
    "gemma3": {
        "text_config": SIZE | GROUPS | {"head_dim": 8},
        "vision_config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        "image_token_index": 100,
    },
    "phi3": SIZE | GROUPS,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 101},
    "gpt_neox": SIZE,
    "gpt_neox sequential": SIZE | {"use_parallel_residual": False},
}
PARALLEL = "gpt_neox"
FAMILIES = list(TINY)
ONE_OF_EACH_LAYOUT = ["llama", "gemma2", "olmo2", "phi3", "gpt2", "gpt_neox", "gpt_neox sequential"]
IDS = torch.arange(1, 13).view(2, 6)


@pytest.fixture(scope="module")
def make():
    """family -> its tiny model in float64, weights large enough that every part matters; made once."""
    made: dict[str, nn.Module] = {}

    def build(family: str) -> nn.Module:
        if family not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.split()[0], **TINY[family]))
            for name, parameter in model.named_parameters():
                gain = re.search(r"(norm|ln_\w)\.weight$", name)
                nn.init.normal_(parameter, mean=1.0 if gain else 0.0, std=0.2)
            made[family] = model.double().eval().requires_grad_(False)
        return made[family]

    return build


def run(model: nn.Module, points: list[str], layer: int = 1) -> list[Tensor]:
    hooks = [f"blocks.{layer}.{point}" for point in points]
    with read(model, hooks) as got:
        model(input_ids=IDS)
    return [got[hook] for hook in hooks]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hook_that_is_listed_is_read(make, family):
    model = make(family)
    hooks = hook_names(model)
    with read(model, hooks) as got:
        model(input_ids=IDS)
    assert len(hooks) == 2 * (10 if family == PARALLEL else 11)
    assert list(got) == hooks  # and they are listed in the order of the forward pass
    assert all(x.shape[:2] == (2, 6) and x.dim() == 3 for x in got.values())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != PARALLEL])
def test_the_residual_stream_is_the_sum_of_its_parts(make, family):
    pre, attention, mid, mlp, post = run(
        make(family), ["hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"]
    )
    assert attention.abs().max() > 0.1
    assert mlp.abs().max() > 0.1
    torch.testing.assert_close(pre + attention, mid, atol=1e-12, rtol=0)
    torch.testing.assert_close(mid + mlp, post, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("family", "dropout"), [("phi3", {"resid_pdrop": 0.5}), ("gpt_neox sequential", {"hidden_dropout": 0.5})]
)
def test_the_parts_are_what_dropout_leaves_of_them(family, dropout):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.split()[0], **TINY[family], **dropout))
    model.double().train()
    pre, attention, mid, mlp, post = run(
        model, ["hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"]
    )
    assert 0.3 < (attention == 0).double().mean() < 0.7
    torch.testing.assert_close(pre + attention, mid, atol=1e-12, rtol=0)
    torch.testing.assert_close(mid + mlp, post, atol=1e-12, rtol=0)


def test_parallel_attention_has_no_middle_and_says_so(make):
    model = make(PARALLEL)
    pre, attention, mlp, post = run(model, ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"])
    torch.testing.assert_close(pre + attention + mlp, post, atol=1e-12, rtol=0)
    with pytest.raises(InputError, match=r"side by side.*one of hook_resid_pre, .*hook_resid_post") as caught:
        resolve(model, "blocks.0.hook_resid_mid")
    assert "hook_resid_mid" not in str(caught.value).split("one of")[1]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != PARALLEL])
def test_an_edit_at_resid_mid_changes_the_stream_and_not_only_the_mlp(make, family):
    model = make(family)
    with replace(model, "blocks.1.hook_resid_mid", lambda x, _: x * 0.0):
        mlp, post = run(model, ["hook_mlp_out", "hook_resid_post"])
    torch.testing.assert_close(post, mlp, atol=1e-12, rtol=0)  # nothing but the MLP's part is left
    # Whoever looked at the block's output before sees it too, and two edits add up.
    with (
        read(model, ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"]) as got,
        replace(model, "blocks.1.hook_resid_mid", lambda x, _: x * 0.0),
        replace(model, "blocks.1.hook_resid_mid", lambda x, _: x + 1.0),
    ):
        model(input_ids=IDS)
    torch.testing.assert_close(got["blocks.1.hook_resid_post"], got["blocks.1.hook_mlp_out"] + 1.0, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_attends_to_itself_so_its_z_is_its_v(make, family):
    model = make(family)
    v, z = run(model, ["attn.hook_v", "attn.hook_z"])
    n_v, n_z = heads_of(model, "blocks.1.attn.hook_v"), heads_of(model, "blocks.1.attn.hook_z")
    assert (n_v, n_z) == (4 if family.startswith("gpt") else 2, 4)
    v_of_heads = v[:, 0].unflatten(-1, (n_v, 8)).repeat_interleave(n_z // n_v, dim=1)
    torch.testing.assert_close(z[:, 0].unflatten(-1, (n_z, 8)), v_of_heads, atol=1e-12, rtol=0)


@pytest.mark.parametrize("point", ["attn.hook_q", "attn.hook_k"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_queries_or_keys_attention_is_uniform(make, family, point):
    model = make(family)
    with replace(model, f"blocks.1.{point}", lambda x, _: x * 0.0):
        v, z = run(model, ["attn.hook_v", "attn.hook_z"])
    mean = v.cumsum(dim=1) / torch.arange(1, 7)[:, None]
    heads = mean.unflatten(-1, (-1, 8)).repeat_interleave(z.shape[-1] // v.shape[-1], dim=2)
    torch.testing.assert_close(z, heads.flatten(2), atol=1e-6, rtol=0)  # gemma2's softmax is in float32
    assert not torch.allclose(run(model, ["attn.hook_z"])[0], z, atol=1e-3)  # it was not so before


def test_fused_projections_are_read_where_their_queries_keys_and_values_are(make):
    points = ["attn.hook_q", "attn.hook_k", "attn.hook_v"]
    gpt2 = make("gpt2")
    (pre,) = run(gpt2, ["hook_resid_pre"])
    fused = gpt2.transformer.h[1].attn.c_attn(gpt2.transformer.h[1].ln_1(pre))
    for i, x in enumerate(run(gpt2, points)):
        assert torch.equal(x, fused[..., 32 * i : 32 * (i + 1)])
    neox = make("gpt_neox")
    (pre,) = run(neox, ["hook_resid_pre"])
    fused = neox.gpt_neox.layers[1].attention.query_key_value(neox.gpt_neox.layers[1].input_layernorm(pre))
    for i, x in enumerate(run(neox, points)):  # queries, keys and values of head 0, then those of head 1 ...
        assert torch.equal(x, torch.cat([fused[..., 24 * h + 8 * i : 24 * h + 8 * i + 8] for h in range(4)], dim=-1))
    phi3 = make("phi3")
    (pre,) = run(phi3, ["hook_resid_pre"])
    fused = phi3.model.layers[1].self_attn.qkv_proj(phi3.model.layers[1].input_layernorm(pre))
    for x, expected in zip(run(phi3, points), fused.split([32, 16, 16], dim=-1), strict=True):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("family", ONE_OF_EACH_LAYOUT)
def test_a_number_takes_one_head_and_its_edit_leaves_the_others(make, family):
    model = make(family)
    for point in ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z"):
        hook = f"blocks.1.{point}"
        whole, head = run(model, [point, f"{point}.1"])
        assert torch.equal(head, whole[..., 8:16])
        assert heads_of(model, f"{hook}.1") is None
        with replace(model, f"{hook}.1", lambda x, _: x + 5.0):
            edited, z = run(model, [point, "attn.hook_z"])
        assert torch.equal(edited[..., 8:16], whole[..., 8:16] + 5.0)
        assert torch.equal(edited[..., :8], whole[..., :8])
        assert torch.equal(edited[..., 16:], whole[..., 16:])
        changed = (z != run(model, ["attn.hook_z"])[0]).unflatten(-1, (4, 8)).any(-1).any(0).any(0).tolist()
        if family == "olmo2" and point in ("attn.hook_q", "attn.hook_k"):
            assert all(changed)  # its norm of queries and keys is over all heads
            continue
        grouped = whole.shape[-1] == 16  # keys and values of two queries' heads each
        assert changed == ([False, False, True, True] if grouped else [False, True, False, False])


def loss_of(model: nn.Module) -> Tensor:
    weights = torch.randn(101, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (model(input_ids=IDS).logits.log_softmax(-1) @ weights).sum()


def followed(model: nn.Module) -> dict[str, Tensor]:
    """The loss' gradient at all hooks of block 0 and at head 1 of each that has heads, from one pass."""
    heads = [f"blocks.0.attn.hook_{name}.1" for name in "qkvz"]
    hooks = [*(hook for hook in hook_names(model) if hook.startswith("blocks.0.")), *heads]
    clean = loss_of(model)
    with follow(model, hooks) as got:
        loss = loss_of(model)
    assert torch.equal(loss, clean)
    gradients = torch.autograd.grad(loss, list(got.values()))
    assert set(got) == set(hooks)
    return dict(zip(got, gradients, strict=True))


@pytest.mark.parametrize("family", ONE_OF_EACH_LAYOUT)
def test_the_gradient_at_every_hook_is_that_of_what_is_added_there(make, family):
    model = make(family)
    for hook, gradient in followed(model).items():
        added = torch.zeros_like(gradient, requires_grad=True)
        with replace(model, hook, lambda x, _, added=added: x + added):
            (expected,) = torch.autograd.grad(loss_of(model), added)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9, msg=lambda text, hook=hook: hook + text)


def test_the_gradient_at_every_hook_is_the_slope_of_the_loss(make):
    model = make("gpt2")  # whose norms are in float64 here
    for hook, gradient in followed(model).items():
        way = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 1e-5
        with replace(model, hook, lambda x, _, way=way: x + way):
            up = float(loss_of(model))
        with replace(model, hook, lambda x, _, way=way: x - way):
            down = float(loss_of(model))
        assert float((gradient * way).sum()) == pytest.approx((up - down) / 2, rel=1e-5, abs=1e-11), hook


def test_heads_are_counted_where_rows_join_them():
    model = tiny_model()
    counts = {hook.removeprefix("blocks.0."): heads_of(model, hook) for hook in hook_names(model)[:11]}
    assert {point: n for point, n in counts.items() if n} == {
        "attn.hook_q": 4,
        "attn.hook_k": 2,
        "attn.hook_v": 2,
        "attn.hook_z": 4,
    }
    assert heads_of(model, "model.layers.0.self_attn.q_proj") is None
    with pytest.raises(InputError, match="No hook"):
        heads_of(model, "blocks.0.hook_banana")


def test_a_head_that_is_not_there_is_refused():
    model = tiny_model()
    with pytest.raises(InputError, match=r"attn.hook_k has 2 heads: expected a head from 0 to 1"):
        resolve(model, "blocks.0.attn.hook_k.2")
    with pytest.raises(InputError, match=r"hook_resid_pre has no heads"):
        resolve(model, "blocks.0.hook_resid_pre.0")
    with pytest.raises(InputError, match=r"No hook 'blocks.3.attn.hook_k'"):
        resolve(model, "blocks.3.attn.hook_k")


def test_a_model_without_its_head_has_the_same_hooks():
    whole = tiny_model()
    assert isinstance(whole, LlamaForCausalLM)
    hooks = hook_names(whole)
    assert hook_names(whole.model) == hooks
    assert final_norm_of(whole.model) is final_norm_of(whole) is whole.model.norm
    with read(whole, hooks) as ours, read(whole.model, hooks) as theirs:
        whole(input_ids=IDS)
    assert all(ours[hook] is theirs[hook] for hook in hooks)


def test_a_known_family_wrapped_in_something_else_has_module_paths_only():
    wrapped = nn.Sequential(tiny_model())
    wrapped.config = wrapped[0].config
    assert hook_names(wrapped) == []
    assert resolve(wrapped, "0.model.layers.1").block == 0
    with pytest.raises(InputError, match="expected a module path"):
        resolve(wrapped, "blocks.0.hook_resid_post")
