"""One dictionary while it is trained: its weights, its optimiser, its counters, and one step of it.

Nothing here waits for the device but `recount`, `figures` and `resample`, which the loop calls now and then.
"""

from collections import Counter

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import SAE, Dead, State, rows_of
from sae.frozen import FrozenBase
from sae.optimizer import Optimizer
from sae.registry import REGISTRY
from sae.resample import resample
from sae.settings import Training

GRAPH_BELOW = 1 << 28
"""Entries of batch x d_sae under which a GPU finishes a step before Python has launched it: those become graphs."""
EAGER_STEPS = 3
"""Steps of a kind before a graph of it is recorded: kernels are compiled and libraries opened in those. A k that is
annealed quickly is over before."""


class Stepper:
    """Trains `sae` (on its device) by `settings`, on rows as `sae.rows` makes them.

    scale: what rows, or each of their columns, are multiplied by. base: of a boost.
    """

    def __init__(
        self, sae: SAE, settings: Training, scale: float | Float[Tensor, " columns"], base: FrozenBase | None = None
    ) -> None:
        assert settings.matmul is not None
        self.sae, self.settings, self.base = sae, settings, base
        self.scale = scale if isinstance(scale, float) else scale.to(sae.W_dec.device)
        float8 = settings.matmul == "float8"
        self.matmul: torch.dtype = torch.bfloat16 if float8 else getattr(torch, settings.matmul)
        self.device = sae.W_dec.device
        self.n_steps_done = 0
        self.optimizer = Optimizer(
            sae, betas=REGISTRY[settings.architecture].betas, clip=settings.clip, matmul=self.matmul, float8=float8
        )
        self.terms: dict[str, Tensor] = {}
        self.n_dead = 0
        self._last_fired = torch.zeros(sae.n_held, dtype=torch.long, device=self.device)
        """The number of tokens seen when the latent last fired."""
        self._tokens = torch.zeros((), dtype=torch.long, device=self.device)
        self._penalty = torch.ones((), device=self.device)
        self._progress = torch.ones((), device=self.device)
        self._dead: Dead | None = None
        self._dead_of: dict[int, Dead] = {}
        self._ema = {name: p.detach().clone() for name, p in sae.named_parameters()} if settings.ema else {}
        self._seen: Counter[tuple[int, int | None]] = Counter()
        self._graphs: dict[tuple[int, int | None], torch.cuda.CUDAGraph] = {}
        self._terms_of: dict[tuple[int, int | None], dict[str, Tensor]] = {}
        self._rows: Tensor | None = None

    def step(self, rows: Tensor, pre: Tensor | None = None) -> None:
        """One optimisation step on rows (n, columns) as the hooks give them, on the device.

        pre: their pre-activations (n, d_sae), if they were made already; on a GPU at each step in the same memory, so
        that a graph finds them.
        """
        at, settings = self.n_steps_done, self.settings
        self.optimizer.set_lr(settings.lr_at(at, self.sae.d_sae))
        self._penalty.fill_(settings.penalty_at(at))
        self._progress.fill_((at + 1) / settings.n_steps)
        k = settings.k_at(at)
        if self._graphs_pay(len(rows)):
            self._replay(rows, k, pre)
        else:
            self._compute(rows, k, pre)
        self.n_steps_done += 1

    def _compute(self, rows: Tensor, k: int | None, pre: Tensor | None) -> None:
        x, target, gradient = self._parts_of(rows.float() * self.scale)
        state = State(k=k, penalty=self._penalty, progress=self._progress, dead=self._dead, pre=pre, gradient=gradient)
        with torch.autocast(self.device.type, dtype=self.matmul, enabled=self.matmul != torch.float32):
            loss = self.sae.loss(x, target, state)
        loss.total.backward()
        self.optimizer.step()
        self.sae.after_step(state)
        self._tokens += self.settings.batch
        self._last_fired.copy_(torch.where(loss.fired, self._tokens, self._last_fired))
        for name, mean in self._ema.items():
            mean.lerp_(getattr(self.sae, name).detach(), 1 - self.settings.ema)
        self.terms = {"loss": loss.total.detach(), **loss.terms, "grad_norm": self.optimizer.norm}

    def _parts_of(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, target and gradient, each in a memory of its own: kernels read whole rows."""
        x = row[:, : self.sae.d_in].contiguous()
        gradient = row[:, -self.sae.d_in :].contiguous() if self.sae.weighs_gradient else None
        if self.base is not None:
            return x, self.base.error(x), gradient
        if self.sae.target == "hook":
            return x, row[:, self.sae.d_in : self.sae.d_in + self.sae.d_out].contiguous(), gradient
        return x, x, gradient

    def recount(self) -> None:
        """Count the dead latents. What a step sees of them changes only here."""
        self.sae.mesh.newest_(self._last_fired)
        latents = (self._last_fired < self._tokens - self.settings.dead_after).nonzero().squeeze(1)
        counts = self.sae.mesh.counts(len(latents))
        self.n_dead = sum(counts)
        self._dead = self._padded(latents, max(counts)) if self.n_dead else None

    def _padded(self, latents: Tensor, size: int) -> Dead:
        """`latents` in a place that stays, so that a graph recorded with it can be replayed.

        size: the most that a part of the mesh has: all take as many places, with false entries at the end. On a GPU
        there is a place for each of 32 sizes.
        """
        if self.device.type == "cuda":
            part = -(-self.sae.n_held // 32)
            size = -(-size // part) * part
        if size not in self._dead_of:
            self._dead_of[size] = Dead(
                torch.empty(size, dtype=torch.long, device=self.device),
                torch.empty(size, dtype=torch.bool, device=self.device),
                torch.empty((), device=self.device),
            )
        dead = self._dead_of[size]
        dead.latents.zero_()[: len(latents)] = latents
        dead.real.zero_()[: len(latents)] = True
        dead.n.fill_(self.n_dead)
        return dead

    def figures(self) -> dict[str, float]:
        """Terms of the last step's loss and what else is worth a line in the log."""
        values = torch.stack([term.double() for term in self.terms.values()]).tolist()
        lr = self.settings.lr_at(self.n_steps_done - 1, self.sae.d_sae)
        return {**dict(zip(self.terms, values, strict=True)), "n_dead": self.n_dead, "lr": lr}

    def resample(self, rows: Tensor) -> None:
        """Start the dead latents anew at rows that are reconstructed badly."""
        self.recount()
        if self._dead is not None:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.n_steps_done)
            dead = self._dead.latents[self._dead.real]  # of the latents held here, perhaps none
            resample(self.sae, self.optimizer, dead, self._parts_of(rows.float() * self.scale)[0], generator)
            self._last_fired[dead] = self._tokens
            self.recount()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The whole state for `sae.checkpoint`, with a row a latent; after it was filled, call `restored`."""
        weights = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        ema = {f"ema.{name}": tensor for name, tensor in self._ema.items()}
        counters = {"last_fired": self._last_fired, "tokens": self._tokens}
        by_latent = {*self.sae.by_latent, "last_fired"}
        names = {*by_latent, *dict(self.sae.named_parameters())}
        placed = {}
        for key, tensor in {**weights, **self.optimizer.tensors, **ema, **counters}.items():
            name = next((part for part in key.split(".") if part in names), "")
            placed[key] = self.sae.mesh.placed(rows_of(name, tensor), by_latent=name in by_latent)
        return placed

    def restored(self, n_steps_done: int) -> None:
        """After `tensors` were filled from a checkpoint."""
        self.n_steps_done = n_steps_done
        self.optimizer.refresh()
        self.recount()

    @torch.no_grad()
    def finish(self) -> SAE:
        """The trained dictionary, of activations as the model has them."""
        for name, mean in self._ema.items():
            on_sphere = name in self.sae.unit_rows
            getattr(self.sae, name).copy_(mean / mean.norm(dim=1, keepdim=True) if on_sphere else mean)
        self.sae.low = {}
        self.sae.after_training()
        d_in, d_out = self.sae.d_in, self.sae.d_out
        if self.base is not None:
            reads = torch.full((d_in,), float(self.scale), device=self.device)
            self.sae.unscale_columns(reads, reads * self.base.factor)
        elif isinstance(self.scale, float):
            self.sae.unscale(self.scale)
        elif self.sae.weighs_gradient:
            self.sae.unscale(float(self.scale[0]))
        else:
            reads = self.scale[:d_in]
            self.sae.unscale_columns(reads, self.scale[d_in : d_in + d_out] if self.sae.target == "hook" else reads)
        return self.sae

    def _graphs_pay(self, n: int) -> bool:
        small = n * self.sae.n_held <= GRAPH_BELOW and self.sae.mesh.ranks.world == 1 and self.base is None
        return self.device.type == "cuda" and small

    def _replay(self, rows: Tensor, k: int | None, pre: Tensor | None) -> None:
        if self._rows is None:
            self._rows = torch.empty_like(rows)
        self._rows.copy_(rows)
        key = (len(self._dead.latents) if self._dead else 0, k)
        self._seen[key] += 1
        if self._seen[key] <= EAGER_STEPS:
            self._compute(self._rows, k, pre)
            return
        if key not in self._graphs:
            pool = next((graph.pool() for graph in self._graphs.values()), None)
            graph = torch.cuda.CUDAGraph()
            # cuBLAS works in memory that belongs to the stream of the recording: those that are replayed side by side
            # (`sae.stack`) are each recorded on their own.
            here = torch.cuda.current_stream(self.device)
            own = None if here == torch.cuda.default_stream(self.device) else here
            # thread_local: rows are loaded meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=own, capture_error_mode="thread_local"):
                self._compute(self._rows, k, pre)
            self._graphs[key], self._terms_of[key] = graph, self.terms
        self._graphs[key].replay()
        self.terms = self._terms_of[key]
