"""One of two processes of a training under FSDP2, which counts how often weights are gathered."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

from gfast.objectives import NLL, WGA, Mix
from gfast.training.trainer import UnlearnTrainer
from helpers.training_parallel import join
from helpers.training_sharded import real_fsdp2
from helpers.training_tiny import config, pairing, tiny_model


@contextlib.contextmanager
def counted():
    """A list with an entry for every gather of a group of weights."""
    gather, count = groups.foreach_all_gather, []

    def one(*given, **options):
        count.append(1)
        return gather(*given, **options)

    groups.foreach_all_gather = one
    try:
        yield count
    finally:
        groups.foreach_all_gather = gather


def check(folder: str, rank: int, world: int, port: int) -> None:
    join(rank, world, port)
    real_fsdp2()
    gathers, losses = [], []
    for joint in (False, True):
        options = dict(joint_forward=joint, per_device_train_batch_size=2, max_steps=2, optim="sgd", ddp_backend="gloo")
        data, collate = pairing()
        args = config(Path(folder) / str(joint), **options)
        mix = Mix(WGA(), NLL())
        trainer = UnlearnTrainer(tiny_model(), args, objective=mix, train_dataset=data, data_collator=collate)
        with counted() as count:
            trainer.train()
        assert any(type(parameter).__name__ == "DTensor" for parameter in trainer.model.parameters())
        gathers.append(len(count))
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert 0 < gathers[1] < gathers[0], gathers
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.distributed.destroy_process_group()
