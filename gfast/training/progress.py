# SPDX-License-Identifier: Apache-2.0
"""How far a training is, for `gfast demo`, and for `gfast unlearn` where there is no terminal for transformers' bar."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from gfast.progress import Bar


class Progress(TrainerCallback):
    """A progress bar with a name and the last logged loss; ends training once that is below a value."""

    def __init__(self, name: str, stop_below: float = float("-inf")) -> None:
        self.name, self.stop_below = name, stop_below

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = Bar(self.name, state.max_steps, "step", show=state.is_world_process_zero)
        self.bar.update(state.global_step)  # of a run that goes on

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.bar.note(loss=f"{logs['loss']:.3f}")
            control.should_training_stop |= logs["loss"] < self.stop_below

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
