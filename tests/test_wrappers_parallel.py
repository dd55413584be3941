"""A model wrapped by DDP or FSDP gives every process the gradient over the batches of all of them."""

from __future__ import annotations

import socket

import pytest
import torch
from helpers import wrappers_parallel
from helpers.marks import slow_when
from helpers.training_tiny import server


def two_processes(check, name):
    """Run check(name, rank, world, port) in two processes."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = server()
    processes = [context.Process(target=check, args=(name, rank, 2, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    left = [process for process in processes if process.is_alive()]
    for process in left:
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0] and not left


@slow_when(lambda p: p.name not in ("ddp", "fsdp2", "fsdp2, adapters", "fsdp1"))  # the others are settings of these
@pytest.mark.parametrize("name", wrappers_parallel.WRAPPERS)
def test_two_processes_have_the_gradient_of_both(name):
    if "adapters" in name:
        pytest.importorskip("peft")
    two_processes(wrappers_parallel.check, name)
