"""Several processes that train one dictionary: a mesh of rows x latents, on torch's own device mesh and collectives.

Each process holds an equal part of the latents (tensor parallel) and reads an equal part of each batch's rows (data
parallel). Losses and the optimiser are written once, for a part: what crosses processes goes through a `Mesh`, and that
of a process by itself, `ALONE`, gives back what it is given.

What crosses in a step: over latents, the candidates of each row's k and one sum of x_hat; over rows, the gradient.
The rules for gradients are DTensor's: a Partial that becomes Replicate passes its gradient on, a Replicate that is used
in parts sums the gradients of its parts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from activations.errors import InputError
from activations.ranks import Ranks

Selection = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Mesh:
    """The processes `ranks` as n_rows x n_latents; this one is number (`row`, `latent`). All of them make it together.

    data_parallel: n_rows, by default 1: parts of the latents need the least exchange. device: where the tensors are.
    Raises InputError when the processes cannot be laid out so.
    """

    def __init__(self, ranks: Ranks = Ranks(), *, data_parallel: int = 1, device: str = "cpu") -> None:  # noqa: B008
        if ranks.world % data_parallel:
            raise InputError(
                f"{ranks.world} processes make no {data_parallel} equal groups: give --data-parallel a divisor of "
                f"{ranks.world}."
            )
        self.ranks = ranks
        self.n_rows, self.n_latents = data_parallel, ranks.world // data_parallel
        self.row, self.latent = divmod(ranks.rank, self.n_latents)
        if ranks.world > 1:
            from torch.distributed.device_mesh import init_device_mesh

            self._mesh = init_device_mesh(device, (self.n_rows, self.n_latents), mesh_dim_names=("rows", "latents"))

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.ranks.leads

    def part(self, d_sae: int) -> slice:
        """The latents of d_sae that are held here. Raises InputError when they cannot be shared equally."""
        if d_sae % self.n_latents:
            raise InputError(
                f"{d_sae} latents cannot be shared by {self.n_latents} processes: take a multiple of "
                f"{self.n_latents}, or share the rows instead with --data-parallel."
            )
        size = d_sae // self.n_latents
        return slice(self.latent * size, (self.latent + 1) * size)

    # In a step: nothing here waits for the device.

    def sum_latents(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum of what each part of the latents gives; the gradient goes to each part as it is."""
        return self._sum(x, "latents") if self.n_latents > 1 else x

    def sum_rows(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum of what each part of the rows gives; the gradient goes to each part as it is."""
        return self._sum(x, "rows") if self.n_rows > 1 else x

    def mean_rows(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The mean over the batch, from the mean over the rows here."""
        return self.sum_rows(x) / self.n_rows if self.n_rows > 1 else x

    def into_latents(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """x, the same on all parts, where each uses it for its own latents; its gradient is the sum of theirs."""
        if self.n_latents == 1:
            return x
        from torch.distributed.tensor import DTensor, Partial, Replicate

        whole = DTensor.from_local(x, self._mesh["latents"], [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    @torch.no_grad()
    def winners(
        self, choose: Selection, values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], width: int
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """What `choose` takes of the k of each row that each part, of so many latents, has chosen from its own.

        Places that other parts won hold value 0 here, and indices that are spread over the part.
        """
        if self.n_latents == 1:
            return values, indices
        own = torch.stack([values.view(torch.int32), (indices + self.latent * width).int()])
        # One after the other, in the parts' order, so that equal values keep theirs.
        every_value, every_number = torch.cat(self._gather(own, "latents"), dim=2)
        chosen, places = choose(every_value.contiguous().view(torch.float32), values.shape[1])
        numbers = every_number.gather(1, places).long() - self.latent * width
        return chosen * ((numbers >= 0) & (numbers < width)), numbers % width

    @torch.no_grad()
    def among_all(self, z: Float[Tensor, "n _m"], k: int) -> Float[Tensor, "n _m"]:
        """z without what is not among the k entries of largest magnitude in a row of all parts; equals of the last
        stay."""
        if self.n_latents == 1 or k >= self.n_latents * z.shape[1]:
            return z
        largest = z.abs().topk(min(k, z.shape[1]), dim=1).values
        every = torch.cat(self._gather(largest, "latents"), dim=1)
        return z.masked_fill(z.abs() < every.topk(k, dim=1).values[:, -1:], 0.0)

    def add_rows_(self, x: Tensor) -> dist.Work | None:
        """Begin to add up x in place over the parts of the rows; wait for what is returned before x is read."""
        return dist.all_reduce(x, group=self._mesh.get_group("rows"), async_op=True) if self.n_rows > 1 else None

    # Now and then.

    def newest_(self, last: Int[Tensor, " _m"]) -> None:
        """Put the largest over the parts of the rows in place."""
        if self.n_rows > 1:
            dist.all_reduce(last, op=dist.ReduceOp.MAX, group=self._mesh.get_group("rows"))

    def counts(self, n: int) -> list[int]:
        """`n` of each part of the latents."""
        if self.n_latents == 1:
            return [n]
        return [int(each) for each in self._gather(torch.tensor(n, device=self._mesh.device_type), "latents")]

    def all_rows(self, x: Float[Tensor, "_n d"]) -> Float[Tensor, "_all d"]:
        """The rows of all parts, in the order of the batch: part r of n has the rows r, r + n, ..."""
        if self.n_rows == 1:
            return x
        return torch.stack(self._gather(x.contiguous(), "rows"), dim=1).flatten(0, 1)

    def whole(self, part: Shaped[Tensor, "_m ..."]) -> Shaped[Tensor, "_all ..."]:
        """A tensor with a row a latent, on the CPU of the leader, whole; the others get their part back."""
        part = part.detach().cpu().contiguous()
        if self.n_latents == 1:
            return part
        every = [torch.empty_like(part) for _ in range(self.n_latents)] if self.latent == 0 else None
        dist.gather(part, every, group=self._mesh.get_group("latents"), group_dst=0)
        return torch.cat(every) if every else part

    def placed(self, x: Tensor, *, by_latent: bool) -> Tensor:
        """x for a checkpoint: a DTensor over its memory that says which part of the whole it is (its first dimension
        is the latents), or that it is the same everywhere."""
        x = x.detach()
        if self.ranks.world == 1:
            return x
        from torch.distributed.tensor import DTensor, Replicate, Shard

        over_latents = Shard(0) if by_latent else Replicate()
        return DTensor.from_local(x, self._mesh, [Replicate(), over_latents], run_check=False)

    def _sum(self, x: Tensor, dimension: str) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        parts: Any = DTensor.from_local(x, self._mesh[dimension], [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()]).to_local()

    def _gather(self, x: Tensor, dimension: str) -> list[Tensor]:
        """x of each part of a dimension, in their order."""
        group = self._mesh.get_group(dimension)
        every = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(every, x, group=group)
        return every


ALONE = Mesh()
"""A process by itself."""
