"""The Triton row kernel with other tiles than the library chooses: bytes in flight a thread, warps, registers."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import torch
from cases import HEADS, Case, bytes_moved, make_inputs
from harness import interleaved, reason
from machine import Row

from gfast.kernels import common
from gfast.kernels.rows import weighted_rows

WARPS = (4, 8, 16, 32)
VECTORS = (1, 2, 4)  # of 16 bytes, in flight a thread
WARPS_PER_SM = (32, 48)


def bench(args: argparse.Namespace) -> Iterator[Row]:
    """A row a tile, after the library's own and a copy; each is compared with the library's own before it is timed."""
    width, vocab = HEADS[args.head]
    case = Case("logits", "wga", args.head, width, vocab, args.rows, "bf16", "train", "full", args.device)
    inputs = make_inputs(case)
    logits, labels = inputs.tensors[0].flatten(0, 1), inputs.labels.flatten()
    out, one = torch.empty_like(logits), torch.ones((), device=logits.device)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return weighted_rows(logits, labels, None, 1.0, 1.0, 0.0, 0.0, one, out=out)

    def measured(name: str, call) -> Row:
        time = interleaved({name: call}, args.device, repetitions=9, budget_s=1.0)[name]
        return {"name": name, **time, "gb_per_s": round(bytes_moved(case) / time["median_ms"] / 1e6, 1)}

    yield measured("copy", lambda: out.copy_(logits))
    expected, own = step()[0].clone(), common.tile(vocab, vocab * 2, 2)
    yield {**measured("own", step), "tile": own}
    for warps, vectors, per_sm in itertools.product(WARPS, VECTORS, WARPS_PER_SM):
        groups = 32 * warps * vectors
        name = f"{warps} warps, {16 * vectors} bytes, {per_sm} warps an SM"
        tile = {"R": groups, "K": 16 // logits.itemsize, "num_warps": warps}
        if groups * tile["K"] > 2 * vocab:
            continue
        before = common.tile, common.WARPS_PER_SM
        common.tile, common.WARPS_PER_SM = (lambda *_, tile=tile, **__: dict(tile)), per_sm
        try:
            error = float((step()[0] - expected).abs().max() / expected.abs().max())
            row = measured(name, step) if error < 1e-5 else {"name": name, "wrong": f"error {error:.1e}: not timed"}
        except Exception as problem:  # more registers or threads than there are
            row = {"name": name, "failed": reason(problem)}
        finally:
            common.tile, common.WARPS_PER_SM = before
        yield {**row, "tile": tile, "warps_per_sm": per_sm}
