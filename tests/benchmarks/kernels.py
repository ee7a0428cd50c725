"""What each Triton kernel costs beside its PyTorch alternative, and whether both give the same.

Medians of 20 runs by CUDA events after 3 of warm-up, at two sizes: the largest dictionary that we train (8,192 rows of
2,304 columns, 65,536 latents, k = 64) and the one of the shipped model (4,096 rows of 576 columns, 9,216 latents,
k = 32). Latents fire with Zipf-like frequencies, the most frequent ones on most rows. Prints one JSON line a
measurement: milliseconds, and gigabytes a second of what has to be read and written at least (every gathered row
counted each time that it is read).

    python -m tests.benchmarks.kernels [--only rows,adam] [--tiny]

--tiny: sizes that Triton's interpreter can do, to try this script without a GPU.
"""
# ruff: noqa: B023, E731  (what is timed is called before the loop goes on)

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf

from tests.interpreter import DEVICE

from sae.kernels import adam, codes, jump, select  # isort: skip

SIZES = {"large": (8192, 2304, 65_536, 64, 16_384, 1024), "small": (4096, 576, 9216, 32, 2048, 256)}
TINY = {"tiny": (24, 72, 300, 4, 200, 16)}
"""n, d, d_sae, k, dead latents, k of AuxK."""

only: set[str] = set()


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for i in range(repeats + 3):
        if DEVICE == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            run()
            elapsed = 1000 * (time.perf_counter() - begin)
        if i >= 3:
            times.append(elapsed)
    return statistics.median(times)


def report(size: str, name: str, run: Callable[[], Any], gigabytes: float, error: float | None = None) -> None:
    """error: largest difference from the twin, relative to the twin's largest entry."""
    ms = milliseconds(run, 1 if size == "tiny" else 20)
    line = {"size": size, "name": name, "ms": round(ms, 4), "GB/s": round(gigabytes / ms * 1000)}
    print(json.dumps(line if error is None else line | {"error": float(f"{error:.2e}")}), flush=True)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def wanted(name: str) -> bool:
    return not only or name in only


def zipf_pre(n: int, d_sae: int, dtype: torch.dtype) -> torch.Tensor:
    """Pre-activations of latents at random places, some of which fire on most rows and most of which rarely do."""
    rank = torch.randperm(d_sae, device=DEVICE) + 1
    scale, mean = 4 / rank**0.15, 8 / rank**0.4
    chunks = [min(1024, n - i) for i in range(0, n, 1024)]
    return torch.cat([(torch.randn(rows, d_sae, device=DEVICE) * scale + mean).to(dtype) for rows in chunks])


def bench_select(size: str, n: int, d_sae: int, k: int, n_dead: int, k_aux: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for kind in ("zipf", "normal"):
            pre = zipf_pre(n, d_sae, dtype) if kind == "zipf" else torch.randn(n, d_sae, device=DEVICE).to(dtype)
            label, gigabytes = f"{kind} {str(dtype)[6:]}", pre.nbytes / 1e9
            for signed in (False, True):
                values = select.topk(pre, k, signed)[0]
                twin = (pre.abs() if signed else pre.relu()).topk(k, dim=1).values.float()
                error = difference(values.abs().sort(dim=1, descending=True).values, twin)
                run = lambda pre=pre, signed=signed: select.topk(pre, k, signed)
                for entries, tile in ((1024, 1024), (1024, 256), (512, 512), (512, 256), (256, 256), (1024, 512)):
                    select.CHOOSE_ENTRIES, select.CHOOSE_TILE = entries, tile
                    name = f"topk{' signed' if signed else ''} {label} entries={entries} tile={tile}"
                    report(size, name, run, gigabytes, error)
            report(size, f"torch.topk {label}", lambda pre=pre: pre.topk(k, dim=1, sorted=False), gigabytes)
            report(size, f"amax over the row (one read) {label}", lambda pre=pre: pre.amax(dim=1), gigabytes)
        pre = torch.randn(n, d_sae, device=DEVICE).to(dtype)
        columns = torch.randperm(d_sae, device=DEVICE)[:n_dead].sort().values
        real, dead, label = columns >= 0, pre[:, columns], str(dtype)[6:]
        bound = dead.relu().topk(k_aux, dim=1).values[:, -1:]
        twin = torch.where((dead >= bound) & (dead > 0), dead, 0)
        run = lambda pre=pre, columns=columns, real=real: select.topk_dense(pre, k_aux, False, columns, real)
        report(size, f"topk_dense {label}", run, 2 * dead.nbytes / 1e9, difference(run(), twin))
        report(size, f"torch.topk of the dead {label}", lambda: dead.topk(k_aux, dim=1), dead.nbytes / 1e9)


def bench_codes(size: str, n: int, d: int, d_sae: int, k: int) -> None:
    values, indices = select.topk(zipf_pre(n, d_sae, torch.bfloat16), k)
    fired = torch.bincount(indices.flatten(), minlength=d_sae)
    top = fired.sort(descending=True).values
    print(json.dumps({"size": size, "hottest latents fire on": top[:5].tolist(), "silent": int((fired == 0).sum())}))
    W32 = torch.randn(d_sae, d, device=DEVICE)
    x32 = torch.randn(n, d, device=DEVICE)
    pad = codes.by_latent(indices, d_sae, values)
    for dtype in (torch.bfloat16, torch.float32):
        W, x, label = W32.to(dtype), x32.to(dtype), str(dtype)[6:]
        gathered = n * k * d * W.element_size() / 1e9
        if wanted("decode"):
            twin = nnf.embedding_bag(indices, W.float(), per_sample_weights=values, mode="sum")
            error = difference(codes.decode(values, indices, W), twin)
            for block in (64, 128, 256):
                for warps in (1, 2):
                    codes.DECODE_BLOCK, codes.DECODE_WARPS = block, warps
                    name = f"decode {label} block={block} warps={warps}"
                    report(size, name, lambda W=W: codes.decode(values, indices, W), gathered, error)
            v = values.to(dtype)
            bag = lambda W=W, v=v: nnf.embedding_bag(indices, W, per_sample_weights=v, mode="sum")
            report(size, f"embedding_bag {label}", bag, gathered)
        if wanted("dots"):
            pairs = zip(indices.split(128), x.float().split(128), strict=True)
            twin = torch.cat([(W[i].float() @ g[:, :, None])[:, :, 0] for i, g in pairs])
            for span, block in ((64, 64), (128, 64), (128, 128), (256, 64), (256, 128), (256, 256), (None, 256)):
                codes.DOTS_SPAN, codes.DOTS_BLOCK = span, block
                error = difference(codes.dots(x, W, indices, values), twin * (values != 0))
                run = lambda W=W, x=x: codes.dots(x, W, indices, values)
                report(size, f"dots {label} span={span} block={block}", run, gathered, error)
        if wanted("rows"):
            gigabytes = gathered + d_sae * d * 4 / 1e9
            dense = torch.zeros(n, d_sae, device=DEVICE).scatter_(1, indices, values)
            twin = torch.cat([part.T @ x.float() for part in dense.split(8192, dim=1)])
            del dense
            for block, entries, segment in ((256, 8, 128), (256, 16, 128), (128, 8, 128), (128, 16, 128), (256, 8, 64)):
                codes.ROWS_BLOCK, codes.ROWS_ENTRIES, codes.SEGMENT = block, entries, segment
                error = difference(codes.rows(values, *pad, x)[0], twin)
                name = f"rows {label} block={block} entries={entries} segment={segment}"
                report(size, name, lambda x=x: codes.rows(values, *pad, x), gigabytes, error)
            codes.ROWS_BLOCK, codes.ROWS_ENTRIES, codes.SEGMENT = 256, 8, 128
            if DEVICE == "cuda" and dtype == torch.float32:
                flat, row = indices.flatten(), torch.arange(n * k, device=DEVICE) // k

                def index_add(x: torch.Tensor = x) -> torch.Tensor:
                    return torch.zeros_like(W32).index_add_(0, flat, values.flatten()[:, None] * x[row])

                report(size, f"index_add_ {label}", index_add, gigabytes)
    if wanted("by_latent"):
        report(size, "by_latent", lambda: codes.by_latent(indices, d_sae, values), indices.nbytes / 1e9)
        flat = indices.flatten()
        report(size, "sort of int64", lambda: flat.sort(stable=True), indices.nbytes / 1e9)


def bench_adam(size: str, d: int, d_sae: int) -> None:
    w, g = (torch.randn(d_sae, d, device=DEVICE) for _ in range(2))
    w /= w.norm(dim=1, keepdim=True)
    gigabytes = w.nbytes / 1e9
    betas, eps = (0.9, 0.999), 1e-8
    hyper = torch.tensor([1e-3, 0.1, 0.001, 1.0], device=DEVICE)
    twin = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.Adam([twin], lr=1e-3, fused=DEVICE == "cuda")
    twin.grad = g - (g * w).sum(dim=1, keepdim=True) * w
    optimizer.step()
    twin.data /= twin.data.norm(dim=1, keepdim=True)
    m, v, low = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w, dtype=torch.bfloat16)
    report(size, "squares", lambda: adam.squares(g), gigabytes, difference(adam.squares(g), g.double().square().sum()))
    report(size, "torch g.square().sum()", lambda: g.square().sum(), gigabytes)
    adam.adam_rows(w, g, m, v, low, hyper, betas, eps, unit=True)
    error = difference(w, twin.data)
    for entries in (8, 16, 32):
        adam.ENTRIES_PER_THREAD = entries
        for unit in (True, False):
            run = lambda unit=unit: adam.adam_rows(w, g, m, v, low, hyper, betas, eps, unit)
            report(size, f"adam unit={unit} entries={entries}", run, 7.5 * gigabytes, error if unit else None)
    adam.ENTRIES_PER_THREAD = 16
    report(size, "torch.optim.Adam, fused, w alone", optimizer.step, 7 * gigabytes)


def bench_jump(size: str, n: int, d_sae: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        pre, dz = (torch.randn(n, d_sae, device=DEVICE).to(dtype) for _ in range(2))
        bound, weight, label = torch.rand(d_sae, device=DEVICE) * 3, torch.tensor(0.01, device=DEVICE), str(dtype)[6:]
        z, count = jump.jump(pre, bound)
        on = pre.float() > bound
        error = max(difference(z, pre * on), difference(count, on.sum(dim=0)))
        report(size, f"jump {label}", lambda pre=pre: jump.jump(pre, bound), 2 * pre.nbytes / 1e9, error)
        report(size, f"torch jump {label}", lambda pre=pre: pre * (pre > bound), 2 * pre.nbytes / 1e9)
        near = ((pre.float() - bound).abs() < 0.5).float()
        step = near * (dz.float() * bound + weight)
        dp = dz.float() * on + step
        twins = dp.to(dtype), dp.sum(dim=0), -step.sum(dim=0)
        del near, step, dp, on
        got = jump.jump_backward(pre, bound, dz.clone(), weight, 1.0)
        error = max(difference(a, b) for a, b in zip(got, twins, strict=True))
        del got, twins
        run = lambda pre=pre, dz=dz: jump.jump_backward(pre, bound, dz, weight, 1.0)
        report(size, f"jump_backward {label}", run, 3 * pre.nbytes / 1e9, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="of select, decode, dots, rows, by_latent, adam, jump")
    arguments = parser.parse_args()
    only.update(filter(None, arguments.only.split(",")))
    torch.manual_seed(0)
    for size, (n, d, d_sae, k, n_dead, k_aux) in (TINY if arguments.tiny else SIZES).items():
        if wanted("select"):
            bench_select(size, n, d_sae, k, n_dead, k_aux)
        if not only or only & {"decode", "dots", "rows", "by_latent"}:
            bench_codes(size, n, d, d_sae, k)
        if wanted("adam"):
            bench_adam(size, d, d_sae)
        if wanted("jump"):
            bench_jump(size, n, d_sae)


if __name__ == "__main__":
    main()
