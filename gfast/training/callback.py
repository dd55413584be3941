# SPDX-License-Identifier: Apache-2.0
"""GEffectCallback: the G-effect during training, in any Hugging Face Trainer, without changing the training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gfast import peft_models
from gfast.model_state import gradients_kept, rng_kept
from gfast.objectives import Objective, as_objective
from gfast.sides import SIDES
from gfast.training.dual import moves
from gfast.training.evaluation import nll_of_sides
from gfast.training.records import run_name, write_record
from gfast.training.trajectory import Batches, Trajectory, calling_trainer, log_beside

if TYPE_CHECKING:
    from gfast.geffect.results import GEffect

logger = logging.getLogger("gfast")


class GEffectCallback(Trajectory):
    """Measures G-effects before training, every `every` optimizer steps and after the last one.

    A measurement is written to `<output_dir>/records/` at once, as one whole file a step, before the Trainer saves that
    step's checkpoint; measuring a step again replaces it. So a run that is killed and resumed loses and doubles
    nothing. Parameters, gradients, modes, optimizer and random states are as before a measurement: training goes on bit
    for bit as without it. Totals and groups go to the Trainer's log too, as "geffect/GA()/unlearn",
    "geffect/GA()/retain/middle", "geffect/nll/retain": to its log_history, and to TensorBoard, Weights & Biases and
    whatever else it reports to. Several processes measure together: each is given the same batches, of which gfast
    takes a share in each, and the effect is that of the whole set (``processes="all"`` of gfast.g_effect).

    Args:
        every: optimizer steps between measurements; 0 measures before and after training only.
        forget, retain: lists of batches (on any device), or functions that return them. Batches carry what the
            objectives need (`ref_logp` ...). The same batches at every step: the effects of a run can then be compared.
        objectives: one objective or several; their effects are measured in one go.
        groups: "paper", "layer" or a function of the parameter name.
        run_folder: where to write; None is the Trainer's output_dir.
        run: the run's name in the records; None is the folder's name.
        label: the objective's name in the records, for a single objective; None is `str(objective)`. A run that trains
            on GA() + NLL() can record the effect of its GA() under the name of the whole.
        options: further arguments for gfast.g_effect (engine=, risk=, direction_dtype=).

    >>> from gfast.objectives import GA, WGA
    >>> callback = GEffectCallback(10, forget_batches, retain_batches, [GA(), WGA()])    # doctest: +SKIP
    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])    # doctest: +SKIP
    """

    quantity = "g_effect"

    def __init__(
        self,
        every: int,
        forget: Batches,
        retain: Batches,
        objectives: Objective | Sequence[Objective],
        *,
        groups: Any = "paper",
        run_folder: str | Path | None = None,
        run: str | None = None,
        label: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(every, forget, retain, run_folder, run)
        several = isinstance(objectives, Sequence)
        self.objectives = [as_objective(each) for each in (objectives if several else [objectives])]
        if not self.objectives:
            raise ValueError("give at least one objective to measure the G-effect of")
        moving = next((each for each in self.objectives if moves(each)), None)
        if moving is not None:
            raise ValueError(
                f"the factors of {moving} change along a run, and a G-effect is measured with fixed ones: measure its "
                f"terms apart, such as [PDU(), NLL()]"
            )
        self.groups = groups
        if label is not None and len(self.objectives) > 1:
            raise ValueError("label names a single objective; leave it out for several")
        self.labels = [str(objective) if label is None else label for objective in self.objectives]
        self.options = {"processes": "all"} | options
        self.measures |= {f"{side}_effect" for side in SIDES}
        if options.get("norms"):
            self.measures |= {f"{side}_{name}" for side in SIDES for name in ("cosine", "norm")} | {"objective_norm"}

    def names(self) -> set[str]:
        return set(self.labels)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if state.global_step > 0 and self._is_measured(args, 0) and peft_models.is_adapted(model):
            # Adapters are not zero any more: they were, or it was said what the original is, when the run began.
            self.options = {"reference": "base"} | self.options
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def _measure(self, args: Any, state: Any, model: nn.Module) -> None:
        from gfast.geffect import g_effect

        forget, retain = (list(side() if callable(side) else side) for side in (self.forget, self.retain))
        with rng_kept(), gradients_kept(model):
            effects = g_effect(model, self.objectives, forget=forget, retain=retain, groups=self.groups, **self.options)
            risks = nll_of_sides(effects, model, forget, retain)
        self._log(effects, risks)
        if not state.is_world_process_zero:
            return
        folder = self._folder(args)
        run = run_name(str(folder)) if self.run is None else self.run
        common = {"run": run, "step": state.global_step, "epoch": state.epoch or 0.0}
        rows = []
        for label, effect in zip(self.labels, effects, strict=True):
            common["objective"] = label
            rows += [{**common, **row} for row in effect.rows()]
            rows += [{**common, "quantity": "risk", "side": side, "value": value} for side, value in risks.items()]
            logger.info("step %d, G-effect of %s: %s", state.global_step, label, summary(effect))
        write_record(folder, rows)

    def _log(self, effects: Sequence[GEffect], risks: Mapping[str, float]) -> None:
        """Totals and groups to the log of the Trainer that is calling, and so to what it reports to."""
        trainer = calling_trainer()
        if trainer is None:
            return
        values = {f"geffect/nll/{side}": value for side, value in risks.items()}
        for label, effect in zip(self.labels, effects, strict=True):
            for side in SIDES:
                values[f"geffect/{label}/{side}"] = effect.total(side)
                values |= {f"geffect/{label}/{side}/{group}": x for group, x in getattr(effect, side).items()}
        log_beside(trainer, values)


def summary(effect: Any) -> str:
    """Both totals in a few words."""
    return f"unlearn {effect.total('unlearn'):+.3e}, retain {effect.total('retain'):+.3e}"
