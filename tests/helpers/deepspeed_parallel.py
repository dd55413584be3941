"""One of two processes under DeepSpeed's own engine on the CPU (gloo), and what one process gives."""

from __future__ import annotations

import importlib
import os

import torch
from torch import distributed

import gfast
from gfast import hf
from gfast.objectives import GA, KL, NPO, RMU
from gfast.training.fingerprints import model_fingerprint
from helpers.geffect_models import tiny
from helpers.geffect_parallel import refused
from helpers.wrappers_parallel import batch_of, joined


def _narrow(batch: dict) -> dict:
    return {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}


def _engine(stage: int):
    import deepspeed

    # Shared memory between processes, to be compiled: gloo does. By its name, which is also that of torch in there.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    model = tiny("llama").float().eval()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    assert type(engine).__name__ == "DeepSpeedEngine"
    return engine


def check(stage: int, rank: int, world: int, port: int) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    from deepspeed.utils import safe_get_full_grad

    def made(model, why):
        raise AssertionError(f"logits are computed: {why}")

    hf.log_materialised = made
    engine, truth = _engine(stage), tiny("llama").float().eval()
    sharded = [hasattr(parameter, "ds_id") for parameter in engine.parameters()]
    assert all(sharded) if stage == 3 else not any(sharded)
    assert model_fingerprint(engine) == model_fingerprint(truth)
    batches = [_narrow(batch_of(seed)) for seed in range(world)]
    for objective in (GA(), NPO(0.3), KL(), RMU(layer=2)):
        for _ in range(2):  # ZeRO-3 follows the trace of the step before
            engine.zero_grad()
            loss = gfast.model_loss(engine, batches[rank], objective).loss
            engine.backward(loss)
            found = {name: safe_get_full_grad(parameter) for name, parameter in engine.module.named_parameters()}
            engine.step()
        truth.zero_grad()
        gfast.model_loss(truth, joined(batches), objective).loss.backward()
        for name, right in ((name, parameter.grad) for name, parameter in truth.named_parameters()):
            if right is None:
                continue  # above RMU's layer, where ZeRO-3 shows what it had of the loss before
            one = torch.zeros_like(right) if found[name] is None else found[name]
            torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()) + 1e-12, msg=name)
    with torch.no_grad():
        same = (gfast.model_logp(model, batches[rank]) for model in (engine, truth))
        torch.testing.assert_close(*same)
    data = {"forget": batches[0], "retain": batches[1]}
    if stage == 3:
        for engine_name in ("stream", "gram"):
            refused(f"ZeRO-3 the {engine_name} engine", gfast.g_effect, engine, GA(), **data, engine=engine_name)
    else:
        one, other = (gfast.g_effect(model, NPO(0.3), **data, processes="all") for model in (engine, truth))
        for group, value in other.unlearn.items():
            assert abs(one.unlearn[group] - value) <= 1e-4 * abs(value), (group, one.unlearn[group], value)
    distributed.destroy_process_group()
