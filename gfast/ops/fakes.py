"""What the compiled ops return for fake tensors. ``dispatch.extension`` imports this once the ops are there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _grad_dots(xs: list[Tensor], ys: list[Tensor], groups: list[int], num_groups: int, num_dirs: int) -> Tensor:
    device = xs[0].device if len(xs) else "cpu"
    return torch.empty(num_groups, num_dirs + 1, dtype=torch.float64, device=device)


def _label_factor(op: str, labels: Tensor, vocab: int) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=labels.device)


def _written(op: str) -> Callable:
    """Of an op that only writes to its last argument, which must be as free of values as the others."""

    def fake(*args) -> None:
        devices = sorted({x.device.type for x in args if isinstance(x, Tensor)})
        if len(devices) > 1:
            raise ValueError(f"gfast: {op}: tensors on {' and '.join(devices)}; move all to one device.")

    return fake


_WRITING = ("mixed_mm", "head_grad_hidden", "head_grad_weight")
for _op, _fake in {
    "grad_dots": _grad_dots,
    "label_factor": _label_factor,
    **{op: _written(op) for op in _WRITING},
}.items():
    if hasattr(torch.ops.gfast, _op):  # an older build may not hold it
        torch.library.register_fake(f"gfast::{_op}", _fake)
