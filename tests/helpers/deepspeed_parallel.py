"""One of two processes under DeepSpeed's own engine on the CPU (gloo), and what one process gives."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import gfast
from gfast import hf
from gfast.files import write_json
from gfast.objectives import GA, KL, NPO, RMU
from gfast.training.fingerprints import model_fingerprint
from gfast.training.reference import ReferenceCache
from gfast.training.trainer import UnlearnTrainer
from helpers import shards
from helpers.geffect_models import tiny
from helpers.geffect_parallel import refused
from helpers.training_parallel import join
from helpers.training_tiny import collator, config, pairing
from helpers.wrappers_parallel import batch_of, joined


def narrow(batch: dict) -> dict:
    return {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}


def without_shared_memory() -> None:
    """Which is to be compiled: gloo does. By the module's name, which is also that of torch in there."""
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def engine_with(stage: int, model=None, lr: float = 0.0, zero: dict | None = None, **options):
    """DeepSpeed's engine of a model, tiny without one; `zero` and `options` go into its configuration."""
    import deepspeed

    without_shared_memory()
    model = tiny("llama").float().eval() if model is None else model
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **options,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    assert type(engine).__name__ == "DeepSpeedEngine"
    return engine


def begin(rank: int, world: int, port: int) -> None:
    """The process group, for engines that DeepSpeed makes on the CPU."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=world)


def check(stage: int, rank: int, world: int, port: int) -> None:
    begin(rank, world, port)
    from deepspeed.utils import safe_get_full_grad

    def made(model, why):
        raise AssertionError(f"logits are computed: {why}")

    hf.log_materialised = made
    engine, truth = engine_with(stage), tiny("llama").float().eval()
    sharded = [hasattr(parameter, "ds_id") for parameter in engine.parameters()]
    assert all(sharded) if stage == 3 else not any(sharded)
    assert model_fingerprint(engine) == model_fingerprint(truth)
    batches = [narrow(batch_of(seed)) for seed in range(world)]
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


def train(stage: int, model: str, folder: str, rank: int, world: int, port: int) -> None:
    """Weights after three steps of UnlearnTrainer and of `gfast unlearn`: in one process without DeepSpeed."""
    from gfast import cli

    join(rank, world, port)
    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = {}
    if world > 1:
        import deepspeed as library

        without_shared_memory()
        distributed.init_process_group("gloo")
        library.init_distributed("gloo")
        sizes = "train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping train_batch_size".split()
        deepspeed = dict.fromkeys(sizes, "auto") | {"zero_allow_untested_optimizer": True}
        deepspeed |= {"zero_force_ds_cpu_optimizer": False}
        sharding = {"stage": stage, "stage3_param_persistence_threshold": 100}
        deepspeed["zero_optimization"] = sharding | {"stage3_gather_16bit_weights_on_model_save": True}
    own = {"deepspeed": deepspeed, "ddp_backend": "gloo"} if world > 1 else {}
    steps = dict(max_steps=3, optim="sgd", per_device_train_batch_size=1, gradient_accumulation_steps=4 // world)
    data, collate = pairing()
    for name, options in {
        "WGA": dict(retain_term="nll", max_grad_norm=0.5),
        "NPO": dict(retain_term="kl", learning_rate=1e-3),
    }.items():
        start = AutoModelForCausalLM.from_pretrained(model)
        references = {}
        if name == "NPO":
            for side, what in (("forget", "logp"), ("retain", "hidden")):
                references[side] = ReferenceCache.build(start, getattr(data, side), collator(), what=[what])
        args = config(f"{folder}/{name}", objective=name, **own, **steps | options)
        if name == "WGA":  # loaded now, ZeRO-3 shards the model at once; only an engine runs it then
            start = AutoModelForCausalLM.from_pretrained(model)
            if world > 1 and stage == 3:
                refused("is sharded by ZeRO-3", ReferenceCache.build, start, data.forget, collator())
        trainer = UnlearnTrainer(start, args, references=references, train_dataset=data, data_collator=collate)
        trainer.train()
        trainer.save_model(f"{folder}/{name}")
        AcceleratorState._reset_state()
        unset_hf_deepspeed_config()
    words = f"unlearn --model {model} --data bundled --max_forget 4 --max_retain 4 --objective NPO --retain_term kl"
    words += " --learning_rate 1e-3 --optim sgd --max_steps 3 --per_device_train_batch_size 1 --use_cpu"
    words += f" --gradient_accumulation_steps {4 // world} --report_to none --save_strategy no --nll_every 1"
    if world > 1:
        write_json(Path(folder) / f"config-{rank}.json", deepspeed)
        words += f" --deepspeed {folder}/config-{rank}.json"
    shares: dict[str, int] = {}
    shards.watched(shares)
    assert cli.main([*words.split(), "--output_dir", f"{folder}/command"]) == 0
    assert (shares["loaded"] <= 0.51 * shares["whole"]) == (world > 1 and stage == 3)
