"""`steer` on the tiny model: what it changes, exactly, and what it leaves alone."""

import dataclasses

import pytest
import torch

from activations import InputError, Model
from activations.splice import read
from sae.base import SAE
from steering import Add, Clamp, ProjectOut, SteeringVector, ablate, steer

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])
HOOK = "blocks.1.hook_resid_post"
HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]


def rows_at(model: Model, hooks: list[str], ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    with read(model, hooks) as got:
        model(ids)
    return dict(got)


def n_hooks(model: Model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


def test_layers_before_the_hook_are_bit_equal_and_later_ones_change(tiny, vector):
    base = rows_at(tiny, HOOKS)
    with steer(tiny, vector):
        steered = rows_at(tiny, HOOKS)
    assert torch.equal(steered[HOOKS[0]], base[HOOKS[0]])
    assert not torch.allclose(steered[HOOKS[2]], base[HOOKS[2]], atol=0.1)


def test_at_the_hook_x_becomes_exactly_x_plus_v(tiny, vector):
    base = rows_at(tiny, [HOOK])[HOOK]
    with steer(tiny, vector, strength=1.5):
        steered = rows_at(tiny, [HOOK])[HOOK]
    assert torch.equal(steered[:, 1:], base[:, 1:] + 1.5 * vector.direction)
    assert torch.equal(steered[:, 0], base[:, 0])


def test_strength_0_is_bit_exact_and_puts_no_hook(tiny, vector):
    before = n_hooks(tiny)
    base = tiny(IDS)
    with steer(tiny, [vector, ProjectOut(vector)], strength=0.0):
        assert n_hooks(tiny) == before
        assert torch.equal(tiny(IDS), base)


def test_afterwards_the_model_is_as_it_was_also_when_the_block_fails(tiny, vector):
    before, base = n_hooks(tiny), tiny(IDS)
    inside = []

    def fail() -> None:
        with steer(tiny, vector):
            inside.append(n_hooks(tiny))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert inside[0] > before
    assert n_hooks(tiny) == before
    assert torch.equal(tiny(IDS), base)


def test_afterwards_the_model_is_as_it_was_also_when_setting_up_fails(tiny, vector, make_vector):
    before = n_hooks(tiny)
    wrong = make_vector(2, hook="blocks.9.hook_resid_post")
    with pytest.raises(InputError, match=r"blocks\.9"), steer(tiny, [vector, wrong]):
        pass
    assert n_hooks(tiny) == before


def test_afterwards_the_model_is_as_it_was_also_when_the_forward_pass_fails(tiny, make_vector):
    before, base = n_hooks(tiny), tiny(IDS)
    with pytest.raises(InputError, match="width 31"), steer(tiny, make_vector(1, d=31)):
        tiny(IDS)
    assert n_hooks(tiny) == before
    assert torch.equal(tiny(IDS), base)


def test_every_row_of_a_batch_is_edited_alike(tiny, vector):
    ids = torch.cat([IDS, IDS, IDS])
    with steer(tiny, vector):
        logits = tiny(ids)
    assert torch.allclose(logits[0], logits[1])
    assert torch.allclose(logits[0], logits[2])


def test_a_left_padded_row_is_steered_as_when_it_is_alone(tiny, vector, basis):
    long, short = IDS, IDS[:, :4]
    pad = torch.full((1, 3), tiny.tokenizer.pad_token_id)
    batch = torch.cat([long, torch.cat([pad, short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    with steer(tiny, [vector, Clamp(basis, 3, 2.0)]), torch.inference_mode():
        together = tiny.hf(input_ids=batch, attention_mask=mask).logits
        alone = [tiny(long)[0], tiny(short)[0]]
    assert torch.allclose(together[0], alone[0], atol=1e-4)
    assert torch.allclose(together[1, 3:], alone[1], atol=1e-4)


def test_padding_is_not_edited(tiny, vector):
    mask = torch.ones_like(IDS)
    mask[:, :2] = 0
    with torch.inference_mode():
        with read(tiny, [HOOK]) as got:
            tiny.hf(input_ids=IDS, attention_mask=mask)
        base = got[HOOK]
        with steer(tiny, vector), read(tiny, [HOOK]) as got:
            tiny.hf(input_ids=IDS, attention_mask=mask)
    changed = (got[HOOK] != base).any(dim=-1)[0]
    assert changed.tolist() == [False, False, False, True, True, True, True]  # two of padding, then position 0


@torch.inference_mode()
def greedy_without_cache(model: Model, ids: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = []
    for _ in range(n):
        logits.append(model(ids)[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids, torch.stack(logits, dim=1)


@torch.inference_mode()
def greedy_with_cache(model: Model, ids: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.hf.generate(
        ids,
        attention_mask=(ids != 62).long(),
        max_new_tokens=n,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=62,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


def test_generation_with_a_cache_equals_forward_passes_without(tiny, vector, basis, make_vector):
    edits = [vector, Clamp(basis, 3, 2.0), ProjectOut(make_vector(4))]
    with steer(tiny, edits):
        slow, slow_logits = greedy_without_cache(tiny, IDS, 12)
        fast, fast_logits = greedy_with_cache(tiny, IDS, 12)
    plain, _ = greedy_without_cache(tiny, IDS, 12)
    assert torch.equal(fast, slow)
    assert torch.allclose(fast_logits, slow_logits, atol=1e-4)
    assert not torch.equal(slow, plain)  # else the edits were too weak to prove anything


def test_left_padded_generation_equals_that_of_each_row_alone(tiny, vector):
    pad = torch.full((1, 3), 62)
    batch = torch.cat([IDS, torch.cat([pad, IDS[:, :4]], dim=1)])
    with steer(tiny, vector):
        together, logits = greedy_with_cache(tiny, batch, 8)
        alone, alone_logits = greedy_with_cache(tiny, IDS[:, :4], 8)
    assert together[1, 7:].tolist() == alone[0, 4:].tolist()
    assert torch.allclose(logits[1], alone_logits[0], atol=1e-4)


def test_position_0_is_never_edited_also_when_a_cache_makes_later_tokens_arrive_alone(tiny, vector):
    seen: list[torch.Tensor] = []
    tap = tiny.hf.model.layers[1]
    with steer(tiny, vector):
        handle = tap.register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
        try:
            out = tiny.generate(IDS, max_new_tokens=4)
        finally:
            handle.remove()
    base = rows_at(tiny, [HOOK], out[:, :-1])[HOOK]
    assert [x.shape[1] for x in seen] == [7, 1, 1, 1]
    steered = torch.cat(seen, dim=1)
    assert torch.allclose(steered[:, 0], base[:, 0], atol=1e-5)
    # Later rows: v was added once to each (before the hook, layers see no edit, so the base row is the same).
    assert torch.allclose(steered[:, 1:] - base[:, 1:], vector.direction.expand(1, 9, -1), atol=1e-4)


def test_sinks_are_not_edited(tiny, vector):
    norms = rows_at(tiny, [HOOK])[HOOK].norm(dim=-1)[0]
    place = int(norms[1:].argmax()) + 1
    knows = dataclasses.replace(vector, sink_threshold=float(norms[place]) - 1e-3)
    base = rows_at(tiny, [HOOK])[HOOK]
    with steer(tiny, knows):
        changed = (rows_at(tiny, [HOOK])[HOOK] != base).any(dim=-1)[0]
    assert changed.tolist() == [i not in (0, place) for i in range(7)]


def test_a_sink_is_judged_before_the_first_edit(tiny, vector, make_vector):
    """A strong first edit makes long rows; they are no sinks, so the second edit still applies."""
    largest = float(rows_at(tiny, [HOOK])[HOOK].norm(dim=-1).max())
    first = dataclasses.replace(vector, coefficient=100.0, sink_threshold=largest + 1)
    second = make_vector(7, sink_threshold=largest + 1)
    base = rows_at(tiny, [HOOK])[HOOK]
    with steer(tiny, [first, second]):
        steered = rows_at(tiny, [HOOK])[HOOK]
    assert torch.equal(steered[:, 1:], base[:, 1:] + first.raw + second.raw)


def test_edits_of_one_hook_apply_in_order(tiny, vector):
    base = rows_at(tiny, [HOOK])[HOOK][:, 1:]
    unit = vector.direction / vector.direction.norm()
    with steer(tiny, [vector, ProjectOut(vector)]):
        removed = rows_at(tiny, [HOOK])[HOOK][:, 1:]
    with steer(tiny, [ProjectOut(vector), vector]):
        kept = rows_at(tiny, [HOOK])[HOOK][:, 1:]
    orthogonal = base - (base @ unit)[..., None] * unit
    assert torch.allclose(removed, orthogonal, atol=1e-4)
    assert torch.allclose(kept, orthogonal + vector.direction, atol=1e-4)


def test_edits_of_several_hooks_each_use_their_own_vector(tiny, make_vector):
    """A closure in a loop would give all hooks the last vector."""
    vectors = [make_vector(i, hook=hook) for i, hook in enumerate(HOOKS[:3])]
    with steer(tiny, vectors):
        together = rows_at(tiny, [HOOKS[0]])[HOOKS[0]]
        logits = tiny(IDS)
    with steer(tiny, vectors[0]), steer(tiny, vectors[1]), steer(tiny, vectors[2]):
        nested = tiny(IDS)
    assert torch.equal(logits, nested)
    assert torch.equal(together[:, 1:], rows_at(tiny, [HOOKS[0]])[HOOKS[0]][:, 1:] + vectors[0].direction)


@pytest.mark.parametrize("value", [0.0, 0.5, 3.0, -2.0])
def test_clamping_sets_the_latent_and_keeps_the_others(tiny, signed_basis, value):
    before = signed_basis.encode(rows_at(tiny, [HOOK])[HOOK][0, 1:])
    with steer(tiny, Clamp(signed_basis, 9, value)):
        after = signed_basis.encode(rows_at(tiny, [HOOK])[HOOK][0, 1:])
    unit = 0.9 if value > 0 else 1.5  # the pole's own magnitude
    assert torch.allclose(after[:, 9], torch.tensor(value * unit), atol=1e-4)
    others = torch.arange(32) != 9
    assert torch.allclose(after[:, others], before[:, others], atol=1e-4)


def test_clamping_a_latent_that_fires_sets_it_in_a_one_sided_dictionary_too(tiny, basis):
    before = basis.encode(rows_at(tiny, [HOOK])[HOOK][0, 1:])[:, 9]
    with steer(tiny, Clamp(basis, 9, 3.0)):
        after = basis.encode(rows_at(tiny, [HOOK])[HOOK][0, 1:])[:, 9]
    fired = before > 0
    assert 0 < fired.sum() < len(fired)
    assert torch.allclose(after[fired], torch.tensor(2.7), atol=1e-4)
    assert (after[~fired] < 2.7).all()  # their pre-activation lay below 0, and still weighs


def test_clamping_keeps_what_the_dictionary_does_not_explain(tiny, basis: SAE):
    """Only latent 9 may move: the negative parts, which this dictionary cannot write, stay."""
    base = rows_at(tiny, [HOOK])[HOOK][0, 1:]
    with steer(tiny, ablate(basis, 9), strength=7.0):
        ablated = rows_at(tiny, [HOOK])[HOOK][0, 1:]
    expected = base - basis.encode(base)[:, 9:10] * basis.W_dec[9]
    assert torch.allclose(ablated, expected, atol=1e-5)
    assert not torch.allclose(basis.reconstruct(base), base, atol=0.1)


def test_the_dtype_of_the_model_is_kept_and_rounding_happens_once(tiny, vector, basis, make_vector):
    import copy

    half = Model("tiny", "random-0", copy.deepcopy(tiny.hf).to(torch.bfloat16), tiny.tokenizer)
    base = rows_at(half, [HOOK])[HOOK]
    with steer(half, [vector, make_vector(8)]):
        steered = rows_at(half, [HOOK])[HOOK]
    assert steered.dtype == torch.bfloat16
    assert torch.equal(steered[:, 1:], (base[:, 1:].float() + vector.raw + make_vector(8).raw).bfloat16())
    with steer(half, [Clamp(basis, 3, 1.0), ProjectOut(vector)]):
        assert half(IDS).dtype == torch.bfloat16


def test_a_bare_transformers_model_gives_the_same_steered_logits(tiny, vector):
    with steer(tiny, vector):
        ours = tiny(IDS)
    with steer(tiny.hf, vector), torch.inference_mode():
        theirs = tiny.hf(IDS).logits
    assert torch.equal(ours, theirs)


def test_gradients_flow_through_an_edit_after_a_pass_without_them(tiny, vector, make_vector):
    embeds = tiny.hf.get_input_embeddings()(IDS).detach()
    with steer(tiny, [vector, ProjectOut(make_vector(4))]):
        tiny(IDS)
        leaf = embeds.clone().requires_grad_()
        tiny.hf(inputs_embeds=leaf, use_cache=False).logits.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(tiny, vector, strength):
    with pytest.raises(InputError, match="strength"), steer(tiny, vector, strength=strength):
        pass


def test_a_hook_that_is_not_there_is_refused_at_strength_0_too(tiny, make_vector):
    wrong = make_vector(2, hook="blocks.9.hook_resid_post")
    with pytest.raises(InputError, match=r"blocks\.9"), steer(tiny, wrong, strength=0.0):
        pass


def test_errors_are_one_line(tiny, basis, make_vector):
    causes = []
    for make in (
        lambda: Clamp(basis, 32, 1.0),
        lambda: Clamp(basis, -1, 1.0),
        lambda: Clamp(basis, 0, 1.0),  # never fired
        lambda: Clamp(basis, 1, float("nan")),
        lambda: SteeringVector.from_latent(basis, 99),
        lambda: steer(tiny, make_vector(1, hook="blocks.1.hook_nothing")).__enter__(),
    ):
        with pytest.raises(InputError) as caught:
            make()
        causes.append(str(caught.value))
    assert all("\n" not in cause and len(cause) < 300 for cause in causes)
    assert "expected 0 to 31" in causes[0]
    assert "never fired in 1,000 tokens" in causes[2]


def test_steering_twice_at_once_adds_up(tiny, vector):
    with steer(tiny, Add(vector)), steer(tiny, Add(vector)):
        twice = tiny(IDS)
    with steer(tiny, vector, strength=2.0):
        assert torch.allclose(tiny(IDS), twice, atol=1e-4)
