"""What every registered architecture must do. A new architecture is covered by being in the registry."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from sae import load_sae
from sae.base import SAE, Config, Dead, FittedSAE, State
from sae.files import save_sae
from sae.optimizer import Optimizer
from sae.registry import REGISTRY
from tests.tiny import planted_rows

D_IN, D_SAE = 24, 40
OF_HOOKS = {"d_out": 20, "layers": 2, "widths": (14, 10)}
"""Fields that follow from what a dictionary reads and predicts."""


def config(name: str, **changes) -> Config:
    entry = REGISTRY[name]
    fields = {field.name for field in dataclasses.fields(entry.config)}
    of_hooks = {name: value for name, value in OF_HOOKS.items() if name in fields}
    return entry.config(**{"d_in": D_IN, "d_sae": D_SAE, entry.sparsity: 5, **of_hooks, **changes})


def target_of(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """What a dictionary is trained to give: x itself, or of those that predict something else, a linear map of x."""
    if sae.target == "x":
        return x
    mixing = torch.randn(D_IN, sae.d_out, generator=torch.Generator().manual_seed(7))
    return x @ mixing / D_IN**0.5


def state(n_dead: int = 0) -> State:
    if not n_dead:
        return State()
    return State(dead=Dead(torch.arange(n_dead), torch.ones(n_dead, dtype=torch.bool), torch.tensor(float(n_dead))))


@pytest.fixture(params=list(REGISTRY))
def sae(request) -> SAE:
    rows, _ = planted_rows(512, D_IN, D_SAE, 4, signed=True)
    made = REGISTRY[request.param].sae(config(request.param))
    made.initialise(rows, seed=0)
    if isinstance(made, FittedSAE):
        made.fit_batch(rows, torch.zeros(len(rows), 2, dtype=torch.long))
        made = made.fitted()
        assert made.d_sae == D_SAE
    if made.target != "x":
        made.initialise_output(rows, target_of(made, rows))
    return made


@pytest.fixture
def x() -> torch.Tensor:
    return planted_rows(64, D_IN, D_SAE, 4, signed=True, seed=1)[0]


def test_a_row_does_not_depend_on_its_neighbours(sae, x):
    alone = torch.cat([sae.encode(row[None]) for row in x])
    torch.testing.assert_close(sae.encode(x), alone, atol=1e-5, rtol=1e-5)


def test_sparse_and_dense_codes_agree(sae, x):
    values, indices = sae.encode_sparse(x)
    assert values.dtype == torch.float32
    assert indices.dtype == torch.long
    z = torch.zeros(len(x), D_SAE)
    for n in range(len(x)):
        for value, i in zip(values[n], indices[n], strict=True):
            z[n, i] += value
    torch.testing.assert_close(sae.encode(x), z)
    torch.testing.assert_close(sae.decode(z, x), sae.reconstruct(x), atol=1e-5, rtol=1e-5)


def test_only_signed_architectures_have_negative_latents(sae, x):
    assert bool((sae.encode(x) < 0).any()) == sae.signed


def test_loss_and_gradients_are_finite_with_and_without_dead_latents(sae, x):
    for n_dead in (0, 15, D_SAE):
        sae.zero_grad()
        loss = sae.loss(x, target_of(sae, x), state(n_dead))
        if not isinstance(sae, FittedSAE):
            loss.total.backward()
        assert torch.isfinite(loss.total)
        assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)
        assert loss.fired.dtype == torch.bool
        assert torch.equal(loss.fired, (sae.encode(x) != 0).any(dim=0))


def test_training_lowers_the_loss_and_keeps_rows_at_norm_one(sae, x):
    if isinstance(sae, FittedSAE):
        pytest.skip("fitted, not trained")
    optimizer = Optimizer(sae, betas=(0.9, 0.999), clip=1.0, matmul=torch.float32)
    optimizer.set_lr(3e-3)
    first = last = float("nan")
    for step in range(60):
        loss = sae.loss(x, target_of(sae, x), state())
        first, last = (loss.terms["fvu"].item() if step == 0 else first), loss.terms["fvu"].item()
        loss.total.backward()
        optimizer.step()
        sae.after_step(state())
    assert last < 0.7 * first
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_unscaling_gives_the_same_dictionary_of_unscaled_rows(sae, x):
    with torch.no_grad():
        for name in sae.biases:
            bias = getattr(sae, name)
            bias += 0.1 * torch.rand(bias.shape)
        z, x_hat = sae.encode(3.0 * x), sae.reconstruct(3.0 * x)
    sae.unscale(3.0)
    torch.testing.assert_close(sae.encode(x) * 3.0, z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.reconstruct(x) * 3.0, x_hat, atol=1e-4, rtol=1e-4)


def test_saved_and_loaded_it_is_the_same(sae, x, tmp_path):
    sae.metadata = {"model_name": "m", "hook_name": "blocks.1.hook_resid_post"}
    save_sae(sae, tmp_path / "d")
    loaded = load_sae(tmp_path / "d")
    assert type(loaded) is type(sae)
    assert loaded.cfg == sae.cfg
    assert loaded.hook == "blocks.1.hook_resid_post"
    assert torch.equal(loaded.encode(x), sae.encode(x))
    shapes = {key: weight.shape for key, weight in load_file(tmp_path / "d/sae_weights.safetensors").items()}
    saved = {**dict(sae.named_parameters()), **{name: getattr(sae, name) for name in sae.saved}}
    assert shapes == {key: tensor.shape for key, tensor in saved.items()}
    assert shapes["W_dec"] == (D_SAE, sae.d_out)
    assert ("W_enc" in shapes) != sae.tied


@pytest.mark.parametrize("name", list(REGISTRY))
def test_classes_are_final_and_configs_frozen(name):
    entry = REGISTRY[name]
    assert entry.sae.architecture == name
    assert not [each for each in entry.sae.__subclasses__() if each.__module__.startswith("sae.")]
    assert not any(other.sae in entry.sae.__mro__[1:] for other in REGISTRY.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config(name).d_sae = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", list(REGISTRY))
@pytest.mark.parametrize("sparsity", [0, -1, D_SAE + 1])
def test_impossible_sparsity_is_refused(name, sparsity):
    with pytest.raises(ValueError, match="out of range: expected 0 <"):
        config(name, **{REGISTRY[name].sparsity: sparsity})
