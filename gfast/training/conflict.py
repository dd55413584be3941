# SPDX-License-Identifier: Apache-2.0
"""Weights of the forget tokens from their conflict with the retain set, measured anew every so many steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from gfast import wrappers
from gfast.model_state import gradients_kept, rng_kept
from gfast.objectives import UNWEIGHTED, Objective
from gfast.tensor_files import TensorFile, write_tensors
from gfast.training.averaged import schedule_free
from gfast.training.scorer import ATWU, ScorerWeights

WEIGHTS = ("none", "retain_conflict", "atwu")
FILE = "conflict_weights.safetensors"  # in a checkpoint


class ConflictWeights(TrainerCallback):
    """Measures `gfast.retain_conflict` of a trainer's own data before its first step and every `every` steps, and gives
    each forget batch the weights of its samples.

    All forget items are measured, against the retain items that the epoch pairs them with. Random states, gradients and
    modes are as before. A checkpoint has the weights that its next steps take.
    """

    reads_answer = False  # the weights are there before the model runs

    def __init__(self, trainer: Any, every: int, tau: float) -> None:
        self.trainer, self.every, self.tau = trainer, every, tau
        self.by_sample: dict[int, Tensor] | None = None  # of each sample's label tokens in order, fp32
        self.step = -1

    def save(self, folder: str) -> None:
        """Into a checkpoint: weights measured where a resumed run goes on would be others."""
        if self.by_sample is not None and self.trainer.args.should_save:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_tensors(Path(folder) / FILE, {str(sample): row for sample, row in self.by_sample.items()})

    def load(self, folder: str | None) -> None:
        """From a checkpoint, or from None: a training that begins."""
        self.by_sample, self.step = None, -1
        if folder is None:
            return
        if not (Path(folder) / FILE).exists():
            raise ValueError(
                f"the checkpoint {folder} has no {FILE}, the weights by retain conflict that the run goes on with: it "
                "is one of a run without; start a run of its own in another output folder"
            )
        tensors = TensorFile(Path(folder) / FILE, "go on from the checkpoint before it")
        self.by_sample = {int(name): tensors.get(name) for name in tensors.names}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        due = state.global_step % self.every == 0 and state.global_step != self.step
        if self.by_sample is None or due:
            self.step = state.global_step
            if (optimizer := schedule_free(self.trainer.optimizer)) is not None:
                optimizer.train()  # at the weights that the step is taken at, whether they were saved before it or not
            with rng_kept(), gradients_kept(model), wrappers.own_precision(model):
                self.measure(model)

    def measure(self, model: Any) -> None:
        from gfast.geffect import retain_conflict

        data, size = self.trainer.train_dataset, self.trainer.args.per_device_train_batch_size
        made = [
            self.trainer._sides(
                self.trainer.data_collator([data[i] for i in range(start, min(start + size, len(data)))])
            )
            for start in range(0, len(data), size)
        ]
        for sides in made:
            if "retain" not in sides or "sample_id" not in sides["forget"]:
                raise ValueError(
                    "weights='retain_conflict' measures forget items against retain items, by the sample_id of the "
                    "former: train on gfast.data.ForgetRetain with ForgetRetainCollator, or gfast unlearn --retain_term"
                )
        forget, retain = ([sides[side] for sides in made] for side in ("forget", "retain"))
        processes = "all" if self.trainer.accelerator.num_processes > 1 else "auto"
        weights = retain_conflict(model, forget=forget, retain=retain, tau=self.tau, processes=processes)
        self.by_sample = {}
        for batch, weight in zip(forget, weights, strict=True):
            for sample, labels, row in zip(batch["sample_id"].tolist(), batch["labels"].cpu(), weight, strict=True):
                if sample in self.by_sample:
                    raise ValueError(
                        f"weights='retain_conflict': two samples of the forget data have the sample_id {sample}, and "
                        "one would get the other's weights; give each data set its own id_offset"
                    )
                self.by_sample[sample] = row[1:][labels[1:] != -100]

    def of(self, batch: Mapping[str, Any], answer: Any = None) -> Tensor:
        """[B, T] of a forget batch, on its device."""
        if batch.get("weight") is not None:
            raise ValueError("weights='retain_conflict' gives the tokens weights, and the data has a 'weight' too")
        labels, by_sample = batch["labels"], self.by_sample
        samples = batch["sample_id"].tolist()
        missing = [sample for sample in samples if by_sample is None or sample not in by_sample]
        if missing:
            raise ValueError(f"weights='retain_conflict' has not measured sample {missing[0]} of the forget data")
        valid = labels != -100
        valid[:, 0] = False
        values = torch.cat([by_sample[sample] for sample in samples]).to(labels.device)
        if len(values) != int(valid.sum()):
            raise ValueError("weights='retain_conflict': a sample has other labels than when it was measured")
        return torch.ones(labels.shape, device=labels.device).masked_scatter(valid, values)


def parse_weights(text: str) -> tuple[str, ATWU | None]:
    """The name of weights as they are asked for, and ATWU's settings. ValueError for others than `WEIGHTS`."""
    name, colon, settings = text.partition(":")
    if name not in WEIGHTS or (colon and name != "atwu"):
        raise ValueError(f"weights is {text!r}; choose one of {', '.join(WEIGHTS)}")
    return name, ATWU.parse(settings) if name == "atwu" else None


def check_weights(weights: str, objective: Objective, tau: float, every: int, own_loss_terms: bool) -> None:
    """ValueError for an objective whose tokens have no weights, or not those of the forget answers."""
    name, atwu = parse_weights(weights)
    if isinstance(objective, UNWEIGHTED) or objective.needs & {"preferred", "refusal", "weight"}:
        raise ValueError(
            f"weights={name!r} is for objectives over the forget answers' own tokens, and {objective} is none"
        )
    if every < 1 or not tau > 0:
        raise ValueError(f"weights_every is {every} and weights_tau {tau}; give 1 or more, and a positive number")
    if atwu is not None and own_loss_terms:
        raise ValueError(
            "weights='atwu' weighs what one forward has answered, and own_loss_terms takes one of its own: leave one "
            "of them out"
        )


def weights_of(trainer: Any, weights: str, every: int, tau: float) -> ConflictWeights | ScorerWeights:
    """What gives a trainer's forget batches the weights that were asked for."""
    _, atwu = parse_weights(weights)
    return ConflictWeights(trainer, every, tau) if atwu is None else ScorerWeights(trainer, atwu)
