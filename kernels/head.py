"""Softmax statistics of an output head, a tile of logits at a time: the library multiplies, this folds what it wrote.

A tile is small enough to be read from the L2 cache, so that logits never pass through memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gfast.kernels.common import cap_scale, check_rows, exp_exact, launch, max_and_sum


@triton.jit(do_not_specialize=["first", "N"])
def fold_rows_kernel(logits, row_stride, labels, first, state, N, V, scale: tl.constexpr, softcap: tl.constexpr,
                     R: tl.constexpr, K: tl.constexpr):
    for i in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        row = logits + i * row_stride
        y = tl.load(labels + i) - first
        here = (y >= 0) & (y < V)
        if here:
            tl.store(state + 2 * N + i, cap_scale(tl.load(row + y), scale, softcap).to(tl.float64))
        top, rest = max_and_sum(row, tl.where(here, y, -1), V, scale, softcap, "", R, K)
        # maxima are fp32 numbers, here too; sums over many tiles are not rounded once a tile
        before = tl.load(state + i).to(tl.float32)
        now = tl.maximum(before, top)
        total = tl.load(state + N + i) * exp_exact(before - now).to(tl.float64)
        total += rest.to(tl.float64) * exp_exact(top - now).to(tl.float64)
        tl.store(state + i, now.to(tl.float64))
        tl.store(state + N + i, total)


def fold_rows(
    logits: torch.Tensor,  # [N, t]
    labels: torch.Tensor,  # [N] int64
    first: int,
    scale: float,
    softcap: float,
    state: torch.Tensor,  # [3, N] fp64
) -> None:
    """Adds logits of the vocabulary entries first to first + t to the statistics of their rows.

    ``state``: maximum of a row's logits but its label's, sum of their exps relative to it, logit of the label; -inf, 0,
    -inf before the first tile. A label elsewhere leaves the last as it is.

    >>> state = torch.tensor([[-torch.inf], [0.0], [-torch.inf]], dtype=torch.float64).repeat(1, 2)
    >>> fold_rows(torch.ones(2, 16), torch.tensor([0, 3]), 0, 1.0, 0.0, state)
    """
    rows, width = logits.shape
    check_rows("logits", logits, (rows, width))
    if state.shape != (3, rows) or not state.is_contiguous() or state.dtype != torch.float64:
        raise ValueError(f"gfast: state must be contiguous fp64 {(3, rows)}, not {state.dtype} {tuple(state.shape)}")
    if rows and width:
        grid, options = launch(logits)
        with torch.cuda.device_of(logits):
            fold_rows_kernel[grid](logits, logits.stride(0), labels.contiguous(), first, state, rows, width,
                                   float(scale), float(softcap), **options)
