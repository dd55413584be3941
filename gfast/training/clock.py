# SPDX-License-Identifier: Apache-2.0
"""The seconds of a run, over all of its starts."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from gfast.training.trajectory import Trajectory, callbacks_of, calling_trainer


class Clock(TrainerCallback, ExportableState):
    """Seconds since it was made, and of them those that measurements took; of a run that goes on from a checkpoint,
    with those until then. What was done after a checkpoint and then lost is no part of the run, nor of its time.
    """

    def __init__(self) -> None:
        self.started, self.before, self.measuring_before = time.perf_counter(), 0.0, 0.0

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def measuring(self, callbacks: list[TrainerCallback]) -> float:
        return self.measuring_before + sum(
            callback.seconds for callback in callbacks if isinstance(callback, Trajectory)
        )

    def state(self) -> dict[str, Any]:
        spent = {"before": self.seconds, "measuring_before": self.measuring(callbacks_of(calling_trainer()))}
        return {"args": {}, "attributes": spent}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state()) if state.global_step else {}
        vars(self).update(saved.get("attributes", {}))
