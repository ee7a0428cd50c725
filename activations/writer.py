"""Rows to disk beside the forward pass: masks, moments and the copy to the host are queued on the device, threads do
the rest. A bounded number of shards is on its way while one is computed, and so memory is bounded.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.forward import send
from activations.moments import CHUNK, moments
from activations.shards import Shards

SETS = 4
"""Shards of rows in memory at once, at least: one being computed, the others being written."""
MOST_SETS = 16
THREADS = 8
FLOAT8_MAX = 448.0


class Writer:
    """Writes shards in threads. Leaving the block waits for them; an error in one is raised at the next call.

    sets: shards in memory at once, the one being computed among them.
    """

    def __init__(self, sets: int = SETS) -> None:
        self.n_bytes = 0
        """Bytes written so far."""
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="write")
        self._sets: list[list[Future[None]]] = [[]]
        self._count = threading.Lock()
        self._most = sets

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._wait(0)

    def put(
        self,
        shards: Shards,
        number: int,
        rows: Float[Tensor, "rows d"],
        gradients: Float[Tensor, "rows d"] | None,
        ordinary_place: Bool[Tensor, " rows"],
    ) -> None:
        """Queue one hook's rows of shard `number`: work of the device at once, unwaited for; the file in a thread."""
        tensors = _with_mask(rows, send(ordinary_place, rows.device), shards.manifest["sink_threshold"])
        if shards.manifest["dtype"] == "float8":
            tensors["rows"], tensors["scales"] = to_float8(rows)
        if gradients is not None:
            tensors["gradients"] = gradients
        host = {name: _to_host(tensor) for name, tensor in tensors.items()}
        copied = None
        if rows.is_cuda:
            copied = torch.cuda.Event(blocking=True)  # the threads sleep: spinning, they would slow the forward pass
            copied.record(torch.cuda.current_stream(rows.device))
        self._sets[-1].append(self._pool.submit(self._write, shards, number, host, copied))

    def next_set(self) -> None:
        """All hooks of a shard were put: wait until there is room for the next."""
        self._wait(self._most - 2)
        self._sets.append([])

    def _write(
        self, shards: Shards, number: int, tensors: Mapping[str, Tensor], copied: torch.cuda.Event | None
    ) -> None:
        if copied is not None:
            copied.synchronize()
        shards.write(number, tensors)
        with self._count:
            self.n_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def _wait(self, n_left: int) -> None:
        while len(self._sets) > n_left:
            for done in self._sets.pop(0):
                done.result()


def _with_mask(
    rows: Float[Tensor, "rows d"], ordinary_place: Bool[Tensor, " rows"], sink_threshold: float | None
) -> dict[str, Tensor]:
    """The rows with their mask of ordinary ones and the moments of those."""
    norms = torch.cat([part.float().norm(dim=1) for part in rows.split(CHUNK.get(rows.device.type, 1 << 16))])
    mask = ordinary_place if sink_threshold is None else ordinary_place & (norms <= sink_threshold)
    of = moments(rows, norms, mask)
    n_sinks = (ordinary_place & ~mask).sum()
    return {"rows": rows, "mask": mask, "n_sinks": n_sinks, "n": of.n, "mean": of.mean, "m2": of.m2, "norms": of.norms}


def to_float8(rows: Float[Tensor, "rows d"]) -> tuple[Tensor, Float[Tensor, " rows"]]:
    """(rows as float8 e4m3, scale of each row): the largest value of a row becomes the largest float8."""
    scales = (rows.abs().amax(dim=1).float() / FLOAT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows.float() / scales[:, None]).to(torch.float8_e4m3fn), scales


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
