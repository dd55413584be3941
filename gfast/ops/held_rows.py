"""Which backend computes a loss from logits and their gradient, row by row.

The CUDA kernel (csrc/cuda/rows_kernel.cu) holds a row on the chip, in a cluster of up to eight blocks: it is read once
and its gradient written once. What does not fit goes to Triton's, whose second read hopes for the L2 cache. "auto"
takes it only where the environment has GFAST_HELD_ROWS=1, until it has been measured on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from gfast.ops.dispatch import select, why_not

PART_BYTES, MAX_BLOCKS = 2**16, 8  # rows_kernel.h's kPartBytes and kMaxBlocks


def select_rows(name: str, impl: str, logits: Tensor, out: Tensor | None, softcap: float) -> str:
    """``select`` of "unlearn_loss" for logits [N, V] whose gradient goes to ``out`` [N, V], if anywhere.

    Raises:
        ValueError: impl="cuda" for rows that its kernel does not take.
    """
    chosen = select("unlearn_loss", impl, logits.device, logits.dtype)
    if chosen != "cuda":
        return chosen
    # "auto" is decided once, and a machine may have GPUs of several kinds
    reason = why_not("unlearn_loss", "cuda", logits.device, logits.dtype) or why_not_held(logits, out, softcap)
    if not reason:
        return chosen
    if impl == "cuda":
        raise ValueError(f"gfast: {name}: impl='cuda' cannot serve these logits: {reason}. impl='triton' can.")
    return "reference" if why_not("unlearn_loss", "triton", logits.device, logits.dtype) else "triton"


def why_not_held(logits: Tensor, out: Tensor | None, softcap: float) -> str:
    """Empty when the CUDA kernel takes these rows, else the reason."""
    rows, vocab = logits.shape
    if softcap:
        return "the kernel has no soft cap"
    aligned = logits.data_ptr() % 16 == 0 and _row_bytes(logits) % 16 == 0
    touched = vocab * logits.itemsize + (0 if aligned else 16 - logits.itemsize)
    vectors = -(-touched // 16)
    if not vocab or -(-vectors // MAX_BLOCKS) * 16 > PART_BYTES or rows * MAX_BLOCKS >= 2**31:
        return (
            f"a cluster holds rows of up to {MAX_BLOCKS * PART_BYTES} bytes, not {tuple(logits.shape)} {logits.dtype}"
        )
    if out is None:
        return ""
    apart = (out.data_ptr() - logits.data_ptr()) % 16, (_row_bytes(out) - _row_bytes(logits)) % 16
    return "rows of the gradient begin at other addresses modulo 16 than those of the logits" if any(apart) else ""


def _row_bytes(x: Tensor) -> int:
    """From a row to the next."""
    return x.itemsize * (x.stride(0) if x.shape[0] > 1 else x.shape[1])
