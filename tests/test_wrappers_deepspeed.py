"""DeepSpeed's own engine, where it is installed: ZeRO-2, and ZeRO-3 with the head's weight gathered for the loss."""

from __future__ import annotations

import pytest
from helpers import deepspeed_parallel
from helpers.training_tiny import in_processes


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_have_the_gradient_of_both(stage):
    pytest.importorskip("deepspeed")
    in_processes(deepspeed_parallel.check, stage, world=2)
