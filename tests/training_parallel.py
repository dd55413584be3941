"""One of several processes that train together over gloo on the CPU."""

from __future__ import annotations

import os

import torch
from safetensors.torch import save_file
from training_tiny import collator, config, datasets, pairing, parameters, tiny_model

from gfast.training.reference import ReferenceCache
from gfast.training.trainer import UnlearnTrainer


def train(folder: str, rank: int, world: int, port: int) -> None:
    if world > 1:
        settings = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in settings.items()})
    torch.set_num_threads(1)
    model = tiny_model()
    data, collate = pairing()
    forget, _ = datasets()
    reference = ReferenceCache.build(model, forget, collator())
    args = config(
        folder,
        objective="NPO",
        retain_term="nll",
        optim="sgd",
        per_device_train_batch_size=6 // world // 3,
        gradient_accumulation_steps=3,
        max_steps=2,
        per_device_eval_batch_size=1,
        ddp_backend="gloo" if world > 1 else None,
    )
    trainer = UnlearnTrainer(
        model, args, train_dataset=data, eval_dataset=data, data_collator=collate, references={"forget": reference}
    )
    trainer.train()
    metrics = trainer.evaluate()
    metrics = {name: torch.tensor(value) for name, value in metrics.items() if name.endswith("loss")}
    # Every process saves what it has: they must agree.
    save_file(parameters(model) | metrics, f"{folder}/process-{rank}.safetensors")
