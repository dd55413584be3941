"""open-unlearning, from its clone where GFAST_OPEN_UNLEARNING names one, else what its trainers are given: items,
data sets and batches laid out as its code makes them, and a registry with a Trainer that evaluates as its own.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from gfast.integrations.open_unlearning import register
from helpers.literal_losses import FirstGradient
from helpers.training_parallel import join
from helpers.training_tiny import TOKENIZER, datasets, tiny_model


class FinetuneTrainer(Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", trial=None):
        if self.evaluators:
            found = {}
            for evaluator in self.evaluators.values():
                found |= evaluator.evaluate(
                    output_dir=self.args.output_dir,
                    template_args=self.template_args,
                    model=self.model,
                    tokenizer=self.tokenizer,
                )
            self.log(found)
            return found
        return {} if eval_dataset is None else super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


def clone() -> Path | None:
    where = os.environ.get("GFAST_OPEN_UNLEARNING")
    return Path(where) if where else None


def registered() -> dict[str, type]:
    """The registry of open-unlearning with gfast's trainers in it."""
    if clone() is not None:
        sys.path.insert(0, str(clone() / "src"))
        theirs = importlib.import_module("trainer")
    else:
        theirs = sys.modules.setdefault("trainer", types.ModuleType("trainer"))
        theirs.TRAINER_REGISTRY, theirs.FinetuneTrainer = {}, FinetuneTrainer
    register()
    return theirs.TRAINER_REGISTRY


class Rows:
    """As QADataset's items: no padding, an attention_mask of ones, and the row's index."""

    def __init__(self, data):
        self.items = [self.item(data[i], i) for i in range(len(data))]

    @staticmethod
    def item(item, index):
        ids = torch.as_tensor(item["input_ids"])
        labels = torch.as_tensor(item["labels"])
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "index": index}

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class WithRefusals(Rows):
    """As QAwithIdkDataset: a refusal drawn at every access, without an index of its own."""

    def __init__(self, data, refusals):
        super().__init__(data)
        self.refusals = refusals

    def __getitem__(self, index):
        drawn = torch.randint(0, len(self.refusals), (1,)).item()
        return {"original": self.items[index], "alternate": Rows.item(self.refusals[drawn], -1)}


class ForgetRetainDataset:
    """As open-unlearning's, which draws a partner at every access."""

    def __init__(self, forget, retain, anchor="forget"):
        self.forget, self.retain, self.anchor = forget, retain, anchor

    def __len__(self):
        return len(self.forget if self.anchor == "forget" else self.retain)

    def __getitem__(self, index):
        return {"forget": self.forget[index], "retain": self.retain[torch.randint(0, len(self.retain), (1,)).item()]}


def data(pairs=False, samples=4):
    forget, retain = datasets()
    forget = [forget[i] for i in range(samples)]
    refusals = [datasets("refusal")[0][i] for i in range(3)]
    return ForgetRetainDataset(WithRefusals(forget, refusals) if pairs else Rows(forget), Rows(retain))


def arguments(folder, **options):
    settings = dict(output_dir=str(folder), use_cpu=True, learning_rate=1e-3, lr_scheduler_type="constant", seed=5)
    settings |= dict(max_grad_norm=0.0, optim="sgd", save_strategy="no", report_to="none", logging_steps=1)
    settings |= dict(num_train_epochs=3, per_device_train_batch_size=4, disable_tqdm=True)
    return TrainingArguments(**settings | options)


def trained(name, folder, model, train_dataset=None, method=None, tokenizer=TOKENIZER, train=True, **options):
    """A trainer, called as open-unlearning's load_trainer calls it."""
    more = {key: options.pop(key) for key in ("evaluators", "eval_dataset", "data_collator") if key in options}
    first = FirstGradient()
    trainer = registered()[f"GFast{name}"](
        model=model,
        train_dataset=train_dataset or data(pairs=name == "DPO"),
        tokenizer=tokenizer,
        args=arguments(folder, **options),
        template_args=None,
        **{"eval_dataset": None, "data_collator": None, "evaluators": None, **more},
        **(method or {}),
    )
    trainer.add_callback(first)
    if train:
        trainer.train()
    trainer.first = first
    return trainer


def parallel(folder: str, rank: int, world: int, port: int) -> None:
    """The losses and the first gradient of KL beside NPO, whose values of the original one process builds."""
    join(rank, world, port)
    method = {"retain_loss_type": "KL", "geffect_every": 3, "geffect_samples": 2}
    found = {}
    for name in ("NPO", "SimNPO"):
        options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4 // world)
        if world > 1:
            options["ddp_backend"] = "gloo"
        trainer = trained(name, Path(folder) / name, tiny_model(seed=1), method=method, **options)
        logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        effects = [x for log in trainer.state.log_history for key, x in log.items() if key.startswith("geffect/")]
        found |= {f"{name} {key}": value for key, value in trainer.first.found.items()}
        found |= {f"{name} losses": torch.tensor(logs), f"{name} effects": torch.tensor(effects)}
    torch.save(found, f"{folder}/process-{rank}.pt")
