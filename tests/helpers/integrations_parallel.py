"""One of several processes that train with gfast's losses in a plain Trainer, over gloo."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainingArguments

from gfast.integrations.transformers import GFastLossMixin, gfast_loss_func
from gfast.objectives import WGA, SimNPO
from helpers.literal_losses import FirstGradient
from helpers.training_parallel import join
from helpers.training_tiny import collator, datasets, tiny_model


class Forget(GFastLossMixin, Trainer):
    objective = SimNPO(1.0, 0.0)


def losses(folder: str, rank: int, world: int, port: int) -> None:
    """What the first step of each way moves, and what a loss func says where counts are not summed."""
    join(rank, world, port)
    data, _ = datasets()
    items = [data[index] for index in range(4)]
    found, said = {}, None
    for kind in ("mixin", "loss func"):
        for average in (True, False):
            model = tiny_model()
            first = FirstGradient()
            args = TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                max_steps=1,
                optim="sgd",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=4 // world,
                average_tokens_across_devices=average,
                ddp_backend="gloo" if world > 1 else None,
                seed=0,
            )
            options = dict(args=args, train_dataset=items, data_collator=collator(), callbacks=[first])
            if kind == "mixin":
                Forget(model, **options).train()
            else:
                trainer = Trainer(model, compute_loss_func=gfast_loss_func(WGA(), args), **options)
                try:
                    trainer.train()
                except ValueError as refusal:
                    said = str(refusal)
                    continue
            key = kind if kind == "loss func" else f"{kind}, {average}"
            found |= {f"{key}: {name}": value for name, value in first.found.items()}
    torch.save(found | ({"refused": said} if said else {}), f"{folder}/process-{rank}.pt")
