# SPDX-License-Identifier: Apache-2.0
"""Measurements along a training: when they are due, and the cheapest one, the NLL of both sets."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import distributed, nn
from transformers import TrainerCallback

from gfast import wrappers
from gfast.given import whole
from gfast.model_state import rng_kept
from gfast.rotary import refuse_cut
from gfast.sides import SIDES
from gfast.training.averaged import averaged
from gfast.training.evaluation import nll_sums, own_batches
from gfast.training.processes import shares_of
from gfast.training.records import read_step, recorded_steps, run_name, say_other_training, write_record

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger("gfast")

Batches = Sequence[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]


class Trajectory(TrainerCallback):
    """The base of what is measured before training, every so many steps and after the last one, and recorded at once.

    What is measured is the model as it is saved: in the precision of its own weights, without the Trainer's mixed
    precision (bf16, fp16), in which a small effect can be off by half. A subclass measures in `_measure`, and names in
    `quantity` what its rows in the records are known by.
    """

    quantity: ClassVar[str]
    # What it measures, as rules of gfast.training.stop call it.
    measures: frozenset[str] = frozenset({"forget_nll", "retain_nll"})

    def __init__(
        self, every: int, forget: Batches, retain: Batches, run_folder: str | Path | None, run: str | None
    ) -> None:
        between = "the optimizer steps between measurements, or 0 for start and end only"
        self.every, self.forget, self.retain = whole("every", every, meaning=between), forget, retain
        self.run_folder, self.run = run_folder, run
        self.seconds = 0.0  # of the training, that measurements took
        self._before: frozenset[int] = frozenset()  # steps that were recorded when a training began, of another one

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        # A fresh start is always measured: what the folder holds, of whatever step, may be of another model.
        step = state.global_step
        self._before = frozenset()
        if state.is_world_process_zero:  # one that goes on has the records up to its checkpoint
            recorded = recorded_steps(self._folder(args))
            self._before = frozenset(each for each in recorded if step == 0 or each > step)
            say_other_training(str(self._folder(args)), step, state.max_steps)
        if step == 0 or (self._on_grid(step) and not self._is_measured(args, step)):
            self._timed(args, state, model, kwargs.get("optimizer"))

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if self.measures_at(state):
            self._timed(args, state, model, kwargs.get("optimizer"))

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        # Only a run that was stopped early gets here unmeasured; with load_best_model_at_end the weights are another
        # step's.
        if not args.load_best_model_at_end and not self._is_measured(args, state.global_step):
            self._timed(args, state, model, kwargs.get("optimizer"))

    def measures_at(self, state: Any) -> bool:
        """Whether there is a measurement at the end of this step."""
        return self._on_grid(state.global_step) or state.global_step >= state.max_steps

    def step_of(self, state: Any) -> int:
        """The step that a measurement at the end of this step is recorded at."""
        return state.global_step

    def _on_grid(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def _folder(self, args: Any) -> Path:
        return Path(args.output_dir if self.run_folder is None else self.run_folder)

    def _is_measured(self, args: Any, step: int) -> bool:
        recorded = {row["objective"] for row in read_step(self._folder(args), step) if row["quantity"] == self.quantity}
        measured = recorded >= self.names() and step not in self._before
        if distributed.is_available() and distributed.is_initialized():
            told = [measured]  # of process 0, which writes: all measure, or none
            distributed.broadcast_object_list(told)
            (measured,) = told
        return measured

    def names(self) -> set[str]:
        """Objectives in whose name values are recorded."""
        raise NotImplementedError

    def _timed(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        started = time.perf_counter()
        with wrappers.own_precision(model), averaged(optimizer):
            self._measure(args, state, model)
        self._before -= {state.global_step}
        self.seconds += time.perf_counter() - started

    def _measure(self, args: Any, state: Any, model: nn.Module) -> None:
        raise NotImplementedError


class NLLCallback(Trajectory):
    r"""Measures the mean NLL of both sets before training, every `every` steps and after the last: forwards only.

    .. math:: R(D) = -\frac{1}{N} \sum_i \log p_i

    over the N label tokens of a set, in evaluation mode. It is what `GEffectCallback` records of the risk, at a third
    of its cost or less: for a trajectory with many points, for `gfast.training.StopCallback`, and for retain NLL at
    equal forget NLL (`gfast report`). Training goes on bit for bit as without it. In several processes each measures a
    share of the batches.

    Args:
        every: optimizer steps between measurements; 0 measures before and after training only.
        forget, retain: lists of batches, or functions that return them; those of a `GEffectCallback` beside it, which
            then measures where both are due.
        run_folder: where to write; None is the Trainer's output_dir.
        run: the run's name in the records; None is the folder's name.
        label: the objective's name in the records; None is that of the Trainer's objective, or "NLL()" if it has none.

    Raises:
        ValueError: `every` below 0; at the start of training, a GEffectCallback beside it that measures other lists.

    Source: arXiv 2502.19301, the risk of definition 1.

    Example:
        >>> callback = NLLCallback(5, forget_batches, retain_batches)    # doctest: +SKIP
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])    # doctest: +SKIP
    """

    quantity = "risk"

    def __init__(
        self,
        every: int,
        forget: Batches,
        retain: Batches,
        *,
        run_folder: str | Path | None = None,
        run: str | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(every, forget, retain, run_folder, run)
        self.label = label

    def names(self) -> set[str]:
        if self.label is not None:
            return {self.label}
        return {str(getattr(calling_trainer(), "objective", "NLL()"))}

    def _beside(self) -> list[Trajectory]:
        """Other callbacks of this Trainer that record the NLL under the same name."""
        others = [
            callback
            for callback in callbacks_of(calling_trainer())
            if isinstance(callback, Trajectory) and callback is not self
        ]
        return [callback for callback in others if callback.names() >= self.names()]

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        for other in self._beside():
            if other.forget is not self.forget or other.retain is not self.retain:
                raise ValueError(
                    f"gfast: {type(other).__name__} and NLLCallback would record the NLL of different lists of batches "
                    f"under one name; give both the same forget and retain"
                )
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def _measure(self, args: Any, state: Any, model: nn.Module) -> None:
        effects = [other for other in self._beside() if not isinstance(other, NLLCallback)]
        if any(other.measures_at(state) or state.global_step == 0 for other in effects):
            return  # its passes find the NLL too
        values = {}
        with rng_kept():
            for side, batches in zip(SIDES, (self.forget, self.retain), strict=True):
                batches = list(batches() if callable(batches) else batches)
                refuse_cut(model, {side: batches}, afresh=True)
                values[side] = _shared_nll(model, batches, args)
        trainer = calling_trainer()
        if trainer is not None:
            log_beside(trainer, {f"geffect/nll/{side}": value for side, value in values.items()})
        if not state.is_world_process_zero:
            return
        folder = self._folder(args)
        (name,) = self.names()
        common = {
            "run": run_name(str(folder)) if self.run is None else self.run,
            "objective": name,
            "step": state.global_step,
            "epoch": state.epoch or 0.0,
        }
        write_record(folder, [{**common, "quantity": "risk", "side": side, "value": x} for side, x in values.items()])
        logger.info("step %d, NLL: forget %.4f, retain %.4f", state.global_step, values["unlearn"], values["retain"])


def _shared_nll(model: nn.Module, batches: list[Mapping[str, Any]], args: Any) -> float:
    share, counted = own_batches(len(batches), 1, *shares_of(model, args))
    sums = nll_sums(model, [batches[index] for (index,) in share[:counted]])
    nll_sums(model, [batches[index] for (index,) in share[counted:]])  # other processes may wait for this one's forward
    if args.world_size > 1:
        from accelerate.utils import reduce

        sums = reduce(sums, "sum")
    total, tokens = sums.tolist()
    return total / max(tokens, 1.0)


def calling_trainer() -> Trainer | None:
    """The Trainer whose callback is running: it hands callbacks everything but itself, and nothing but its `log`
    reaches all that it reports to.
    """
    from transformers import Trainer  # where one is running it is loaded; flags are read without

    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def callbacks_of(trainer: Trainer | None) -> list[TrainerCallback]:
    """Its callbacks in the order of their calls."""
    return list(getattr(getattr(trainer, "callback_handler", None), "callbacks", []))


def log_beside(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Values to the log of a Trainer in the middle of its step."""
    wanted = trainer.control.should_log  # which a log ends: the step's own is still to come
    trainer.log(dict(values))
    trainer.control.should_log = wanted
