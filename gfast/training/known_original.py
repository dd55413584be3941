# SPDX-License-Identifier: Apache-2.0
"""That the base of a model with adapters is its original, along a training and into its checkpoints."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from gfast.original import declare_base_original, is_base_original


class KnownOriginal(TrainerCallback, ExportableState):
    """Adapters that have been trained are not zero any more, so that one cannot see of them that they were when the run
    began: what has been seen goes into trainer_state.json, and a run that is resumed knows it.
    """

    def __init__(self) -> None:
        self.known = False

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"known": self.known}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module = None, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state()) if state.global_step else {}
        self.known = bool(saved.get("attributes", {}).get("known")) or is_base_original(model)
        self._declare(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module = None, **kwargs: Any) -> None:
        self.known = is_base_original(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module = None, **kwargs: Any) -> None:
        self._declare(model)  # load_best_model_at_end has loaded weights of this run

    def _declare(self, model: nn.Module) -> None:
        if self.known:
            declare_base_original(model)
