"""Multiply a tensor in place by a scalar that lives on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096  # elements of one program and step: 32 or 64 bytes a thread
PROGRAMS_PER_SM = 8


@triton.jit(do_not_specialize=["numel"])
def scale_kernel(x, scale, numel, BLOCK: tl.constexpr):
    factor = tl.load(scale).to(tl.float32)
    if factor != 1.0:
        blocks = numel // BLOCK
        at = x + tl.arange(0, BLOCK)
        for i in range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
            value = tl.load(at + i * BLOCK).to(tl.float32) * factor
            tl.store(at + i * BLOCK, value.to(x.dtype.element_ty))
        if tl.program_id(0) == 0:
            rest = blocks.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(x + rest, mask=rest < numel).to(tl.float32) * factor
            tl.store(x + rest, value.to(x.dtype.element_ty), mask=rest < numel)


def scale_(x: torch.Tensor, scale: torch.Tensor) -> None:
    """x *= scale for a contiguous x (fp32, bf16, fp16) and a 0-dim floating `scale` on the same device.

    The upstream gradient of a scalar loss is almost always 1: the kernel then returns without touching x, and the host
    never waits for the value. No more programs start than run at once, as each reads the scalar.

    >>> scale_(grad, torch.tensor(0.5, device=grad.device))
    """
    if not x.is_contiguous():
        raise ValueError("gfast: scale_ works in place on contiguous tensors only; call .contiguous() first")
    if x.numel():
        programs = 2  # the interpreter runs them one after the other
        if x.is_cuda:
            programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(x.device).multi_processor_count
        with torch.cuda.device_of(x):
            scale_kernel[(min(programs, triton.cdiv(x.numel(), BLOCK)),)](
                x, scale, x.numel(), BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True)
