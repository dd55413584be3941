"""What the GPU's counters say of a call: bytes from and to memory, and the share of L2's reads that L2 could serve.

Nsight Compute (ncu) runs this program again for each op, reads the counters of all kernels of one call, and leaves the
clocks alone. It flushes the caches before each kernel.
"""

from __future__ import annotations

import argparse
import csv
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from cases import HEADS, Case, bytes_moved, make_inputs
from machine import Row

METRICS = {  # ncu's name: ours
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "lts__t_sectors_op_read_lookup_hit.sum": "l2_hits",
    "lts__t_sectors_op_read.sum": "l2_reads",
    "gpu__time_duration.sum": "ns",
}
SECONDS = 60  # an op


Step = Callable[[], object]


def weighted_rows(args: argparse.Namespace, op: str = "logits") -> tuple[Callable[[], Step], int]:
    """What makes the step, and the bytes that it must move."""
    from peers_losses import PROVIDERS

    width, vocab = HEADS[args.head]
    objective = "kl" if op == "kl" else "wga"
    case = Case(op, objective, args.head, width, vocab, args.rows, "bf16", "train", "full", args.device)
    return lambda: PROVIDERS["gfast"].make(case, make_inputs(case)), bytes_moved(case)


def kl_rows(args: argparse.Namespace) -> tuple[Callable[[], Step], int]:
    return weighted_rows(args, "kl")


def chunk_dots(args: argparse.Namespace) -> tuple[Callable[[], Step], int]:
    from grad_dot import fill, parameter_shapes

    from gfast.ops.grad_dot import grad_dots

    shapes, groups = parameter_shapes(args.model)

    def make() -> Step:
        xs, ys = (fill(shapes, torch.bfloat16, args.device, seed) for seed in (0, 1))
        return lambda: grad_dots(xs, [ys], groups, max(groups) + 1)

    return make, 2 * torch.bfloat16.itemsize * sum(math.prod(shape) for shape in shapes)


OPS = {"weighted_rows": weighted_rows, "kl_rows": kl_rows, "chunk_dots": chunk_dots}


def profiled(name: str, args: argparse.Namespace) -> None:
    """One call of the op in the profiler's sight, after two that compile and warm up."""
    step = OPS[name](args)[0]()
    for _ in range(2):
        step()
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    step()
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def bench(args: argparse.Namespace) -> Iterator[Row]:
    """A row an op: its kernels, their sums, and the bytes over those that it must move."""
    for name in OPS:
        again = [sys.executable, str(Path(__file__).with_name("run.py")), "counters", "--one", name]
        again += ["--device", args.device, "--head", args.head, "--rows", str(args.rows), "--model", args.model]
        ncu = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--metrics", ",".join(METRICS)]
        try:
            done = subprocess.run(
                [*ncu, "--csv", "--print-units", "base", *again], capture_output=True, text=True, timeout=SECONDS
            )
            kernels = read(done.stdout)
            failed = None if kernels else " ".join((done.stdout + done.stderr).split())[-300:] or "ncu said nothing"
        except (OSError, subprocess.TimeoutExpired) as problem:
            failed = f"{type(problem).__name__}: {problem}"
        if failed is not None:
            yield {"op": name, "failed": failed}
            continue
        must = OPS[name](args)[1]
        moved = sum(kernel["bytes_read"] + kernel["bytes_written"] for kernel in kernels)
        yield {"op": name, "kernels": kernels, "bytes": moved, "must": must, "of_bytes": round(moved / must, 4)}


def read(text: str) -> list[Row]:
    """The kernels of ncu's table, a line a metric, in the order of their launches."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, Row] = {}
    for line in csv.DictReader(lines[start:]):
        ours = METRICS.get(line.get("Metric Name") or "")
        if ours is not None:
            kernel = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
            kernel[ours] = int(float(line["Metric Value"].replace(",", "")))
    for kernel in kernels.values():
        hits, reads = kernel.pop("l2_hits", 0), kernel.pop("l2_reads", 0)
        kernel["l2_hits"] = round(hits / reads, 4) if reads else None
    return [kernel for kernel in kernels.values() if {"bytes_read", "bytes_written"} <= set(kernel)]
