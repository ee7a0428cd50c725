"""Adam with what training a dictionary needs around it: clipping, and decoder rows that stay on the unit sphere.

On a GPU one kernel does all of it for the wide matrices and reads and writes each number once (`sae.kernels.adam`);
elsewhere the same is said in plain PyTorch, which is what the kernel is compared with.
"""

import torch
from torch import Tensor

from sae import kernels
from sae.base import SAE, rows_of
from sae.dense import FLOAT8, SCALE, to_float8


class Optimizer:
    """Adam over the parameters of `sae`. betas as torch's; clip: the largest norm of the whole gradient.

    matmul: when it is lower than float32 and there is a GPU, copies of the wide matrices in it are kept current in
    `sae.low`, so that no step has to make them. float8: the encoder's is in eight bits.
    """

    def __init__(
        self, sae: SAE, *, betas: tuple[float, float], clip: float, matmul: torch.dtype, float8: bool = False
    ) -> None:
        self.sae, self.betas, self.clip = sae, betas, clip
        self._parameters = dict(sae.named_parameters())
        on_gpu = kernels.available(sae.W_dec)
        self.wide = tuple(name for name, p in self._parameters.items() if on_gpu and p.dim() == 2)
        """Matrices that the kernel updates; `rows_of` gives them with the rows that they have in memory."""
        device = sae.W_dec.device
        self.norm = torch.zeros((), device=device)
        """Norm of the last gradient, before clipping."""
        self._steps = torch.zeros((), device=device)
        self._lr = torch.zeros((), device=device)
        self._mean = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._square = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        narrow = {name: p for name, p in self._parameters.items() if name not in self.wide}
        self._adam = torch.optim.Adam(
            narrow.values(), lr=self._lr if self.wide else 0.0, betas=betas, fused=True, capturable=bool(self.wide)
        )
        for name, p in narrow.items():
            self._adam.state[p] = {
                "step": torch.zeros((), device=device),
                "exp_avg": self._mean[name],
                "exp_avg_sq": self._square[name],
            }
        if self.wide and matmul != torch.float32:
            sae.low = {name: torch.empty_like(getattr(sae, name), dtype=matmul) for name in self.wide}
            if float8 and "W_enc" in sae.low:
                sae.low["W_enc8"] = torch.empty_like(sae.low.pop("W_enc"), dtype=FLOAT8)
            self.refresh()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The whole state, for a checkpoint; to restore it, copy into these."""
        state = {f"adam.{name}.exp_avg": t for name, t in self._mean.items()}
        state |= {f"adam.{name}.exp_avg_sq": t for name, t in self._square.items()}
        state["adam.steps"] = self._steps
        return state

    @torch.no_grad()
    def refresh(self) -> None:
        """After the state or the weights were changed from outside."""
        for state in self._adam.state.values():
            state["step"].copy_(self._steps)
        for name, copy in self.sae.low.items():
            copy.copy_(to_float8(self.sae.W_enc, SCALE) if name == "W_enc8" else getattr(self.sae, name))

    @torch.no_grad()
    def forget(self, latents: Tensor) -> None:
        """Set the moments of these latents to 0 (they were resampled)."""
        for name in self._parameters:
            if name in self.sae.by_latent:
                for moments in (self._mean, self._square):
                    rows_of(name, moments[name])[latents] = 0

    def set_lr(self, lr: float) -> None:
        self._lr.fill_(lr)
        if not self.wide:
            self._adam.param_groups[0]["lr"] = lr

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients, which are given up after it."""
        if self.wide:
            from sae.kernels import adam
        unit, mesh = self.sae.unit_rows, self.sae.mesh
        self._steps += 1
        coming = {}
        for name, p in self._parameters.items():
            assert p.grad is not None, name
            coming[name] = mesh.add_rows_(rows_of(name, p.grad))
        squares = []
        for name, p in self._parameters.items():
            assert p.grad is not None
            if (work := coming[name]) is not None:
                work.wait()
            if name in self.wide:
                squares.append(adam.squares(rows_of(name, p.grad)))
                continue
            share = 1 if name in self.sae.by_latent else mesh.n_latents  # of one that every part has
            squares.append(p.grad.square().sum() / share)
            if name in unit:
                p.grad.addcmul_((p.grad * p).sum(dim=1, keepdim=True), p, value=-1)
        self.norm.copy_(mesh.sum_latents(torch.stack(squares).sum()).sqrt())
        factor = (self.clip / self.norm).clamp(max=1.0)
        self._adam.grad_scale = 1 / factor  # type: ignore[attr-defined]  # torch's fused Adam divides by it
        self._adam.step()
        if self.wide:
            # in float64: 1 - 0.999 ** 1 has three digits left in float32
            corrections = [1 - torch.pow(beta, self._steps.double()) for beta in self.betas]
            hyper = torch.stack([self._lr.double(), *corrections, factor.double()]).float()
            for name in self.wide:
                p, low = self._parameters[name], self.sae.low.get(name, self.sae.low.get(f"{name}8"))
                assert p.grad is not None
                w, g, m, v = (rows_of(name, t) for t in (p.detach(), p.grad, self._mean[name], self._square[name]))
                copy = None if low is None else rows_of(name, low)
                adam.adam_rows(w, g, m, v, copy, hyper, self.betas, 1e-8, name in unit)
        for name in unit:
            if name not in self.wide:
                p = self._parameters[name]
                p.div_(p.norm(dim=1, keepdim=True))
        for p in self._parameters.values():
            p.grad = None
