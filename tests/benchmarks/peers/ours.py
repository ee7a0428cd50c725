"""Our own step, beside the peers': the body of the loop of `sae.train.train`, and nothing that it would not do."""

import torch
from torch import Tensor

from sae.base import State
from sae.registry import REGISTRY
from sae.train import LOG_EVERY, Training
from tests.benchmarks.peers.peer import Peer, Setting


def training(setting: Setting) -> Training:
    """The settings with which `sae train` would train this."""
    return Training(
        architecture=setting.arch,
        hook="",
        sizes={"d_sae": setting.d_sae, REGISTRY[setting.arch].sparsity: setting.k},
        n_tokens=setting.n_steps * setting.batch,
        batch=setting.batch,
        seed=setting.seed,
        lr=setting.lr,
    )


class Trainer(Peer):
    def __init__(self, setting: Setting, x: Tensor) -> None:
        self.setting, self.training = setting, training(setting)
        self.sae = REGISTRY[setting.arch].sae(self.training.config(setting.d_in))
        self.sae.initialise(x.cpu(), setting.seed)
        self.sae.to(setting.device)
        betas = REGISTRY[setting.arch].betas
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=0.0, betas=betas, fused=True)
        self.last_fired = torch.zeros(setting.d_sae, dtype=torch.long, device=setting.device)
        self.state = State(0, setting.n_steps, self.last_fired < 0, 0)

    def step(self, x: Tensor) -> None:
        sae, state, done = self.sae, self.state, self.state.step + 1
        with self.setting.autocast():
            loss = sae.loss(x, x, state)
        loss.total.backward()
        sae.before_step()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), self.training.clip)
        self.adam.param_groups[0]["lr"] = self.training.lr_at(state.step, sae.d_sae)
        self.adam.step()
        self.adam.zero_grad()
        sae.after_step(state)
        self.last_fired.masked_fill_(loss.fired, done)
        self.state = state._replace(step=done)
        if done % LOG_EVERY == 0:
            self._count_dead()
            _ = [float(value) for value in loss.terms.values()]

    def recon(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.sae.reconstruct(x), self.sae.encode(x)

    def kill(self, n: int) -> None:
        self.sae.b_enc.data[:n] = -50.0
        self.last_fired[:n] = -(10**9)
        self._count_dead()

    def _count_dead(self) -> None:
        dead = self.last_fired < self.state.step - self.training.dead_steps
        self.state = self.state._replace(dead=dead, n_dead=int(dead.sum()))
