"""Several processes measure what one does, of a model that each holds whole or of which each holds a shard."""

from __future__ import annotations

import pytest
from helpers import geffect_parallel
from helpers.marks import slow_when
from helpers.training_tiny import in_processes


# four, so that shards have copies: what two hold, four do
@slow_when(lambda p: p.name == "sharded")
@pytest.mark.parametrize(("name", "world"), [("replicated", 2), ("sharded", 4)])
def test_processes_measure_what_one_does(name, world):
    in_processes(geffect_parallel.check, name, world=world)
