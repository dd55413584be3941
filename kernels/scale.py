"""Multiply a tensor in place by a scalar that lives on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def scale_kernel(x, scale, numel, BLOCK: tl.constexpr):
    factor = tl.load(scale).to(tl.float32)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < numel).to(tl.float32) * factor
        tl.store(x + at, value.to(x.dtype.element_ty), mask=at < numel)


def scale_(x: torch.Tensor, scale: torch.Tensor) -> None:
    """x *= scale for a contiguous x (fp32, bf16, fp16) and a 0-dim floating `scale` on the same device.

    The upstream gradient of a scalar loss is almost always 1: the kernel then returns without touching x, and the host
    never waits for the value.

    >>> scale_(grad, torch.tensor(0.5, device=grad.device))
    """
    if not x.is_contiguous():
        raise ValueError("gfast: scale_ works in place on contiguous tensors only; call .contiguous() first")
    if x.numel():
        block = min(4096, triton.next_power_of_2(x.numel()))
        with torch.cuda.device_of(x):
            scale_kernel[(triton.cdiv(x.numel(), block),)](x, scale, x.numel(), BLOCK=block, num_warps=8,
                                                            enable_fp_fusion=True)
