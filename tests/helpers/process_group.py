"""A process group of one, inside the test process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Of PyTorch's fake backend, which has no threads: what a group of one sums and gathers is there already.

    Gloo's threads need the GIL to let go of their last work, and its destructor joins them while it holds the GIL: a
    thread that comes late on a busy machine would wait for ever.
    """
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def alone_with(tensor: torch.Tensor, mesh, placement):
    """``tensor`` as a DTensor of the only process of a mesh. Nothing is sent: `distribute_tensor` of torch 2.11 sends
    also in a group of one, and what the fake backend is to receive stays as it was in memory."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, mesh, [placement], src_data_rank=None)
