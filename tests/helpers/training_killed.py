"""A small training run that kills itself where it is told to, or is killed from outside."""

from __future__ import annotations

import os
import signal

import torch
from transformers import TrainerCallback

from gfast import files
from gfast.data import batches
from gfast.objectives import WGA
from gfast.training import callback, resume
from gfast.training.trainer import UnlearnTrainer
from helpers.training_tiny import TOKENIZER, collator, config, datasets, pairing, tiny_model


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class KillAtStep(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def kill_at_write(number: int):
    """Die with the `number`-th record written to its temporary file and not yet in place."""
    left, sync = [number], files._sync

    def counted(path):
        sync(path)
        left[0] -= path.suffix == ".parquet"
        if left[0] == 0:
            die()

    files._sync = counted


def kill_in_checkpoint(trainer, step: int):
    """Die in the middle of saving a checkpoint."""
    save = trainer._save_optimizer_and_scheduler

    def cut_short(folder):
        if trainer.state.global_step == step:
            die()
        save(folder)

    trainer._save_optimizer_and_scheduler = cut_short


def kill_before_manifest(step: int):
    """Die with all files of a checkpoint there and no manifest."""

    def instead(folder, **options):
        if str(folder).endswith(f"checkpoint-{step}"):
            die()
        return write(folder, **options)

    write, resume.write_manifest = resume.write_manifest, instead


class Announce(TrainerCallback):
    def __init__(self, begun):
        self.begun = begun

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun.set()


def main(folder: str, where: str = "nowhere", number: int = 0, begun=None, save_steps: int = 2) -> None:
    """Train to the end, from the last checkpoint if there is one.

    where, number: at which step, record or checkpoint to die. begun: an event to set when training begins.
    """
    torch.set_num_threads(1)
    data, collate = pairing()
    model = tiny_model(attention_dropout=0.2)
    args = config(
        folder,
        objective="WGA",
        retain_term="nll",
        max_steps=7,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=2,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_grad_norm=1.0,
    )
    forget, retain = (batches(side, collator(), 4) for side in datasets())
    measure = callback.GEffectCallback(3, forget, retain, WGA(), label=str(args.build_objective()))
    trainer = UnlearnTrainer(
        model, args, train_dataset=data, data_collator=collate, callbacks=[measure], processing_class=TOKENIZER
    )
    if where == "step":
        trainer.add_callback(KillAtStep(number))
    elif where == "write":
        kill_at_write(number)
    elif where == "checkpoint":
        kill_in_checkpoint(trainer, number)
    elif where == "manifest":
        kill_before_manifest(number)
    if begun is not None:
        trainer.add_callback(Announce(begun))
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
