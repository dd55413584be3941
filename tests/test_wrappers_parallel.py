"""A model wrapped by DDP or FSDP gives every process the gradient over the batches of all of them."""

from __future__ import annotations

import pytest
from helpers import wrappers_parallel
from helpers.marks import slow_when
from helpers.training_tiny import in_processes


@slow_when(lambda p: p.name not in ("ddp", "fsdp2", "fsdp2, adapters", "fsdp1"))  # the others are settings of these
@pytest.mark.parametrize("name", wrappers_parallel.WRAPPERS)
def test_two_processes_have_the_gradient_of_both(name):
    if "adapters" in name:
        pytest.importorskip("peft")
    in_processes(wrappers_parallel.check, name, world=2)
