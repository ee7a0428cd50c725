"""A real language model behind a real OpenAI-compatible server on this machine, started and stopped for a block.

It is llama.cpp's own server, from the optional package `xllamacpp`, in a child process: a crash there is no crash here.
The child serves on loopback only, on a free port, and ends when its standard input closes; the operating system closes
that pipe however the parent ends, so that not even `kill -9` leaves a server behind.
Source: https://github.com/xorbitsai/xllamacpp, https://github.com/ggml-org/llama.cpp (tools/server).
"""

import importlib.util
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from activations.errors import InputError

SLOTS = 4
"""Requests that the server works on at once."""
_CONTEXT = 2048  # tokens a slot: our prompts stay below 1,500
_START_S = 120.0
# llama.cpp's threads wait for each other by spinning. Where other work wants the processor too, a thread that spins
# keeps out the one that it waits for: 6 times slower at a load of 8 on 2 cores. A short spin costs an idle one nothing.
_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}


def model_alias(model_path: Path) -> str:
    """The name the server gives the model: the file's, which says how it is quantised (SmolLM2-135M-Instruct.Q4_1)."""
    return model_path.stem


@contextmanager
def local_server(model_path: Path | None = None) -> Iterator[str]:
    """Serve a GGUF file for the block and yield the base URL (http://127.0.0.1:PORT/v1).

    model_path: the embedded model by default. Its name in requests is `model_alias(model_path)`.
    Raises InputError when the package or the file is missing, or the server does not come up.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise InputError("The local server needs an extra: run `pip install 'sae-workbench[local-llm]'`.")
    path = model_path or default_model()
    if not path.is_file():
        raise InputError(f"{path} is no file: expected a language model in llama.cpp's GGUF format.")
    # -P and the explicit path: a file of the user's own called activations.py must not be imported instead.
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "autointerp.local_server", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**_ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then stops the child in order
        )
        try:
            yield _wait_ready(child, log)
        finally:
            _stop(child)


def default_model() -> Path:
    """The embedded model's GGUF file, fetched on first use."""
    from activations.embedded import gguf_path

    return gguf_path()


def _wait_ready(child: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        answered = selector.select(timeout=_START_S)
    line = child.stdout.readline() if answered else b""
    if not line:
        log.seek(0)
        lines = log.read()[-8000:].decode(errors="replace").strip().splitlines()
        told = [line.strip() for line in lines if " E " in line or "Error" in line] or lines
        reason = " / ".join(told[-3:]) or f"no answer in {_START_S:.0f} s"
        raise InputError(f"The local server did not start ({reason}): expected a GGUF language model and free memory.")
    return str(json.loads(line)["base_url"])


def _stop(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()


def _serve(model_path: Path) -> None:
    """Runs in the child: serve until standard input closes, then leave at once, whatever is still being answered."""
    import xllamacpp

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    params = xllamacpp.CommonParams()
    params.model.path = str(model_path)
    params.model_alias = {model_alias(model_path)}
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * _CONTEXT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = cores
    params.cors_origins, params.ui, params.endpoint_slots = "", False, False  # nothing for web pages or onlookers
    params.cache_ram_mib = 0  # prompts of other slots are not worth keeping: ours share their beginning only
    server = xllamacpp.Server(params)
    print(json.dumps({"base_url": f"{server.listening_address}/v1"}), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
