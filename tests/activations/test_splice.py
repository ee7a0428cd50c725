"""Hooks are read and replaced where they should be, with absolute positions, and always undone."""

import pytest
import torch
from torch import nn

from activations.errors import InputError
from activations.hooks import hook_names, resolve
from activations.splice import Where, read, replace
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
