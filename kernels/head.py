"""Softmax statistics of an output head without logits: the GEMM's tiles are folded as they leave the matrix units.

Every program takes some rows and a run of the vocabulary, and keeps (maximum, sum of exps) of it a row; the runs are
merged in a fixed order. The logits are rounded to their dtype on the way, so that they are those of the chunked head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

from gfast.kernels.common import LOWEST, cap_scale

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
PROGRAMS = 512  # about four a multiprocessor of the largest GPUs; fixed, so that results do not depend on the GPU


def tile(itemsize: int) -> dict[str, int]:
    """Tiles of the GEMM: 64 accumulators a thread leave registers for the exps of the epilogue."""
    if itemsize == 2:
        return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
    return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2}


@triton.jit
def head_stats_kernel(hidden, hidden_stride, weight, weight_stride, bias, labels, top, rest, target, N, V, D, run,
                      scale: tl.constexpr, softcap: tl.constexpr, has_bias: tl.constexpr, LOGITS: tl.constexpr,
                      PRODUCT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """top, rest, target [runs, N]: of the columns [split run, (split + 1) run) of the head."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    inside = rows < N
    y = tl.load(labels + rows, mask=inside, other=-1).to(tl.int32)  # [BM]; 64 bits would cost registers
    # beyond the last row or column the last one is read again: a mask would cost registers, and nothing of it is kept
    h_rows = hidden + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * hidden_stride + tl.arange(0, BK)[None, :]
    m = tl.full((BM,), LOWEST, tl.float32)
    s = tl.zeros((BM,), tl.float32)
    z_y = tl.zeros((BM,), tl.float32)
    first = split * run
    end = tl.minimum(first + run, V)
    for start in range(first, end, BN):
        columns = start + tl.arange(0, BN)
        h_at = h_rows
        w_at = weight + tl.minimum(columns, V - 1).to(tl.int64)[:, None] * weight_stride + tl.arange(0, BK)[None, :]
        z = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            left = tl.arange(0, BK)[None, :] < D - k
            h = tl.load(h_at, mask=left, other=0.0)  # [BM, BK]
            w = tl.load(w_at, mask=left, other=0.0)  # [BN, BK]
            z = tl.dot(h.to(PRODUCT), tl.trans(w.to(PRODUCT)), z, input_precision="ieee")
            h_at += BK
            w_at += BK
        if has_bias:
            z += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        z = cap_scale(z.to(LOGITS), scale, softcap)  # [BM, BN]
        own = columns[None, :] == y[:, None]
        z_y += tl.sum(tl.where(own, z, 0.0), 1)
        z = tl.where(own | (columns[None, :] >= end), float("-inf"), z)
        m_new = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new[:, None]), 1)
        m = m_new
    at = split.to(tl.int64) * N + rows
    tl.store(top + at, m, mask=inside)
    tl.store(rest + at, s, mask=inside)
    tl.store(target + at, z_y, mask=inside)


def head_stats(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    labels: torch.Tensor,  # [N] int64
    scale: float = 1.0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[3, N] fp32: maximum of a row's logits but its label's, sum of their exps relative to it, logit of the label.

    A label that is no row of the head leaves nothing out and has the logit 0. Nothing waits for the device.

    >>> head_stats(torch.ones(2, 16), torch.ones(5, 16), None, torch.tensor([0, 3]))
    """
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    rows, width = hidden.shape
    vocab = weight.shape[0]
    if weight.shape[1] != width or weight.dtype != hidden.dtype:
        raise ValueError(
            f"gfast: a head {tuple(weight.shape)} {weight.dtype} does not fit hidden states {tuple(hidden.shape)} "
            f"{hidden.dtype}"
        )
    if rows == 0:
        return hidden.new_empty((3, 0), dtype=torch.float32)
    options = tile(hidden.itemsize)
    blocks = triton.cdiv(rows, options["BM"])
    tiles = triton.cdiv(vocab, options["BN"])
    run = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // blocks))) * options["BN"]
    splits = triton.cdiv(vocab, run)
    # the interpreter multiplies 16-bit numbers wrongly
    product = tl.float32 if knobs.runtime.interpret else DTYPES[hidden.dtype]
    parts = torch.empty(3, splits, rows, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        # programs that run together share the run of the vocabulary: it is read from memory once
        head_stats_kernel[(blocks, splits)](
            hidden, hidden.stride(0), weight, weight.stride(0), weight if bias is None else bias.contiguous(),
            labels.contiguous(), parts[0], parts[1], parts[2], rows, vocab, width, run, float(scale), float(softcap),
            bias is not None, LOGITS=DTYPES[hidden.dtype], PRODUCT=product, **options)
    top = parts[0].amax(0)  # [N]
    rest = (parts[1] * torch.exp(parts[0] - top)).sum(0)
    return torch.stack([top, rest, parts[2].sum(0)])
