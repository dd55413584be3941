"""A profiled call: named ranges put around gfast's functions from outside, a trace for Perfetto, the top ops.

The ranges exist only during the profile: the functions themselves carry none, so they cost nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from machine import Row
from torch.profiler import ProfilerActivity, profile, record_function

TOP = 12  # ops shown


@contextlib.contextmanager
def named(where: dict[str, str]) -> Iterator[None]:
    """Wrap "package.module:Name.attribute" -> range name for the time."""
    with contextlib.ExitStack() as undo:
        for path, label in where.items():
            module, _, attribute = path.partition(":")
            *outer, name = attribute.split(".")
            owner = functools.reduce(getattr, outer, importlib.import_module(module))
            function = getattr(owner, name)
            undo.callback(setattr, owner, name, function)
            setattr(owner, name, _ranged(function, label))
        yield


def _ranged(function: Callable, label: str) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    return call


def profiled(step: Callable[[], object], where: dict[str, str], args: argparse.Namespace, name: str) -> Row:
    """Run a step under the profiler; leaves a trace, prints the ranges and the top ops, returns both as rows.

    The trace is the file NAME_DEVICE.json. The first call is not profiled. Times of ranges contain what runs inside
    them; those of ops do not.
    """
    trace, cuda = args.traces / f"{name}_{args.device}.json", args.device == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with named(where):
        step()
        with profile(activities=activities, record_shapes=False) as run:
            with record_function("step"):
                step()
                if cuda:
                    torch.cuda.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    run.export_chrome_trace(str(trace))
    events = run.key_averages()
    whole = next(e for e in events if e.key == "step").cpu_time_total
    labels = set(where.values())
    ranges = [
        {
            "range": e.key,
            "calls": e.count,
            "ms": round(e.cpu_time_total / 1e3, 3),
            "device_ms": round(e.device_time_total / 1e3, 3) if cuda else None,
            "share": round(e.cpu_time_total / whole, 4),
        }
        for e in events
        if (e.key in labels or e.key.startswith("gfast::")) and e.cpu_time_total > 0
    ]
    ranges.sort(key=lambda row: -row["ms"])
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    ops = [
        {
            "op": e.key,
            "calls": e.count,
            "self_ms": round(e.self_cpu_time_total / 1e3, 3),
            "self_device_ms": round(e.self_device_time_total / 1e3, 3) if cuda else None,
        }
        for e in sorted(events, key=lambda e: -getattr(e, order))
        if e.key not in labels and e.key != "step"
    ][:TOP]
    print(f"step: {whole / 1e3:.2f} ms on the host; ranges (with what runs inside them):")
    for row in ranges:
        there = f"{row['device_ms']:>10.2f} ms device" if cuda else ""
        print(f"  {row['range']:<40}{row['calls']:>7} x {row['ms']:>10.2f} ms {row['share']:>7.1%}{there}")
    print(events.table(sort_by=order, row_limit=TOP, max_name_column_width=60))
    print(f"trace: {trace} (open it in ui.perfetto.dev or chrome://tracing)")
    return {"step_ms": round(whole / 1e3, 3), "ranges": ranges, "ops": ops}
