"""grad_dot over all parameters of a Llama against the speed at which the device reads memory."""

from __future__ import annotations

import argparse
import sys

import torch
from cases import DTYPES, MODELS
from harness import interleaved
from laws import READ, verdict
from machine import Row

from gfast.ops.grad_dot import grad_dots


def parameter_shapes(name: str) -> tuple[list[tuple[int, ...]], list[int]]:
    """Shapes of all parameters, and the group of each by layer: 0 embeddings, 1..L blocks, L + 1 the rest."""
    model = MODELS[name]
    hidden, wide, narrow = model.hidden, model.intermediate, model.hidden // model.heads * model.kv_heads
    block = [(hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden)]
    block += [(wide, hidden), (wide, hidden), (hidden, wide), (hidden,), (hidden,)]
    shapes, groups = [(model.vocab, hidden)], [0]
    for layer in range(model.layers):
        shapes += block
        groups += [layer + 1] * len(block)
    last = [(hidden,)] if model.tied else [(hidden,), (model.vocab, hidden)]
    return shapes + last, groups + [model.layers + 1] * len(last)


def fill(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(s, generator=generator, device=device, dtype=dtype) for s in shapes]


def check(xs, directions, groups: list[int]) -> float:
    """Largest error of a cell, relative to the product of the norms. Exits when wrong."""
    ours = grad_dots(xs, directions, groups, max(groups) + 1)
    exact = grad_dots(xs, directions, groups, max(groups) + 1, impl="reference")
    norms = [grad_dots(ys, [], groups, max(groups) + 1, impl="reference")[:, 0].sqrt() for ys in [*directions, xs]]
    scale = torch.stack(norms, 1) * norms[-1][:, None]
    worst = float(((ours - exact).abs() / scale).max())
    if not worst < 1e-6:
        sys.exit(f"grad_dots is wrong: error {worst:.2e} of the norms' product; nothing was timed")
    return worst


def dot_by_dot(xs, directions) -> list[torch.Tensor]:
    return [torch.dot(x.flatten(), y.flatten()) for ys in directions for x, y in zip(xs, ys, strict=True)]


def bench(model: str, pair: str, count: int, args: argparse.Namespace) -> list[Row]:
    """One row a provider; the floors are timed in the same rounds, as a shared machine's speed changes."""
    device, (shapes, groups) = args.device, parameter_shapes(model)
    x_type, y_type = (DTYPES[name] for name in pair.split(":"))
    xs = fill(shapes, x_type, device, 0)
    directions = [fill(shapes, y_type, device, seed + 1) for seed in range(count)]
    error = check(xs, directions, groups)
    nbytes = sum(t.nbytes for ts in [xs, *directions] for t in ts)
    large = torch.ones((1 << 32 if device == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(large)
    steps = {
        "sum": lambda: large.sum(),
        "copy": lambda: target.copy_(large),
        "gfast": lambda: grad_dots(xs, directions, groups, max(groups) + 1),
    }
    if all(y.dtype == x.dtype for ys in directions for x, y in zip(xs, ys, strict=True)):
        steps["torch.dot"] = lambda: dot_by_dot(xs, directions)
    moved = {"sum": large.nbytes, "copy": 2 * large.nbytes}
    times = interleaved(steps, device, args.repetitions)
    # On a GPU the dots' time begins on the host, with an idle device; the floors' is the device's.
    taken = {
        name: time["median_ms"] if name in moved else time.get("wall_ms", time["median_ms"])
        for name, time in times.items()
    }
    speed = {name: moved.get(name, nbytes) / ms * 1e3 for name, ms in taken.items()}
    bandwidth = max(speed["sum"], speed["copy"])
    rows = []
    for name, time in times.items():
        row = {
            "case": pair,
            "directions": count,
            "provider": name,
            "bytes": moved.get(name, nbytes),
            **time,
            "gb_per_s": round(speed[name] / 1e9, 1),
        }
        row["of_read_bandwidth"] = round(speed[name] / bandwidth, 3)
        if name == "gfast":
            row |= {"error": error, **verdict(row["of_read_bandwidth"], READ, at_least=True)}
        rows.append(row)
    return rows
