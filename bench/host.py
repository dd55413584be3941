"""What a call costs on the host: all but the kernels, which are stubbed or have next to nothing to do."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import interleaved
from machine import Row

import gfast
from gfast.objectives import WGA
from gfast.ops import checks, dispatch

TENSORS = 291  # of Llama-2-7B
ROWS, VOCAB = (2, 8), 64
CALLS = 50  # that one time is taken of


def losses(impl: str) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*ROWS, VOCAB, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(0, VOCAB, ROWS, generator=generator)
    constant = logits.detach()

    def backward() -> None:
        gfast.unlearn_loss(logits, labels, WGA(), impl=impl).loss.backward()
        logits.grad = None

    return {
        f"unlearn_loss, {impl}": lambda: gfast.unlearn_loss(logits, labels, WGA(), impl=impl),
        f"unlearn_loss, {impl}, no gradient": lambda: gfast.unlearn_loss(constant, labels, WGA(), impl=impl),
        f"unlearn_loss, {impl}, and backward": backward,
    }


def dots() -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    xs, ys = ([torch.randn(8, generator=generator) for _ in range(TENSORS)] for _ in range(2))
    groups = [t % 5 for t in range(TENSORS)]
    return {f"grad_dot, {TENSORS} tensors": lambda: gfast.grad_dot(xs, ys, groups, 5)}


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Triton's launchers up to the launch itself, which does nothing, on a device whose values the host cannot read."""
    from triton.runtime.interpreter import InterpretedFunction

    launched, read, check = InterpretedFunction.__getitem__, checks.reads_are_free, torch._assert_async
    InterpretedFunction.__getitem__ = lambda self, grid: lambda *args, **options: None
    checks.reads_are_free, torch._assert_async = lambda device: False, lambda good, message: None
    try:
        yield
    finally:
        InterpretedFunction.__getitem__, checks.reads_are_free, torch._assert_async = launched, read, check


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> list[Row]:
    """Times of so many calls one after the other, as a single one would find the caches full of the others' code."""

    def repeated(call: Callable[[], object]) -> None:
        for _ in range(CALLS):
            call()

    times = interleaved({name: partial(repeated, call) for name, call in calls.items()}, "cpu", rounds, warmup=10)
    return [
        {"provider": name, "us_a_call": round(1e3 * time["median_ms"] / CALLS, 1), "calls": CALLS, **time}
        for name, time in times.items()
    ]


def bench(args: argparse.Namespace) -> list[Row]:
    """One row a call. The kernels of the CPU are not stubbed, but have next to nothing to do."""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    rows = []
    for impl, around in (("cpp", contextlib.nullcontext), ("triton", as_on_a_gpu)):
        if reason := dispatch.why_not("unlearn_loss", impl, "cpu"):
            rows.append({"provider": f"unlearn_loss, {impl}", "skipped": reason})
            continue
        with around():
            rows += timed(losses(impl), args.repetitions)
    if reason := dispatch.why_not("grad_dot", "cpp", "cpu"):
        return [*rows, {"provider": "grad_dot", "skipped": reason}]
    return rows + timed(dots(), args.repetitions)
