"""grad_dot over all parameters of a Llama against the speed at which the device reads memory.

    python bench/grad_dot.py                                 # CPU: the tensors of SmolLM2-135M
    python bench/grad_dot.py --device cuda --json grad_dot.json   # the 291 tensors of Llama-2-7B

The floor is each list read once, at the bandwidth of the faster of a sum and a copy over one large tensor, timed in the
same rounds. Beside it what PyTorch offers, a dot a tensor: it too reads each list once, but in 291 launches, without
the squares, and sums in the tensors' dtype. Nothing is timed before the results agree with fp64.
"""

from __future__ import annotations

import argparse
import sys

import torch
from _timing import environment, interleaved, write_json

from gfast.ops.grad_dot import grad_dots

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODELS = {  # vocabulary, hidden, intermediate, layers, width of keys and values, tied head
    "smollm2-135m": (49152, 576, 1536, 30, 192, True),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 512, True),
    "llama-2-7b": (32000, 4096, 11008, 32, 4096, False),
}
LAW = 0.85


def parameter_shapes(model: str) -> tuple[list[tuple[int, ...]], list[int]]:
    """Shapes of all parameters, and the group of each by layer: 0 embeddings, 1..L blocks, L + 1 the rest."""
    vocabulary, hidden, wide, layers, narrow, tied = MODELS[model]
    block = [(hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden)]
    block += [(wide, hidden), (wide, hidden), (hidden, wide), (hidden,), (hidden,)]
    shapes, groups = [(vocabulary, hidden)], [0]
    for layer in range(layers):
        shapes += block
        groups += [layer + 1] * len(block)
    last = [(hidden,)] if tied else [(hidden,), (vocabulary, hidden)]
    return shapes + last, groups + [layers + 1] * len(last)


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


def bench(xs, directions, groups: list[int], device: str, repetitions: int) -> list[dict[str, object]]:
    """One row per provider; the floors are timed in the same rounds, as a shared machine's speed changes."""
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
    times = interleaved(steps, device, repetitions)
    speed = {name: moved.get(name, nbytes) / time["median_ms"] * 1e3 for name, time in times.items()}
    bandwidth = max(speed["sum"], speed["copy"])
    rows = []
    for name, time in times.items():
        row = {"provider": name, "bytes": moved.get(name, nbytes), **time, "gb_per_s": round(speed[name] / 1e9, 1)}
        row["of_read_bandwidth"] = round(speed[name] / bandwidth, 3)
        if name == "gfast":
            row |= {"error": error, "law": LAW, "law_met": row["of_read_bandwidth"] >= LAW}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", choices=MODELS, help="default: llama-2-7b on a GPU, else smollm2-135m")
    parser.add_argument("--pairs", default="bf16:bf16,bf16:fp32,fp32:fp32", help="dtypes of gradient:direction")
    parser.add_argument("--directions", default="1,2")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", help="file name under bench/results/DEVICE, or a path; written after every case")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = args.model or ("llama-2-7b" if args.device == "cuda" else "smollm2-135m")
    shapes, groups = parameter_shapes(model)
    print(f"{model}: {len(shapes)} tensors")

    results = []
    for pair in args.pairs.split(","):
        x_type, y_type = (DTYPES[name] for name in pair.split(":"))
        xs = fill(shapes, x_type, args.device, 0)
        for count in map(int, args.directions.split(",")):
            directions = [fill(shapes, y_type, args.device, d + 1) for d in range(count)]
            for row in bench(xs, directions, groups, args.device, args.repetitions):
                results.append({"case": pair, "directions": count, **row})
                share = row["of_read_bandwidth"]
                law = f"law {LAW:.0%}: {'met' if row['law_met'] else 'MISSED'}" if "law" in row else ""
                print(
                    f"{pair} x{count} {row['provider']:<10} {row['median_ms']:9.3f} ms {row['gb_per_s']:7.1f} GB/s "
                    f"{share:6.1%}  {law}".rstrip(),
                    flush=True,
                )
            if args.json:  # at once: a later case that dies loses nothing
                write_json(args.json, {"environment": environment(args.device), "model": model, "rows": results})
            del directions
        del xs


if __name__ == "__main__":
    main()
