"""What a dictionary costs: its size, and the time to encode."""

from statistics import median

import torch

from activations.machine import device_name, times_of
from sae.base import SAE
from sae.evals.metric import Metric

ROWS = 4096


@torch.no_grad()
def cost(sae: SAE, *, seed: int = 0) -> dict[str, Metric]:
    """Parameters, their bytes, and tokens encoded a second by the device that the dictionary is on.

    The rows are Gaussian around b_dec: what a row holds matters little to the time. The speed is that of the moment,
    with whatever else the machine is doing.
    """
    device = sae.W_dec.device
    n = sum(p.numel() for p in sae.parameters())
    size = sum(p.numel() * p.element_size() for p in sae.parameters())
    x = torch.randn(ROWS, sae.d_in, generator=torch.Generator().manual_seed(seed)).to(device) + sae.b_dec
    times = times_of(lambda: sae.encode_sparse(x), device, seconds=1.0)
    return {
        "cost.parameters": Metric(value=float(n), n=n, of="parameters", definition="numbers that are trained"),
        "cost.bytes": Metric(value=float(size), n=n, of="parameters", definition="bytes of the parameters in memory"),
        "cost.encode_speed": Metric(
            value=ROWS / median(times),
            n=len(times),
            of=f"passes over {ROWS:,} Gaussian rows on {device_name(device)}, {torch.get_num_threads()} threads",
            definition="tokens encoded a second, from the median time of a pass",
            seed=seed,
        ),
    }
