"""`--gpus N`: the same command once a GPU, by torch's own launcher."""

import logging
import os
import sys

from activations.errors import InputError


def spread(gpus: int) -> bool:
    """Run this process's command line on `gpus` GPUs and wait; False when it is to run here.

    A process that torchrun started (on several hosts, or by this function) is one of the ranks already.
    Raises InputError when the machine has fewer GPUs. Leaves with exit code 1 when a rank failed: it said why.
    """
    if gpus == 1 or "RANK" in os.environ:
        return False
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    n_here = torch.cuda.device_count()
    if gpus > n_here:
        raise InputError(f"--gpus {gpus} on a machine with {n_here} GPUs: give at most that many, or leave it out.")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=gpus,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except ChildFailedError:
        sys.exit(1)
    return True
