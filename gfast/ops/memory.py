"""Memory of gradients and logits: where it comes from, and ``empty_cache``, which gives back what is kept for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gfast.ops.dispatch import compiled


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pooled: bool = True) -> Tensor:
    """Uninitialised memory for a gradient or a chunk of logits.

    On a CPU 4 MiB and more come from the extension's pool: what a step frees, the next one takes. New memory is zeroed
    by the system first, which takes longer than the kernel that fills it.

    Not ``pooled`` is what an optimizer step keeps, a weight's gradient: while it lives, a block freed beside it would
    lie idle through the rest of the backward. It is new memory in huge pages, zeroed in a twentieth of the time of the
    product that fills it from 134 rows, and given back once it is freed.
    """
    name = "fresh" if pooled or not compiled("unpooled") else "unpooled"
    if device.type == "cpu" and math.prod(shape) * dtype.itemsize >= 2**22 and compiled(name):
        return getattr(torch.ops.gfast, name)(list(shape), dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def empty_cache() -> int:
    """Gives the system back the CPU memory of freed gradients that gfast holds for the next ones.

    The size of what a loss allocates on a CPU (gradients of logits, chunks of logits) repeats from step to step, and
    new memory costs more than the kernel that fills it: from 4 MiB on, memory that is freed is kept. At most
    an eighth of the memory there is for this process (the machine's, or less by the limits of its control groups;
    ``GFAST_POOL_MIB`` sets another limit, 0 keeps nothing), and no block for longer than a minute in which nobody takes
    it (``GFAST_POOL_SECONDS``), counted when the next one is taken or freed. Memory on a GPU is PyTorch's own:
    ``torch.cuda.empty_cache()``.

    Args:
        None.

    Returns:
        Bytes given back. Tensors in use keep theirs. 0 where the compiled extension is missing, which keeps nothing.

    Raises:
        ValueError: ``GFAST_POOL_MIB`` or ``GFAST_POOL_SECONDS`` is not a whole number.

    Source: none; PyTorch's function of that name does the same on GPUs.

    Example:
        >>> import gfast
        >>> _ = gfast.empty_cache()
        >>> gfast.empty_cache()
        0
    """
    return torch.ops.gfast.empty_cache() if compiled("empty_cache") else 0
