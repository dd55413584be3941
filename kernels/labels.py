"""Labels in one small kernel: are they all in range, and one over the number of those that count."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, OPTIONS = 4096, {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["N", "V"])
def label_factor_kernel(labels, factor, good, N, V, B: tl.constexpr):
    at = tl.arange(0, B)
    counted = tl.zeros((B,), tl.int32)
    bad = tl.zeros((B,), tl.int32)
    for start in range(0, N, B):
        y = tl.load(labels + start + at, mask=at < N - start, other=-100)
        valid = y != -100
        counted += valid.to(tl.int32)
        bad |= (valid & ((y < 0) | (y >= V))).to(tl.int32)
    count = tl.maximum(tl.sum(counted, 0), 1).to(tl.float32)
    tl.store(factor, tl.div_rn(1.0, count))
    tl.store(good, tl.max(bad, 0) == 0)


def label_factor(labels: torch.Tensor, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / max(1, number of labels [N] that are not -100), fp32, and whether each is in [0, V) or -100, bool; 0-dim.

    >>> factor, good = label_factor(torch.tensor([3, -100], device="cuda"), 32000)
    """
    factor = torch.empty((), dtype=torch.float32, device=labels.device)
    good = torch.empty((), dtype=torch.bool, device=labels.device)
    with torch.cuda.device_of(labels):
        label_factor_kernel[(1,)](labels.contiguous(), factor, good, labels.shape[0], vocab, B=BLOCK, **OPTIONS)
    return factor, good
