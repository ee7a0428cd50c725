"""What a machine does a second: measured here in a few seconds and remembered, or built in for machines that are not.

Everything is a plain rate of one simple thing (a product of matrices, a copy, a flushed write), so that a plan can say
what each of its numbers rests on.
"""

import dataclasses
import hashlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from activations.embedded import cache_folder
from activations.errors import InputError
from activations.files import flush, lock, read_json, write_json

MEASURED, BUILT_IN = "measured", "built-in"
_SHAPES = ((2048, 576, 4608), (1024, 768, 16384))
"""(rows, d_in, d_sae) of the products that are timed; the best counts."""
_DISK_BYTES = 1 << 27


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of one device and the disk beside it; FLOP/s and bytes/s."""

    name: str
    source: str
    """"measured" or "built-in"."""
    kind: str
    """"cpu" or "cuda"."""
    matmul: dict[str, float]
    """FLOP/s of a wide product, by the precision of its inputs."""
    copy: float
    """Bytes read and written by a copy, both counted."""
    gather: float
    """Bytes of rows read in random order."""
    adam: float
    """Bytes that a fused Adam step reads and writes: 28 a parameter."""
    write: float
    """Of a file, until it is on the disk."""
    read: float
    """Of a file that was just written: an upper limit, since the system may hold it in memory."""
    hash: float
    """SHA-256 of a file."""
    memory: int
    """Bytes of the device's own memory, or of the machine's."""
    link: float = 0.0
    """Bytes/s in and out of a GPU to the others of its host; 0 where there are none."""
    network: float = 0.0
    """The same between hosts."""
    per_host: int = 1
    """GPUs in a host."""


BUILT_INS = {
    # bfloat16 products, copy and gathers (of rows of 2,304) were measured on one H100 SXM with 80 GB; Adam is taken to
    # run at the copy's rate. float32 products and links are NVIDIA's published numbers: NVLink 4 with 450 GB/s, and one
    # 400 Gb/s adapter a GPU. The disk is an assumption: one fast NVMe drive.
    "h100": Machine(
        name="H100 80 GB",
        source=BUILT_IN,
        kind="cuda",
        matmul={"bfloat16": 770e12, "float32": 67e12},
        copy=2.95e12,
        gather=1.3e12,
        adam=2.95e12,
        write=2e9,
        read=5e9,
        hash=2e9,
        memory=80_000_000_000,
        link=450e9,
        network=50e9,
        per_host=8,
    ),
}


def built_in(name: str) -> Machine:
    """Raises InputError for a machine that is not known."""
    if name.lower() not in BUILT_INS:
        raise InputError(f"Machine {name!r} is unknown: expected here, {', '.join(BUILT_INS)}.")
    return BUILT_INS[name.lower()]


def this_machine(device: torch.device, folder: Path, *, again: bool = False) -> Machine:
    """The machine at hand: from the cache of an earlier call, or measured now (about 5 s).

    folder: where the disk is measured. again: measure though it is remembered.
    """
    name = device_name(device)
    key = f"{name}|{torch.get_num_threads()} threads|torch {torch.__version__}|disk {folder.stat().st_dev}"
    path = cache_folder() / "machines" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.exists() and not again:
        return Machine(**read_json(path))
    with lock(path.with_suffix(".lock")):
        machine = _measure(name, device, folder)
        write_json(path, dataclasses.asdict(machine))
    return machine


def device_name(device: torch.device) -> str:
    """What the device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_of(device: torch.device) -> tuple[int, int]:
    """(bytes free, bytes there) of a GPU's own memory, or of the machine's.

    Free counts what the system would give up for it: files that it holds in memory.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = total
    return free, total


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is or would be."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def times_of(work: Callable[[], object], device: torch.device, seconds: float = 0.2) -> list[float]:
    """Times of `work`, called for about so many seconds (3 to 100 times) after one that does not count."""
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 100):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - began)
    return times


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure(name: str, device: torch.device, folder: Path) -> Machine:
    big = 1 << (28 if device.type == "cuda" else 24)
    generator = torch.Generator(device).manual_seed(0)
    x, y = torch.ones(big, device=device), torch.ones(big, device=device)
    rows = x.view(-1, 512)
    chosen = torch.randint(len(rows), (len(rows) // 4,), generator=generator, device=device)
    weight = torch.nn.Parameter(x)
    weight.grad = y
    adam = torch.optim.Adam([weight], fused=True)
    write, read, digest = _disk(folder)
    return Machine(
        name=name,
        source=MEASURED,
        kind=device.type,
        matmul={str(t).removeprefix("torch."): _matmul(device, t) for t in (torch.float32, torch.bfloat16)},
        copy=8 * big / median(times_of(lambda: y.copy_(x), device)),
        gather=2048 * len(chosen) / median(times_of(lambda: rows.index_select(0, chosen), device)),
        adam=28 * big / median(times_of(adam.step, device)),
        write=write,
        read=read,
        hash=digest,
        memory=memory_of(device)[1],
    )


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    best = 0.0
    for n, d, m in _SHAPES:
        a, b = torch.ones(n, d, dtype=dtype, device=device), torch.ones(m, d, dtype=dtype, device=device)
        times = times_of(lambda a=a, b=b: a @ b.T, device)  # type: ignore[misc]
        best = max(best, 2 * n * d * m / median(times))
    return best


def _disk(folder: Path) -> tuple[float, float, float]:
    """(write, read, SHA-256) in bytes/s."""
    block: Tensor = torch.randint(256, (_DISK_BYTES,), dtype=torch.uint8)
    data, buffer = block.numpy().tobytes(), bytearray(1 << 22)
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=folder) as name:
        path = Path(name) / "block"
        began = time.perf_counter()
        path.write_bytes(data)
        flush(path)
        written = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        was_read = time.perf_counter()
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
        hashed = time.perf_counter()
    return _DISK_BYTES / (written - began), _DISK_BYTES / (was_read - written), _DISK_BYTES / (hashed - was_read)
