# SPDX-License-Identifier: Apache-2.0
"""What the terms of an optimizer step are divided by: their counts over its micro-batches and all processes."""

from __future__ import annotations

import logging
from typing import Any

import torch

from gfast.training import batches
from gfast.training.options import ends_within_a_step, marked, refuse_no_step

logger = logging.getLogger("gfast")


class CountedSteps:
    """Over a Trainer: each term's loss has one divisor a step, whatever the cut into micro-batches and processes."""

    _said_empty = False
    _step = -1  # the number of finished steps when micro-batches were last counted
    _counted: Any = {}  # side -> labels of the first step's micro-batches, and their versions
    _normalizers: Any = {}  # side -> what the step's losses are divided by
    _micro_batches = 1

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: Any = None
    ) -> tuple[list[Any], int | None]:
        """The micro-batches of one optimizer step, and what their terms are to be divided by, over all processes."""
        batch_samples = []
        # Trainer looks whether a run is finished after a step: one that is resumed at its end would take one too many.
        finished = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        for _ in range(0 if finished else num_batches):
            try:
                batch_samples.append(next(epoch_iterator))
            except StopIteration:
                break
        loader, step = self.callback_handler.train_dataloader, self.state.global_step
        if not batch_samples or ends_within_a_step(len(batch_samples), num_batches, loader, step):
            return [], None
        self._check_batch(batch_samples[0])
        self._micro_batches = len(batch_samples)
        sides = [self._sides(batch) for batch in batch_samples]
        counts = self._over_processes(
            [sum(batches.count(objective, by_side[side]) for by_side in sides) for side, objective, _ in self._parts]
        )
        first = self._parts if self._step < 0 else []  # the losses of the first step are held to what was counted
        self._counted = {side: [marked(by_side[side]["labels"]) for by_side in sides] for side, *_ in first}
        empty = [side for (side, _, _), count in zip(self._parts, counts, strict=True) if not count]
        if empty and not self._said_empty:
            self._said_empty = True
            logger.warning(
                "gfast: no token of the %s batches of step %d has a label that is scored (all are -100: a mask that "
                "found no answer?), so that this term has no gradient there",
                empty[0],
                self.state.global_step + 1,
            )
        self._normalizers = {
            side: float(max(count, 1)) for (side, _, _), count in zip(self._parts, counts, strict=True)
        }
        self._step = self.state.global_step
        if self.live is not None:
            self.live.begin(batch_samples)
        # Not None: otherwise Trainer 4.x would divide the loss by the number of micro-batches.
        return batch_samples, int(sum(counts))

    def get_train_dataloader(self) -> Any:
        """Trainer's, of data that make a step."""
        refuse_no_step(self.args, self.train_dataset)
        return super().get_train_dataloader()

    def _over_processes(self, counts: list[int]) -> list[int]:
        """Sums over all processes."""
        if self.accelerator.num_processes == 1:
            return counts
        local = torch.tensor(counts, dtype=torch.int64, device=self.args.device)
        return self.accelerator.reduce(local, "sum").tolist()

    @property
    def _stepping(self) -> bool:
        """Whether a loss is part of a step that is being taken, whatever mode the model is in: some train with dropout
        off. One that a callback computes after the step, or without gradients, is not.
        """
        return self.is_in_train and torch.is_grad_enabled() and self._step == self.state.global_step

    @property
    def _parts_of_step(self) -> int:
        """The micro-batches of all processes that a loss is one of."""
        return self._micro_batches * self.accelerator.num_processes if self._stepping else 1
