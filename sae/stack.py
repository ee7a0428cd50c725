"""Dictionaries that take their steps on the same batches: k-sparse ones of one shape share the encoder's product.

The encoders of such a stack lie side by side in memory, each parameter a view into it, and one batched product gives
the pre-activations of all. The rest of a step is each dictionary's own; on a GPU each has a stream for it where its
step is too small to fill the device.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae.ksparse import KSparseConfig
from sae.stepper import GRAPH_BELOW, Stepper

BUDGET = 2 << 30
"""Bytes of pre-activations made in one product; stacks that need more are split."""


class Together:
    """Steps of `steppers`, all of one hook, on the same rows. budget: as `BUDGET`.

    everywhere: stack on a CPU too. There pre-activations that each dictionary makes for itself, a few rows at a time,
    are faster: they stay in the cache (`sae.dense.pieces`).
    """

    def __init__(self, steppers: Sequence[Stepper], budget: int = BUDGET, everywhere: bool = False) -> None:
        parts = [part for stack in _alike(steppers, everywhere) for part in _split(stack, budget)]
        single = [part[0] for part in parts if len(part) == 1]
        stacks = [part for part in parts if len(part) > 1]
        # One place for the pre-activations of all stacks, which take turns in it.
        memory = torch.empty(max(map(_pre_bytes, stacks), default=0), dtype=torch.uint8, device=steppers[0].device)
        self._groups: list[tuple[Sequence[Stepper], Encoders | None]] = [
            (stack, Encoders(stack, memory)) for stack in stacks
        ]
        if single:
            self._groups.append((single, None))
        self._streams = {stepper: _stream_for(stepper) for stepper in steppers if len(steppers) > 1}

    def step(self, rows: Float[Tensor, "n d_in"]) -> None:
        """One step of each, on rows as the hook gives them."""
        for steppers, encoders in self._groups:
            pre = encoders.pre(rows) if encoders else [None] * len(steppers)
            for stepper, own in zip(steppers, pre, strict=True):
                stream = self._streams.get(stepper)
                if stream is not None:
                    stream.wait_stream(torch.cuda.current_stream(stepper.device))
                with torch.cuda.stream(stream):  # without one this does nothing
                    stepper.step(rows, own)
            # Whoever comes next may overwrite the rows and the pre-activations, or read what the steps made.
            for stream in filter(None, map(self._streams.get, steppers)):
                torch.cuda.current_stream(stream.device).wait_stream(stream)


class Encoders:
    """The encoders of dictionaries of one shape as one. memory: bytes that the pre-activations are written to."""

    def __init__(self, steppers: Sequence[Stepper], memory: Tensor) -> None:
        saes = [stepper.sae for stepper in steppers]
        self.scale, self.dtype, self._memory = steppers[0].scale, steppers[0].matmul, memory
        self.b_dec = _side_by_side([sae.b_dec for sae in saes])[:, None]
        self.b_enc = _side_by_side([sae.b_enc for sae in saes])[:, None]
        if "W_enc" in saes[0].low:
            rows = torch.stack([sae.low["W_enc"].T for sae in saes])
            for sae, own in zip(saes, rows, strict=True):
                sae.low["W_enc"] = own.T
            self.W_enc = rows.mT
        else:
            self.W_enc = _side_by_side([sae.W_enc for sae in saes])

    @torch.no_grad()
    def pre(self, rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "m n d_sae"]:
        """(x - b_dec) W_enc + b_enc of each dictionary, in its precision; always in the same memory."""
        x = rows.float() * self.scale - self.b_dec
        shape = (len(x), len(rows), self.b_enc.shape[-1])
        out = self._memory.view(self.dtype)[: math.prod(shape)].view(shape)
        return torch.baddbmm(self.b_enc.to(self.dtype), x.to(self.dtype), self.W_enc.to(self.dtype), out=out)


def _side_by_side(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """The values of parameters of one shape in one tensor, of which each parameter becomes a part.

    A matrix with a row a latent in memory, as W_enc, keeps that layout: it decides the order of sums.
    """
    transposed = parameters[0].dim() == 2
    together = torch.stack([p.detach().mT if transposed else p.detach() for p in parameters])
    together = together.mT if transposed else together
    for parameter, own in zip(parameters, together, strict=True):
        parameter.data = own
    return together


def _alike(steppers: Sequence[Stepper], everywhere: bool) -> list[list[Stepper]]:
    """Those whose encoders fit into one product of centred rows. Who is not k-sparse needs its gradient: alone."""
    stacks: dict[object, list[Stepper]] = {}
    for stepper in steppers:
        sae, shape = stepper.sae, (stepper.sae.d_sae, stepper.matmul)
        plain = isinstance(sae.cfg, KSparseConfig) and sae.has_encoder_rows and sae.centres and not sae.weighs_gradient
        fits = plain and "W_enc8" not in sae.low and (everywhere or stepper.device.type == "cuda")
        stacks.setdefault(shape if fits else stepper, []).append(stepper)
    return list(stacks.values())


def _split(stack: list[Stepper], budget: int) -> list[list[Stepper]]:
    at_once = max(budget // _pre_bytes(stack[:1]), 1)
    return [stack[at : at + at_once] for at in range(0, len(stack), at_once)]


def _pre_bytes(stack: Sequence[Stepper]) -> int:
    return sum(s.settings.batch * s.sae.d_sae * s.matmul.itemsize for s in stack)


def _stream_for(stepper: Stepper) -> torch.cuda.Stream | None:
    alone = stepper.sae.mesh.ranks.world == 1  # else the order of exchanges must be the same on all ranks
    small = stepper.settings.batch * stepper.sae.d_sae <= GRAPH_BELOW and alone
    return torch.cuda.Stream(stepper.device) if stepper.device.type == "cuda" and small else None
