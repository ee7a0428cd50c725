"""ITDA, inference-time decomposition of activations: atoms are activations themselves, and there is no gradient.

    z = orthogonal matching pursuit of x over W_dec, in k steps, of either sign        x_hat = z W_dec
    fit: a row with |x - x_hat|^2 / d_in > tau becomes an atom, x / |x|, until there are d_sae

d_sae is the most there can be; tau decides how many there are. Every atom is a token that can be looked up (`labels`),
so two models that read one text in one order have atoms in common: see `sae.atoms`. Rows come scaled to mean norm
sqrt(d_in), so tau is near a share of their mean square. b_dec stays 0.
Source: Leask et al. 2025, arXiv:2505.17769, algorithm 1. Differs: rows are looked at a few at a time while the
dictionary is small (`SHARE`), so that few atoms are of what an atom just added would have covered.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.errors import InputError
from sae import sparse
from sae.atoms import save_labels
from sae.base import ConfigError, FittedSAE, KConfig, Loss, State
from sae.losses import fvu
from sae.parallel import ALONE, Mesh
from sae.pursuit import NOTHING, Codes, merged, orthogonal

SHARE, AT_LEAST = 8, 32
"""Rows looked at together: the dictionary's size over SHARE, but AT_LEAST so many."""
SAME = 1 - 1e-5
"""|cosine| above which two rows are one atom."""


@dataclass(frozen=True, kw_only=True)
class ITDAConfig(KConfig):
    """d_sae: the most atoms; of a fitted dictionary, how many there are."""

    tau: float = 0.1
    """Squared error a dimension above which a row becomes an atom; rows have a mean square near 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.d_in:
            raise ConfigError(f"k={self.k} is out of range: expected 0 < k <= d_in={self.d_in}, the rank of any row.")
        if not self.tau >= 0:
            raise ConfigError(f"tau={self.tau}: expected 0 (every row exactly) or above.")


class ITDASAE(FittedSAE):
    architecture = "itda"
    signed = True
    tied = True
    biases = ("b_dec",)
    by_latent = ("W_dec",)
    cfg: ITDAConfig
    labels: Tensor
    """Of each atom its document and its row in the run, (d_sae, 2)."""
    n_atoms: Tensor

    def __init__(self, cfg: ITDAConfig, mesh: Mesh = ALONE) -> None:
        if mesh.ranks.world > 1:
            raise ConfigError("itda is fitted by one process: use --gpus 1.")
        super().__init__(cfg, mesh)
        self.register_buffer("labels", torch.full((cfg.d_sae, 2), -1))
        self.register_buffer("n_atoms", torch.zeros((), dtype=torch.long))

    def is_full(self) -> bool:
        return int(self.n_atoms) == self.d_sae

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        codes = self._pursue(x, self.d_sae)
        return merged(codes.values, codes.indices)

    @torch.no_grad()
    def loss(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], state: State) -> Loss:
        """FVU of the batch, to look at: there is no gradient."""
        del state
        values, indices = self.encode_sparse(x)
        error = fvu(self.reconstruct(x) - target, target)
        terms = {"fvu": error, "l0": (values != 0).sum() / len(x)}
        return Loss(error, terms, sparse.fired(values, indices, self.d_sae))

    @torch.no_grad()
    def fit_batch(self, x: Float[Tensor, "n d_in"], labels: Int[Tensor, "n 2"]) -> dict[str, Tensor]:
        at, squares, active = 0, x.new_zeros(()), x.new_zeros(())
        while at < len(x):
            n = int(self.n_atoms)
            rows = x[at : at + max(n // SHARE, AT_LEAST)]
            codes = self._pursue(rows, n) if n else Codes(rows[:, :0], labels[: len(rows), :0], rows)
            left = codes.residual.square().sum(dim=1)
            floor = NOTHING**2 * rows.square().sum(dim=1)
            self._add(rows, labels[at : at + len(rows)], left > (self.cfg.tau * self.d_in + floor))
            squares, active, at = squares + left.sum(), active + (codes.values != 0).sum(), at + len(rows)
        spread = (x - x.mean(dim=0)).square().sum()
        return {"fvu": squares / spread, "l0": active / len(x), "n_atoms": self.n_atoms.clone()}

    def fitted(self) -> "ITDASAE":
        if not (n := int(self.n_atoms)):
            raise InputError("Every row is 0, so there is nothing to make atoms of: collect other activations.")
        made = ITDASAE(dataclasses.replace(self.cfg, d_sae=n, k=min(self.cfg.k, n)))
        with torch.no_grad():
            made.W_dec.copy_(self.W_dec[:n])
            made.labels.copy_(self.labels[:n])
            made.n_atoms.fill_(n)
        return made.to(self.W_dec.device)

    def save_beside(self, folder: Path) -> None:
        save_labels(self.labels, folder)

    def initialise(self, x: Float[Tensor, "n d_in"], seed: int) -> None:
        """Nothing: atoms are the rows themselves, in their order."""
        del x, seed

    def _pursue(self, x: Float[Tensor, "n d_in"], n_atoms: int) -> Codes:
        return orthogonal(x, self.W_dec[:n_atoms], min(self.cfg.k, n_atoms))

    def _add(self, x: Float[Tensor, "n d_in"], labels: Int[Tensor, "n 2"], wanted: Tensor) -> None:
        """Make the rows that are wanted atoms, but one of several that are the same, as far as there is room."""
        x, labels = x[wanted] / x[wanted].norm(dim=1, keepdim=True), labels[wanted]
        first = ~((x @ x.T).abs() > SAME).tril(-1).any(dim=1)
        begin = int(self.n_atoms)
        end = min(begin + int(first.sum()), self.d_sae)
        self.W_dec[begin:end] = x[first][: end - begin]
        self.labels[begin:end] = labels[first][: end - begin]
        self.n_atoms.fill_(end)
