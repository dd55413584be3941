"""One of several processes of a Trainer whose model Accelerate's own code shards with FSDP2, on the CPU over gloo."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from gfast.data import bundled_authors
from gfast.objectives import GA, WGA
from gfast.sides import SETS
from gfast.training.callback import GEffectCallback
from gfast.training.reference import ReferenceCache
from gfast.training.trainer import UnlearnTrainer
from gfast.wrappers import unwrap_name
from helpers.training_parallel import join
from helpers.training_tiny import collator, config, datasets, pairing, tiny_model


def real_fsdp2(efficient: bool = False) -> None:
    """Accelerate turns FSDP into DDP where there is no accelerator, without a word: not in this process."""
    import accelerate
    import accelerate.state
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    own = accelerate.Accelerator.__init__

    def init(self, *args, **options):
        own(self, *args, **options)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        plugin.cpu_ram_efficient_loading = efficient  # given, the plugin wants an accelerator for FSDP 1
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        shared = accelerate.state.AcceleratorState._shared_state
        shared["distributed_type"], shared["fsdp_plugin"] = DistributedType.FSDP, plugin
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.Accelerator.__init__ = init


def check(folder: str, steps: int, engine: str, rank: int, world: int, port: int) -> None:
    """Train up to a step, from the newest checkpoint if there is one. `engine` may have +SURGERY or +WEIGHTS."""
    join(rank, world, port)
    engine, _, more = engine.partition("+")
    weights = more.startswith("atwu")
    if engine == "fsdp2":
        real_fsdp2()
    model = tiny_model()
    data, collate = pairing(rows=bundled_authors()[0][:8])
    forget, _ = datasets(rows=bundled_authors()[0][:8])
    reference = ReferenceCache.build(model, forget, collator())
    args = config(
        folder,
        objective="NPO",
        retain_term="nll",
        per_device_train_batch_size=4 // world,
        max_steps=steps,
        adam_epsilon=1e-2,  # where a gradient is all rounding its sign decides nothing
        save_strategy="steps",
        save_steps=1,
        max_grad_norm=0.0,
        surgery=None if weights else more or None,
        weights=more if weights else "none",
        ddp_backend="gloo" if world > 1 else None,
    )
    items = [collate([data[row] for row in rows]) for rows in ((0, 1), (2, 3, 4))]
    measure = GEffectCallback(1, *([item[side] for item in items] for side in SETS), [GA(), WGA()])
    trainer = UnlearnTrainer(
        model,
        args,
        train_dataset=data,
        data_collator=collate,
        references={"forget": reference},
        callbacks=[measure],
    )
    trainer.train(resume_from_checkpoint=True)
    sharded = any(type(parameter).__name__ == "DTensor" for parameter in trainer.model.parameters())
    assert sharded == (engine == "fsdp2"), "not the engine that was asked for"
    whole = {
        unwrap_name(name): (value.full_tensor() if sharded else value).detach().clone()
        for name, value in trainer.model.named_parameters()
    }
    save_file(whole, str(Path(folder) / f"process-{rank}-of-{world}.safetensors"))
