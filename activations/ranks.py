"""The processes of one job: alone, or started by torchrun, one a GPU, on one or several hosts.

Captures share work through the file system (all ranks see the run's folder) and agree on little: gloo is enough, also
between GPUs. Training exchanges tensors, between GPUs by nccl (`sae.parallel`). A rank that finds no RANK in its
environment is alone and needs no group at all.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist

from activations.errors import InputError

T = TypeVar("T")


class Ranks(NamedTuple):
    """This process among `world`."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Number on this host, which picks the GPU."""

    @classmethod
    def from_environment(cls) -> "Ranks":
        """What torchrun says in the environment; alone without it."""
        rank, world, local = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls() if rank is None else cls(int(rank), int(world or 1), int(local or 0))

    @property
    def leads(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def from_leader(self, value: Any) -> Any:
        """The leader's `value`, on every rank; the others' is ignored."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def leader_first(self, work: Callable[[], T]) -> T:
        """`work()` on the leader, then on the others, each with its own result.

        What the leader was given wrong is its to say: the other ranks leave with exit code 1 then.
        """
        failed: ValueError | None = None
        if self.leads:
            try:
                done = work()
            except ValueError as error:  # InputError and its like in the other rooms
                failed = error
        if self.from_leader(failed is not None):
            raise failed or SystemExit(1)
        return done if self.leads else work()

    def by_leader(self, work: Callable[[], T]) -> T:
        """`work()` on the leader alone; its result, which is pickled on the way, on every rank.

        What is wrong is the leader's to say: the other ranks leave with exit code 1 then.
        """
        return self.from_leader(self.leader_first(lambda: work() if self.leads else None))

    def together(self, work: Callable[[], T]) -> T:
        """`work()` on every rank, each with its own result, once all are done.

        When it is wrong on some, the first of them says so, and all leave with exit code 1.
        """
        failed: ValueError | None = None
        try:
            done = work()
        except ValueError as error:
            failed = error
        wrong = self._from_all(failed is not None)
        if any(wrong):
            raise failed if failed is not None and wrong.index(True) == self.rank else SystemExit(1)
        return done

    def agree(self, facts: dict[str, Any]) -> None:
        """Compare `facts` (JSON values) with the leader's; it raises InputError for the first that differs."""

        def compare() -> None:
            for rank, theirs in enumerate(every):
                for key in {**facts, **theirs}:
                    if theirs.get(key) != facts.get(key):
                        raise InputError(
                            f"Rank {rank} has {key} {theirs.get(key)!r} and rank 0 has {facts.get(key)!r}: start all "
                            "with the same command, on one run."
                        )

        every = self._from_all(facts)
        self.leader_first(lambda: compare() if self.leads else None)

    def _from_all(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank."""
        if self.world == 1:
            return [value]
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, value)
        return every

    def device(self, name: str) -> str:
        """`name` as torch takes it, with this rank's GPU where a GPU is meant.

        Raises InputError when this host has fewer GPUs than ranks.
        """
        n_gpus = torch.cuda.device_count()
        if self.world == 1 or name == "cpu" or ":" in name or (name == "auto" and n_gpus == 0):
            return name
        if self.local_rank >= n_gpus:
            raise InputError(f"Rank {self.local_rank} of this host has no GPU: it has {n_gpus}. Start fewer ranks.")
        return f"cuda:{self.local_rank}"


@contextmanager
def joined(device: str = "cpu") -> Iterator[Ranks]:
    """This process's place among those that torchrun started, joined for the block; alone without torchrun.

    device: as `Ranks.device` takes it; where that is a GPU, tensors on GPUs can be exchanged too.
    """
    ranks = Ranks.from_environment()
    if ranks.world == 1 or dist.is_initialized():
        yield ranks
        return
    where = ranks.device(device)
    if where.startswith("cuda"):
        torch.cuda.set_device(torch.device(where))
    # A rank may wait for the leader's first shard, which on a CPU takes minutes.
    backend = "cpu:gloo,cuda:nccl" if where.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    try:
        yield ranks
        dist.barrier()  # nobody leaves while another still exchanges with it
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process, a rank whose work is done and whose files are written.

    Python's own ending meets threads of torch's exchange that are still there, and now and then one aborts the process
    ("terminate called without an active exception"), for which torchrun calls the whole job failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
