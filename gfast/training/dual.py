# SPDX-License-Identifier: Apache-2.0
"""PDU's dual variable: the factor of the retain loss, moved by how far that is from the level it is held at."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from gfast.objectives import PDU, Mix, Objective


def moves(objective: Objective) -> bool:
    """Whether an objective's factors change along a run.

    >>> from gfast.objectives import NLL
    >>> moves(Mix(PDU(primal_dual=True), NLL())), moves(Mix(PDU(), NLL()))
    (True, False)
    """
    forget = objective.forget if isinstance(objective, Mix) else objective
    return isinstance(forget, PDU) and forget.primal_dual


def check_dual(objective: Objective) -> None:
    """ValueError for a dual variable of nothing."""
    if moves(objective) and getattr(objective, "retain", None) is None:
        raise ValueError(
            f"{objective} has a dual variable, which is the factor of a retain loss, and there is none: give "
            f"retain_term nll or kl (in Python Mix(PDU(...), NLL())), or primal_dual=False"
        )


class DualVariable(TrainerCallback, ExportableState):
    """Moves ``value``, the factor of the retain loss: max(0, value + dual_step_size (L_retain - retain_loss_eps)).

    L_retain is that of a whole optimizer step over all processes, or its mean over the steps of an epoch. What it has
    come to goes into trainer_state.json, and a run that is resumed goes on with it.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.pdu, self.start = trainer, trainer.objective.forget, float(trainer.objective.alpha)
        self._begin()

    def _begin(self) -> None:
        self.value, self.open = self.start, self.pdu.dual_warmup_epochs == 0
        self.total, self.steps = 0.0, 0  # of the retain losses of the epoch's steps

    def state(self) -> dict[str, Any]:
        names = ("value", "open", "total", "steps")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()
        if state.global_step:
            saved = state.stateful_callbacks.get(type(self).__name__)
            if saved is None:
                raise ValueError(
                    f"the checkpoint of step {state.global_step} holds no dual variable of {self.pdu}: it is one of a "
                    f"run without; start a run of its own in another output folder"
                )
            vars(self).update(saved["attributes"])
            if abs(state.epoch - round(state.epoch)) < 1e-6:  # a checkpoint of a last step comes before its epoch's end
                self._end_epoch(state.epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = self.trainer.terms.of_step(self.trainer.accelerator)["retain_loss"]
        if self.pdu.dual_update_upon == "epoch":
            self.total, self.steps = self.total + loss, self.steps + 1
        elif self.open:
            self._move(loss)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_epoch(state.epoch)

    def _end_epoch(self, epoch: float) -> None:
        """A second time it changes nothing."""
        self.open = self.open or epoch >= self.pdu.dual_warmup_epochs
        if self.pdu.dual_update_upon == "epoch" and self.steps:
            if self.open:
                self._move(self.total / self.steps)
            self.total, self.steps = 0.0, 0

    def _move(self, loss: float) -> None:
        self.value = max(0.0, self.value + self.pdu.dual_step_size * (loss - self.pdu.retain_loss_eps))
