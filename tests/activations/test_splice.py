"""Hooks are read, replaced and followed where they should be, with absolute positions, and always undone."""

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from activations.errors import InputError
from activations.hooks import heads_of, hook_names, resolve
from activations.splice import Where, _first, follow, read, replace
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def hf() -> nn.Module:
    return tiny_model()


IDS = torch.arange(1, 13).view(2, 6)


def n_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_residual_hooks_are_transformers_hidden_states(hf):
    with read(hf, ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]) as got:
        out = hf(input_ids=IDS, output_hidden_states=True)
    assert torch.equal(got["blocks.1.hook_resid_pre"], out.hidden_states[1])
    assert torch.equal(got["blocks.1.hook_resid_post"], out.hidden_states[2])


def test_residual_post_is_the_sum_of_its_parts(hf):
    hooks = [f"blocks.1.{point}" for point in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")]
    with read(hf, hooks) as got:
        hf(input_ids=IDS)
    pre, attention, mlp, post = (got[hook] for hook in hooks)
    torch.testing.assert_close(pre + attention + mlp, post)


def test_stop_ends_the_pass_after_the_last_hook(hf):
    late: list[int] = []
    handle = hf.model.layers[2].register_forward_hook(lambda *_: late.append(1))
    with read(hf, ["blocks.0.attn.hook_z", "blocks.1.hook_resid_post"], stop=True) as got:
        assert hf(input_ids=IDS) is None
        assert set(got) == {"blocks.0.attn.hook_z", "blocks.1.hook_resid_post"}
    handle.remove()
    assert not late
    assert hf(input_ids=IDS).logits.shape == (2, 6, 101)  # and the model is whole again


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_head=4, n_layer=3, n_positions=64, vocab_size=101, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def started(model: nn.Module, hooks: Sequence[str]) -> list[str]:
    """The modules that a pass starts, in order, when it stops at the last of `hooks`."""
    names: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, module in model.named_modules()
    ]
    with read(model, hooks, stop=True) as got:
        assert model(input_ids=IDS) is None
        assert set(got) == set(hooks)
    for handle in handles:
        handle.remove()
    return names


@pytest.mark.parametrize(
    ("hooks", "last"),
    [
        (["blocks.1.attn.hook_v", "blocks.0.hook_resid_pre", "blocks.1.attn.hook_k"], "layers.1.self_attn.v_proj"),
        (["blocks.1.attn.hook_z.3", "blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"], "layers.1.self_attn.o_proj"),
        (["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"], "layers.1"),  # the same tensor
        (["blocks.0.hook_resid_post", "blocks.0.hook_resid_pre"], "layers.0.mlp.down_proj"),  # nothing of layer 1
        (["blocks.1.hook_resid_mid", "blocks.1.attn.hook_q"], "layers.1.post_attention_layernorm"),
        (["blocks.1.hook_attn_out", "model.layers.1.self_attn"], "layers.1.self_attn.o_proj"),  # the same module
    ],
)
def test_stop_ends_the_pass_right_after_the_last_hook_whatever_the_order(hf, hooks, last):
    assert started(hf, hooks)[-1] == f"model.{last}"
    assert started(hf, hooks[::-1])[-1] == f"model.{last}"


def test_stop_ends_the_pass_after_a_fused_projection_gave_its_queries_and_values():
    hooks = ["blocks.1.attn.hook_v", "blocks.1.attn.hook_q"]
    assert started(gpt2(), hooks)[-1] == "transformer.h.1.attn.c_attn"


def test_stopping_blocks_nest(hf):
    with read(hf, ["blocks.2.hook_resid_post"], stop=True) as late:
        with read(hf, ["blocks.0.hook_resid_post"], stop=True):
            assert hf(input_ids=IDS) is None
        assert hf(input_ids=IDS) is None
        assert set(late) == {"blocks.2.hook_resid_post"}
    assert "forward" not in vars(hf)
    assert hf(input_ids=IDS).logits.shape == (2, 6, 101)


def test_replace_changes_what_comes_after_and_nothing_before(hf):
    hooks = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    with read(hf, hooks) as clean:
        hf(input_ids=IDS)
    clean = dict(clean)
    with replace(hf, "blocks.1.hook_resid_post", lambda x, _: x + 1.0), read(hf, hooks) as got:
        hf(input_ids=IDS)
    assert torch.equal(clean[hooks[0]], got[hooks[0]])
    assert not torch.allclose(clean[hooks[1]], got[hooks[1]])


def test_hooks_are_gone_after_the_block_even_when_it_fails(hf):
    before = n_hooks(hf)
    with pytest.raises(RuntimeError, match="on purpose"), replace(hf, "blocks.1.hook_mlp_out", lambda x, _: x):
        raise RuntimeError("on purpose")
    with pytest.raises(InputError), read(hf, ["blocks.0.hook_resid_post", "blocks.9.hook_resid_post"]):
        pass
    assert n_hooks(hf) == before
    assert "forward" not in vars(hf)


def test_following_leaves_no_hook_and_no_gradient_on_parameters(hf):
    before = n_hooks(hf)
    with follow(hf, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid"]) as got:
        loss = hf(input_ids=IDS).logits.logsumexp(-1).sum()
    assert n_hooks(hf) == before
    loss.backward()
    assert all(parameter.grad is None for parameter in hf.parameters())
    assert got["blocks.0.hook_resid_post"].grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="on purpose"), follow(hf, ["blocks.1.hook_resid_mid"]):
        raise RuntimeError("on purpose")
    assert n_hooks(hf) == before
    assert not hf(input_ids=IDS).logits.requires_grad


def test_following_a_model_in_training_gives_the_same_gradients():
    hooks = ["blocks.2.attn.hook_v.1", "blocks.0.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_in"]
    found = []
    for trained in (False, True):
        model = tiny_model().double().requires_grad_(trained)
        with follow(model, hooks) as got:
            loss = model(input_ids=IDS).logits.logsumexp(-1).sum()
        assert list(got) == [hooks[1], hooks[2], hooks[3], hooks[0]]  # the order of the pass
        found.append(torch.autograd.grad(loss, list(got.values())))
    for frozen, trained in zip(*found, strict=True):
        assert frozen.abs().max() > 1e-6
        torch.testing.assert_close(frozen, trained, rtol=1e-9, atol=1e-12)


def test_following_without_gradients_says_what_to_call(hf):
    for off in (torch.no_grad, torch.inference_mode):
        with follow(hf, ["blocks.1.hook_resid_post"]), pytest.raises(InputError, match=r"call model\.hf"), off():
            hf(input_ids=IDS)


def test_positions_count_the_cache_and_the_padding(hf):
    seen: list[list[list[int]]] = []

    def note(x: torch.Tensor, where: Where) -> torch.Tensor:
        seen.append(where.positions.tolist())
        return x

    ids = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with replace(hf, "blocks.1.hook_resid_post", note):
        hf.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert seen == [[[-1, -1, 0, 1], [0, 1, 2, 3]], [[2], [4]], [[3], [5]]]


def test_an_unknown_hook_says_what_there_is(hf):
    with pytest.raises(InputError, match=r"expected blocks.0 to blocks.2 and one of hook_resid_pre"):
        resolve(hf, "blocks.1.hook_banana")


def test_any_module_path_of_any_module_is_a_hook():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert hook_names(net) == []
    with read(net, ["1"]) as got:
        net(torch.ones(5, 3))
    assert got["1"].shape == (5, 4)
    assert (got["1"] >= 0).all()


def edited(module: nn.Module, hook: str, **inputs: Tensor) -> tuple[Tensor, Where]:
    """What `module` returns (its first tensor) with the sign turned at `hook`, and what the edit was told."""
    seen: list[Where] = []

    def edit(x: Tensor, where: Where) -> Tensor:
        seen.append(where)
        return -x

    with replace(module, hook, edit):
        out = module(**inputs)
    return (out if isinstance(out, Tensor) else out[0]), seen[0]


def test_a_vision_transformer_is_read_replaced_and_followed():
    torch.manual_seed(0)
    vit = ViTModel(
        ViTConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
    )
    vit.eval().requires_grad_(False)
    pixels = torch.randn(3, 3, 8, 8)
    with read(vit, ["layers.0", "layers.1", "pooler", "embeddings.patch_embeddings.projection"], stop=True) as got:
        vit(pixel_values=pixels)
    assert {hook: tuple(x.shape) for hook, x in got.items()} == {
        "embeddings.patch_embeddings.projection": (3, 16, 2, 2),
        "layers.0": (3, 5, 16),
        "layers.1": (3, 5, 16),
        "pooler": (3, 16),
    }
    # Masks are of patches or of anything else: positions count from 0 whatever they say.
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 3)
    out, where = edited(vit, "layers.1", pixel_values=pixels)
    torch.testing.assert_close(out, vit.layernorm(-got["layers.1"]))
    masked = edited(vit, "layers.1", pixel_values=pixels, attention_mask=mask)[1]
    assert where.positions.tolist() == masked.positions.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert where.ids is None
    assert edited(vit, "pooler", pixel_values=pixels)[1].positions.tolist() == [0, 0, 0]
    assert edited(vit, "embeddings.patch_embeddings.projection", pixel_values=pixels)[1].positions.tolist() == [0, 0, 0]
    with follow(vit, ["layers.1", "layers.0"]) as got:
        loss = vit(pixel_values=pixels).last_hidden_state[:, 0].sum(-1).square().sum()
    gradients = dict(zip(got, torch.autograd.grad(loss, list(got.values())), strict=True))
    assert (gradients["layers.1"][:, 1:] == 0).all()  # after the last block no patch but the first counts
    assert gradients["layers.0"][:, 1:].abs().max() > 0


def test_an_embedding_model_is_read_replaced_and_followed():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=101
    )
    bert = BertModel(config).eval().requires_grad_(False)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    hooks = ["encoder.layer.0", "encoder.layer.1.attention", "pooler", ""]  # a tensor, a tuple, (batch, d), the model
    with read(bert, hooks) as got:
        out = bert(input_ids=IDS, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(got["encoder.layer.0"], out.hidden_states[1])
    assert got["encoder.layer.1.attention"].shape == (2, 6, 16)
    assert torch.equal(got["pooler"], out.pooler_output)
    assert torch.equal(got[""], out.last_hidden_state)
    for hook in hooks[:2] + [""]:
        new, where = edited(bert, hook, input_ids=IDS, attention_mask=mask)
        assert where.positions.tolist() == [[0, 1, 2, 3, -1, -1], [0, 1, 2, 3, 4, 5]]
        assert torch.equal(where.ids, IDS)
        assert (new - out.last_hidden_state).abs().max() > 0.1
    assert torch.equal(new, -out.last_hidden_state)
    where = edited(bert, "pooler", input_ids=IDS, attention_mask=mask)[1]
    assert where.positions.tolist() == [0, 0]
    assert where.ids is None
    with follow(bert, ["encoder.layer.0", "encoder.layer.1.attention"]) as got:
        loss = bert(input_ids=IDS).pooler_output.sum()
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(loss, list(got.values())))


def test_a_convolutional_net_that_works_in_place_is_seen_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 9, 2))
    net.requires_grad_(False)
    image = torch.randn(2, 3, 5, 5)
    with read(net, ["0", "3"]) as got:
        clean = net(image)
    assert torch.equal(got["0"], net[0](image))  # below 0 too, although the ReLU wrote over it
    assert got["3"].shape == (2, 2)
    with replace(net, "0", lambda x, where: x * 0.0 + where.positions[:, None, None, None]):
        assert torch.equal(net(image), net[3].bias.expand(2, -1))
    with follow(net, ["0"]) as got:
        out = net(image)
    assert torch.equal(out, clean)
    (gradient,) = torch.autograd.grad(out[0, 0], list(got.values()))
    by_hand = net[3].weight[0].view(4, 3, 3) * (got["0"][0] > 0)
    torch.testing.assert_close(gradient[0], by_hand)
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize("hook", ["layers.0", "layers.0.self_attn", "layers.0.linear1"])
def test_a_torch_encoder_is_read_replaced_and_followed(hook):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().requires_grad_(False)
    x = torch.randn(2, 5, 16)
    clean = encoder(x)
    with read(encoder, [hook]) as got:
        encoder(x)
    assert got[hook].shape == (2, 5, 32 if hook == "layers.0.linear1" else 16)
    new, where = edited(encoder, hook, src=x)
    assert where.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert where.ids is None
    assert not torch.allclose(new, clean, atol=1e-3)
    with follow(encoder, [hook]) as got:
        loss = encoder(x).square().sum()
    torch.testing.assert_close(loss, clean.square().sum())
    (gradient,) = torch.autograd.grad(loss, list(got.values()))
    assert gradient.abs().max() > 0


Pair = namedtuple("Pair", ["note", "x"])


@dataclass(frozen=True)
class Result:
    note: str
    x: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (None, x, x * 2),
        lambda x: [x, x * 2],
        lambda x: Pair("note", x),
        lambda x: {"note": "note", "x": x, "y": x * 2},
        lambda x: Result("note", x),
        lambda x: BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x * 2),
    ],
)
def test_the_first_tensor_of_an_output_is_meant_and_the_rest_stays(wrap):
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> object:
            self.made = wrap(x)
            return self.made

    inner = Inner()
    x = torch.ones(1, 2, 3)
    with read(inner, [""]) as got:
        plain = inner(x)
    assert torch.equal(got[""], x)
    with replace(inner, "", lambda x, _: x + 1.0):
        new = inner(x)
    assert type(new) is type(plain)
    assert _first(new).tolist() == (x + 1.0).tolist()
    assert _first(inner.made).tolist() == x.tolist()  # the module's own is not written to
    rest, kept = (str(output).replace(str(_first(output)), "", 1) for output in (new, plain))
    assert rest == kept


def test_an_output_without_a_tensor_is_refused_in_one_line():
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> dict[str, int]:
            return {"shape": len(x)}

    module = Nothing()
    with read(module, [""]), pytest.raises(InputError, match="dict without a tensor"):
        module(torch.ones(1))


def test_a_plain_module_called_with_ids_knows_them():
    net = nn.Sequential(nn.Embedding(101, 4), nn.Linear(4, 3))
    seen: list[Where] = []
    with replace(net, "1", lambda x, where: seen.append(where) or x):
        net(IDS)
        net[1](torch.ones(2, 9, 4))  # by itself: not the tokens of the call before
    assert torch.equal(seen[0].ids, IDS)
    assert seen[0].positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert seen[1].ids is None
    assert seen[1].positions.tolist() == [list(range(9))] * 2


def test_a_module_called_with_anything_but_ids_has_none():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    bags = nn.Sequential(nn.Embedding(101, 4), nn.Flatten(2), nn.Linear(12, 3))  # three words a place
    sound = nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Linear(1, 4), nn.Linear(4, 3))
    seen: list[Where] = []
    with replace(net, "1", lambda x, where: seen.append(where) or x):
        net(torch.ones(2, 6, 3))
        net(torch.ones(2, 3))
    with replace(bags, "2", lambda x, where: seen.append(where) or x):
        bags(torch.ones(2, 6, 3, dtype=torch.long))
    with replace(sound, "2", lambda x, where: seen.append(where) or x):
        sound(torch.ones(2, 6))
    assert [where.ids for where in seen] == [None] * 4
    assert [tuple(where.positions.shape) for where in seen] == [(2, 6), (2,), (2, 6), (2, 6)]


def test_the_real_model_has_transformerlens_values_at_every_hook(model):
    ids = model.encode("In 2024, the capital of France was Paris.")
    hooks = [f"blocks.{layer}.{hook.split('.', 2)[2]}" for layer in (0, 12, 29) for hook in model.hooks()[:11]]
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(ids)
    with torch.no_grad(), read(model, hooks) as got, read(model.bridge, hooks) as through_the_bridge:
        model.hf(input_ids=ids)
        model.bridge(ids)
    for hook in hooks:
        # What TransformerLens calls hook_mlp_in is something else: see activations/hooks.py.
        theirs = cache[hook.replace("hook_mlp_in", "mlp.hook_in")]
        if (heads := heads_of(model.hf, hook)) is not None:
            assert theirs.shape[2] == heads
            theirs = theirs.flatten(2)
        for ours in (got[hook], through_the_bridge[hook]):
            assert ((ours - theirs).norm() / theirs.norm()) < 1e-4, hook
            assert (((ours - theirs).norm(dim=-1)) / theirs.norm(dim=-1)).median() < 1e-4, hook


def test_the_real_model_agrees_with_transformers_and_with_transformerlens(model):
    from transformers import AutoModelForCausalLM

    ids = model.encode("In 2024, the capital of France was Paris.")
    logits = model(ids)
    plain = AutoModelForCausalLM.from_pretrained(model.hf.config._name_or_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, logits)
        torch.testing.assert_close(model.bridge(ids), logits, atol=3e-4, rtol=0)
        _, cache = model.bridge.run_with_cache(ids, names_filter="blocks.15.hook_resid_post")
    with read(model, ["blocks.15.hook_resid_post"], stop=True) as got:
        model.hf(input_ids=ids)
    theirs = cache["blocks.15.hook_resid_post"]
    ours = got["blocks.15.hook_resid_post"]
    assert ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max() < 1e-5
    assert ours[0, 0].norm() > 10_000  # the attention sink at position 0, which this model has from layer 11 on
