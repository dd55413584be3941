# SPDX-License-Identifier: Apache-2.0
"""What one process of a job does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gfast import wrappers


def together(action: Callable[[], Any] | None, processes: int) -> None:
    """Do what may fail in one process only (None: nothing is to be done in this one); where it fails, all of them
    raise, so that none waits for ever.
    """
    error = None
    try:
        if action is not None:
            action()
    except Exception as raised:
        error = raised
    if processes > 1:
        from accelerate.utils import gather_object

        told = [text for text in gather_object([None if error is None else str(error)]) if text is not None]
        if told and error is None:
            raise RuntimeError(told[0])
    if error is not None:
        raise error


def shares_of(model: nn.Module, args: Any) -> tuple[int, int]:
    """In how many shares processes divide batches among them, and which of these is this one's: those that hold a
    tensor-parallel model together need the same, at the same time.
    """
    together_with = wrappers.tensor_parallel_over(model)
    return max(args.world_size // together_with, 1), args.process_index // together_with
