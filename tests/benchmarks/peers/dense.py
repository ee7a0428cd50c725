"""The reference: our losses in plain PyTorch, dense and by autograd, with torch's Adam.

It starts from the same weights as ours and takes the same batches, learning rates and counts of the dead, so whatever
our step does differently to be fast shows as a difference in FVU, L0 or dead latents.
"""

import math

import torch
from torch import Tensor

from sae.registry import REGISTRY
from sae.train import LOG_EVERY
from tests.benchmarks.peers.ours import training
from tests.benchmarks.peers.peer import Peer, Setting


class Trainer(Peer):
    def __init__(self, setting: Setting, x: Tensor) -> None:
        self.setting, self.training = setting, training(setting)
        entry = REGISTRY[setting.arch]
        start = entry.sae(self.training.config(setting.d_in))
        start.initialise(x.cpu(), setting.seed)
        start.to(setting.device)
        self.cfg: object = start.cfg
        self.parameters = dict(start.named_parameters())
        self.adam = torch.optim.Adam(self.parameters.values(), lr=0.0, betas=entry.betas, fused=True)
        self.last_fired = torch.zeros(setting.d_sae, dtype=torch.long, device=setting.device)
        self.dead, self.n_dead, self.done = self.last_fired < 0, 0, 0
        self.coefficient = torch.tensor(0.01, device=setting.device)  # of JumpReLU's L0

    def step(self, x: Tensor) -> None:
        W_dec = self.parameters["W_dec"]
        with self.setting.autocast():
            loss, z = self._topk(x) if self.setting.arch == "topk" else self._jumprelu(x)
        loss.backward()
        grad = W_dec.grad
        assert grad is not None
        grad -= (grad * W_dec.detach()).sum(dim=1, keepdim=True) * W_dec.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.training.clip)
        self.adam.param_groups[0]["lr"] = self.training.lr_at(self.done, self.setting.d_sae)
        self.adam.step()
        self.adam.zero_grad()
        self.done += 1
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            self.last_fired[(z != 0).any(dim=0)] = self.done
            if self.setting.arch == "jumprelu":
                self.parameters["threshold"].clamp_(min=0.0)
                too_many = ((z != 0).sum() / len(z) / self._aim()).log().clamp(-1.0, 1.0)
                self.coefficient = (self.coefficient * (0.01 * too_many).exp()).clamp(1e-6, 1e2)
        if self.done % LOG_EVERY == 0:
            self._count_dead()

    def _aim(self) -> float:
        """L0 that the coefficient follows, of the step just done."""
        k, first = self.setting.k, self.cfg.start_share * self.setting.d_sae  # type: ignore[attr-defined]
        return k * (first / k) ** (1.0 - self.training.penalty_at(self.done - 1))

    def _pre(self, x: Tensor) -> Tensor:
        return (x - self.parameters["b_dec"]) @ self.parameters["W_enc"] + self.parameters["b_enc"]

    def _error(self, x: Tensor, z: Tensor) -> Tensor:
        return x - (z @ self.parameters["W_dec"] + self.parameters["b_dec"]).float()

    def _topk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self._pre(x)
        z = _keep(pre, self.setting.k)
        error = self._error(x, z)
        loss = _share(error, x)
        if self.n_dead:
            places = 1 << round(math.log2(max(self.setting.d_in / 2, 1)))
            k = min(places, self.n_dead)
            missed = error.detach() - (_keep(pre.masked_fill(~self.dead, 0.0), k) @ self.parameters["W_dec"]).float()
            auxk = _share(missed, error.detach()).nan_to_num(0.0, 0.0, 0.0)
            loss = loss + self.cfg.auxk_weight * auxk * (k / places)  # type: ignore[attr-defined]
        return loss, z

    def _jumprelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = self._pre(x).float(), self.parameters["threshold"]
        on = (pre > threshold).float()
        width = self.cfg.bandwidth  # type: ignore[attr-defined]
        ramp = ((pre - threshold) / width).clamp(-0.5, 0.5)
        step = on + ramp - ramp.detach()  # the step's value, the ramp's slope
        z = pre * on + threshold.detach() * (step - on)
        return _share(self._error(x, z), x) + self.coefficient * step.sum(dim=1).mean() / self.setting.k, z

    def recon(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self._pre(x)
        on = pre > self.parameters["threshold"] if self.setting.arch == "jumprelu" else None
        z = _keep(pre, self.setting.k) if on is None else pre * on
        return x - self._error(x, z), z

    def kill(self, n: int) -> None:
        self.parameters["b_enc"].data[:n] = -50.0
        self.last_fired[:n] = -(10**9)
        self._count_dead()

    def _count_dead(self) -> None:
        self.dead = self.last_fired < self.done - self.training.dead_after / self.setting.batch
        self.n_dead = int(self.dead.sum())


def _keep(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row, where they are above 0."""
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


def _share(error: Tensor, target: Tensor) -> Tensor:
    return error.square().sum() / (target - target.mean(dim=0)).square().sum()
