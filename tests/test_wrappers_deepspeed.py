"""DeepSpeed's own engine, where it is installed: ZeRO-2, and ZeRO-3 with the head's weight gathered for the loss; and
trainings under it.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import deepspeed_parallel
from helpers.training_tiny import in_processes, saved_tiny
from safetensors.torch import load_file
from test_training_parallel import together

from gfast.commands.shards import _loaded_whole


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_have_the_gradient_of_both(stage):
    pytest.importorskip("deepspeed", reason="make deepspeed runs it")
    in_processes(deepspeed_parallel.check, stage, world=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_train_as_one(tmp_path, stage):
    """UnlearnTrainer and the command, which reads the whole model before training shards it."""
    pytest.importorskip("deepspeed", reason="make deepspeed runs it")
    runs = {1: tmp_path / "one", 2: tmp_path / "two"}
    together(partial(deepspeed_parallel.train, stage, str(saved_tiny(tmp_path / "start"))), runs)
    for name in ("WGA", "NPO", "command"):
        one, two = (load_file(folder / name / "model.safetensors") for folder in runs.values())
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, k=key: f"{k}: {text}")


def test_the_command_loads_a_whole_model_under_zero3():
    """Of shards one process alone cannot make a fingerprint: it would wait for the others for ever."""
    from transformers.integrations import deepspeed

    class Zero3:
        def is_zero3(self) -> bool:
            return True

    config = Zero3()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        with _loaded_whole(SimpleNamespace(hf_deepspeed_config=config)):
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
