"""Row dots of a GEMM that is never stored: out_t = b_t . (G a_t), with the row dot as the epilogue of each tile."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

MOST_ROWS = 128  # of a tile
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def tile(a: torch.dtype, direction: torch.dtype, aligned: bool = True) -> dict[str, Any]:
    """Tiles of the GEMM, the dtype of its factors, and in how many parts of that dtype the direction is multiplied.

    Products of 16-bit numbers are exact in fp32 and go to the matrix units. So do those of bf16 inputs and an fp32
    direction: it is the sum of three bf16 numbers, and three such products cost a fraction of one in fp32, which only
    the ordinary units do exactly. Where rows are not `aligned`, every element has its address and mask, and a
    quarter of the tile fits the registers.
    """
    side = MOST_ROWS if aligned else 64
    if a == direction and a.itemsize == 2:
        return {"PRODUCT": DTYPES[a], "PARTS": 1, "BM": side, "BN": side, "BK": 64, "num_warps": 8, "num_stages": 3}
    if (a, direction) == (torch.bfloat16, torch.float32):
        return {"PRODUCT": tl.bfloat16, "PARTS": 3, "BM": side, "BN": side, "BK": 32, "num_warps": 8, "num_stages": 3}
    return {"PRODUCT": tl.float32, "PARTS": 1, "BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2}


@triton.jit
def row_dot_kernel(a, a_stride, b, b_stride, g, g_stride, out, n, d_in, d_out, splits, PRODUCT: tl.constexpr,
                   PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out[row, split] fp64: the columns of G a that this split takes, times b. Splits are added by the launcher."""
    row = tl.arange(0, BM)
    first = tl.program_id(0).to(tl.int64) * BM
    split = tl.program_id(1)
    inside = first + row < n
    # one 64-bit pointer and 32-bit offsets: where a stride is odd every element's address is held in registers
    a += first * a_stride
    b += first * b_stride
    at_k = tl.arange(0, BK)[None, :]
    column = tl.arange(0, BN)
    total = tl.zeros((BM,), tl.float64)
    for start in range(split * BN, d_out, splits * BN):
        here = start + column < d_out
        g_here = g + tl.cast(start, tl.int64) * g_stride
        product = tl.zeros((BM, BN), tl.float32)
        for k in range(0, d_in, BK):
            left = at_k < d_in - k
            x = tl.load(a + k + (row[:, None] * a_stride + at_k), mask=inside[:, None] & left, other=0.0)  # [BM, BK]
            w = tl.load(g_here + k + (column[:, None] * g_stride + at_k), mask=here[:, None] & left, other=0.0)
            x = x.to(PRODUCT)
            if PARTS == 1:
                product = tl.dot(x, tl.trans(w.to(PRODUCT)), product, input_precision="ieee")
            else:
                for _ in tl.static_range(PARTS):  # 8 bits each of w's 24
                    part = w.to(tl.bfloat16)  # [BN, BK]
                    product = tl.dot(x, tl.trans(part.to(PRODUCT)), product, input_precision="ieee")
                    w -= part.to(tl.float32)
        y = tl.load(b + start + (row[:, None] * b_stride + column[None, :]), mask=inside[:, None] & here[None, :],
                    other=0.0)  # [BM, BN]
        total += tl.sum(product * y.to(tl.float32), 1).to(tl.float64)  # [BM]
    tl.store(out + (first + row) * splits + split, total, mask=inside)


def near(x: torch.Tensor) -> torch.Tensor:
    """x [n, D], or a copy of it: neighbouring columns, and rows so near that the kernel's offsets have 32 bits.

    An offset that wraps around reads other memory than x's. Rows lie that far apart where they are cut out of a tensor
    of more dimensions, x[:, 0] of [n, T, D] say.
    """
    apart = x.stride(0) * (min(x.shape[0], MOST_ROWS) - 1) + x.shape[1]
    return x if x.stride(-1) == 1 and apart < 2**31 else x.contiguous()


def linear_row_dot(a: torch.Tensor, b: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """fp64 [n] from a [n, D_in], b [n, D_out] and the direction [D_out, D_in], fp32, bf16 or fp16 in any mixture.

    >>> linear_row_dot(torch.ones(1, 2), torch.ones(1, 3), torch.ones(3, 2))
    """
    a, b, direction = map(near, (a, b, direction))
    n, d_in = a.shape
    d_out = b.shape[1]
    aligned = all(x.data_ptr() % 16 == x.stride(0) % 16 == x.shape[1] % 16 == 0 for x in (a, b, direction))
    options = tile(a.dtype, direction.dtype, aligned)
    if knobs.runtime.interpret:  # its 16-bit products are wrong: it multiplies the same values in fp32
        options["PRODUCT"] = tl.float32
    blocks = triton.cdiv(n, options["BM"])
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 2
    splits = max(1, min(triton.cdiv(d_out, options["BN"]), triton.cdiv(2 * programs, max(blocks, 1))))
    out = a.new_empty((n, splits), dtype=torch.float64)
    if n:
        with torch.cuda.device_of(a):
            row_dot_kernel[(blocks, splits)](a, a.stride(0), b, b.stride(0), direction, direction.stride(0), out, n,
                                             d_in, d_out, splits, enable_fp_fusion=True, **options)
    return out.sum(1)
