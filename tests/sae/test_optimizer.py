"""The optimiser: torch's Adam, with clipping and with rows that stay on the unit sphere."""

import pytest
import torch

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.optimizer import Optimizer


def gradients(sae: TopKSAE, step: int, size: float) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in sae.parameters():
        # in the parameter's memory layout, as autograd gives it
        p.grad = torch.empty_like(p).copy_(size * torch.randn(p.shape, generator=generator))


def small() -> TopKSAE:
    sae = TopKSAE(TopKConfig(d_in=6, d_sae=10, k=2))
    sae.initialise(torch.randn(50, 6, generator=torch.Generator().manual_seed(9)), seed=1)
    return sae


@pytest.mark.parametrize("size", [0.001, 5.0])
def test_it_is_adam_on_the_sphere_after_clipping_the_whole_gradient(size):
    ours, theirs = small(), small()
    optimizer = Optimizer(ours, betas=(0.9, 0.99), clip=1.0, matmul=torch.float32)
    adam = torch.optim.Adam(theirs.parameters(), lr=0.01, betas=(0.9, 0.99))
    optimizer.set_lr(0.01)
    for step in range(5):
        gradients(ours, step, size)
        optimizer.step()
        gradients(theirs, step, size)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        torch.testing.assert_close(optimizer.norm, norm)
        W = theirs.W_dec.detach()
        theirs.W_dec.grad -= (theirs.W_dec.grad * W).sum(dim=1, keepdim=True) * W
        adam.step()
        theirs.W_dec.data /= theirs.W_dec.data.norm(dim=1, keepdim=True)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), msg=name)
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(10))


def test_its_state_put_back_gives_the_same_next_step():
    a, b = small(), small()
    first = Optimizer(a, betas=(0.9, 0.99), clip=1.0, matmul=torch.float32)
    first.set_lr(0.01)
    for step in range(3):
        gradients(a, step, 0.1)
        first.step()
    second = Optimizer(b, betas=(0.9, 0.99), clip=1.0, matmul=torch.float32)
    second.set_lr(0.01)
    b.load_state_dict(a.state_dict())
    for name, tensor in second.tensors.items():
        tensor.copy_(first.tensors[name])
    second.refresh()
    for sae, optimizer in ((a, first), (b, second)):
        gradients(sae, 3, 0.1)
        optimizer.step()
    for name, p in a.named_parameters():
        assert torch.equal(p, b.get_parameter(name)), name


def test_forgotten_latents_have_no_moments():
    sae = small()
    optimizer = Optimizer(sae, betas=(0.9, 0.99), clip=1.0, matmul=torch.float32)
    gradients(sae, 0, 1.0)
    optimizer.step()
    optimizer.forget(torch.tensor([2, 7]))
    for name in ("W_enc", "W_dec", "b_enc"):
        for moment in ("exp_avg", "exp_avg_sq"):
            rows = optimizer.tensors[f"adam.{name}.{moment}"]
            rows = rows.T if name == "W_enc" else rows
            assert not rows[[2, 7]].any()
            assert rows[[0, 1, 3]].any()
