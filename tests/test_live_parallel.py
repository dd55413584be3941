"""A GEffectMonitor over two processes measures, and makes of the gradients, what one process does of both's batches."""

from __future__ import annotations

import pytest
from helpers import live_parallel
from helpers.marks import slow_when
from helpers.training_tiny import in_processes


@slow_when(lambda p: p.name != "ddp")
@pytest.mark.parametrize(
    "name", ["ddp", "fsdp2", "ddp, tied", "fsdp2, tied", "ddp, adapters", "fsdp2, adapters", "ddp, views"]
)
def test_two_processes_measure_the_step_of_both(name):
    if "adapters" in name:
        pytest.importorskip("peft")
    in_processes(live_parallel.check, name, world=2)
