"""Live G-effects under DeepSpeed's own engine: ZeRO-1, 2 and 3 over two processes, where it is installed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import live_zero
from helpers.marks import slow_when
from helpers.training_tiny import in_processes
from safetensors.torch import load_file
from test_training_parallel import together

from gfast.training.records import read_records

pytest.importorskip("deepspeed", reason="make deepspeed runs it")

STAGES = [1, 2, 3]


@slow_when(lambda p: (p.stage, p.kind) != (3, "whole"))
@pytest.mark.parametrize(
    ("stage", "kind"), [*((stage, "whole") for stage in STAGES), (2, "tied"), (1, "adapters"), (3, "adapters")]
)
def test_two_processes_measure_the_step_of_both(stage, kind):
    in_processes(live_zero.check, stage, kind, world=2)


@slow_when(lambda p: p.stage != 2)
@pytest.mark.parametrize("stage", STAGES)
def test_steps_are_those_of_an_engine_without_a_monitor(stage):
    in_processes(live_zero.steps, stage, world=2)


def test_what_is_refused_and_dropped():
    in_processes(live_zero.refusals, world=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_and_measure_as_one(tmp_path, stage):
    runs = {1: tmp_path / "one", 2: tmp_path / "two"}
    together(partial(live_zero.train, stage), runs)
    one, two = ({n: load_file(folder / n / "model.safetensors") for n in live_zero.RUNS} for folder in runs.values())
    for name in live_zero.RUNS:
        plain = two["plain"] if name == "live" else one[name]  # with a monitor the weights are those without
        for key, value in plain.items():
            exact = dict(rtol=0, atol=live_zero.EXACT * float(value.abs().max()))
            torch.testing.assert_close(two[name][key], value, **exact, msg=lambda t, n=name, k=key: f"{n} {k}: {t}")
    for key, value in two["surgery"].items():
        assert torch.equal(two["resumed"][key], value), key
    for name in ("live", "unlearn", "surgery"):
        tables = [
            read_records(folder / name).set_index(["quantity", "side", "group", "step"]) for folder in runs.values()
        ]
        right, found = (table["value"].sort_index() for table in tables)
        assert found.index.equals(right.index)
        assert name == "surgery" or set(right["update_effect"].index.get_level_values("step")) == {1, 2}
        scale = right.abs().groupby(["quantity", "side", "step"]).transform("max")  # over groups
        quantity = scale.index.get_level_values("quantity")
        scale[quantity == "cosine"] = 1.0
        scale[quantity == "g_effect"] *= 10.0  # dots of gradients whose cosine is 0.007 have lost these digits
        assert ((found - right).abs() <= live_zero.EXACT * scale).all(), (found - right).abs().div(scale).nlargest(5)
