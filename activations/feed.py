"""Batches made ready on the training device by a thread, a few ahead, so that a step does not wait for its data."""

import queue
import threading
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from activations.shuffle import START, Cursor, Rows, Shuffled

AHEAD = 4


class Feed:
    """Iterates over (rows on the device, cursor behind them). Use as a context manager: leaving ends the thread.

    On a CPU there is nothing to copy, and the batches come straight from `shuffled`.
    """

    def __init__(self, shuffled: Shuffled, start: Cursor = START) -> None:
        self.waited = 0.0
        """Seconds for which the consumer waited for data."""
        self._batches = shuffled.batches(start)
        self._device = shuffled.device
        self._ready: queue.Queue[tuple[Rows, torch.cuda.Event, Cursor] | BaseException] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)

    def __enter__(self) -> "Feed":
        if self._device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._batches.close()

    def __iter__(self) -> Iterator[tuple[Rows, Cursor]]:
        while True:
            began = time.perf_counter()
            rows, cursor = self._next()
            self.waited += time.perf_counter() - began
            yield rows, cursor

    def _next(self) -> tuple[Rows, Cursor]:
        if self._device.type != "cuda":
            return next(self._batches)
        got = self._ready.get()
        if isinstance(got, BaseException):
            raise got
        rows, copied, cursor = got
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        for x in rows.values():
            x.record_stream(stream)  # its memory is the side stream's: keep it until this stream has read it
        return rows, cursor

    def _work(self) -> None:
        try:
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                for rows, cursor in self._batches:
                    ready = {name: self._to_device(x) for name, x in rows.items()}
                    if not self._put((ready, stream.record_event(), cursor)):
                        return
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[Rows, torch.cuda.Event, Cursor] | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self._device, non_blocking=True)
