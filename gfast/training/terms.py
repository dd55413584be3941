# SPDX-License-Identifier: Apache-2.0
"""The values of a training step that are logged and recorded, summed on the device until somebody asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from gfast.training.records import run_name, say_other_training, write_record

RECORDED = ("loss", "forget_loss", "retain_loss", "mean_weight", "mean_inverse_confidence", "dual")


class StepTerms:
    """Sums over the micro-batches of the current step, and over the steps since the last log."""

    def __init__(self) -> None:
        self.step: int | None = None
        self._now: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}
        self._past: dict[str, Tensor] = {}
        self._past_steps = 0
        self._counts = True

    def reset(self) -> None:
        """Forget everything: training starts, perhaps again after a step that failed (auto_find_batch_size)."""
        self.__init__()

    def start_step(self, step: int | None) -> None:
        """Called at each micro-batch with the number of finished optimizer steps; None: what is added until the next
        call is part of no step.
        """
        self._counts = step is not None
        if not self._counts or step == self.step:
            return
        self._close()
        self.step = step

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items() if self._counts else ():
            value = value.detach().double()
            self._now[name] = self._now[name] + value if name in self._now else value

    def add_weights(self, weight: Tensor, logp: Tensor, labels: Tensor) -> None:
        """Sums of w and 1/p over valid tokens; all [B, T], aligned, and position 0 is never scored."""
        valid = labels[..., 1:] != -100
        weight, logp = weight.detach()[..., 1:], logp.detach()[..., 1:]
        # fp64: exp(-logp) of a forgotten token overflows fp32 beyond logp = -88.
        inverse = torch.where(valid, torch.exp(-logp.double()), 0.0).sum()
        self.add({"_weight": torch.where(valid, weight, 0.0).sum(), "_inverse": inverse, "_tokens": valid.sum()})

    def of_step(self, accelerator: Any = None) -> dict[str, float]:
        """The values of the current step over all processes; empty before the first."""
        return _finish(self._now, 1, accelerator)

    def of_last_step(self, accelerator: Any = None) -> dict[str, float]:
        """The same of the last step, after it has been logged too."""
        return _finish(self._now or self._last, 1, accelerator)

    def since_last_log(self, accelerator: Any = None) -> dict[str, float]:
        """The mean over the steps since the last call, and a new start."""
        self._close()
        values = _finish(self._past, self._past_steps, accelerator)
        self._past, self._past_steps = {}, 0
        return {name: value for name, value in values.items() if name != "loss"}

    def _close(self) -> None:
        for name, value in self._now.items():
            self._past[name] = self._past[name] + value if name in self._past else value
        self._past_steps += bool(self._now)
        self._last, self._now = self._now or self._last, {}


def _finish(sums: Mapping[str, Tensor], steps: int, accelerator: Any) -> dict[str, float]:
    if not sums:
        return {}
    names = sorted(sums)
    packed = torch.stack([sums[name] for name in names])
    if accelerator is not None and accelerator.num_processes > 1:
        packed = accelerator.reduce(packed, "sum")
    totals = dict(zip(names, packed.tolist(), strict=True))
    tokens = totals.pop("_tokens", 0.0)
    weight, inverse = totals.pop("_weight", 0.0), totals.pop("_inverse", 0.0)
    finished = {name: value / max(steps, 1) for name, value in totals.items()}
    if tokens:
        finished["mean_weight"] = weight / tokens
        finished["mean_inverse_confidence"] = inverse / tokens
    return finished


class RecordTerms(TrainerCallback):
    """Writes the terms of every `every`-th step to the run's records, at once, so that a kill loses no finished
    step.
    """

    def __init__(self, terms: StepTerms, objective: str, every: int, accelerator: Any = None) -> None:
        self.terms = terms
        self.objective = objective
        self.every = every
        self.accelerator = accelerator
        self._learning_rate = float("nan")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            say_other_training(str(args.output_dir), state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # Later the scheduler has moved on: this is the rate that the step is taken with.
        if optimizer is not None:
            self._learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.every or (state.global_step % self.every and state.global_step < state.max_steps):
            return
        values = self.terms.of_step(self.accelerator)
        if not state.is_world_process_zero:
            return
        values = {name: values[name] for name in RECORDED if name in values} | {"learning_rate": self._learning_rate}
        common = {
            "run": run_name(args.output_dir),
            "objective": self.objective,
            "step": state.global_step,
            "epoch": state.epoch,
        }
        write_record(args.output_dir, [{**common, "quantity": name, "value": value} for name, value in values.items()])
