# SPDX-License-Identifier: Apache-2.0
"""EvaluateCallback: `gfast evaluate` along a training, in any Hugging Face Trainer, in one process or several."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from gfast import wrappers
from gfast.evaluation.results import (
    check_retain_log,
    read_summaries,
    require_libraries,
    summarize,
    wholes,
    write_summaries,
)
from gfast.evaluation.run import Evaluation
from gfast.evaluation.samples import EvaluationSet, encoded
from gfast.files import write_json
from gfast.given import whole
from gfast.metrics import EvaluationLog
from gfast.metrics.log import parse_log
from gfast.model_state import rng_kept
from gfast.training.averaged import averaged
from gfast.training.processes import together

logger = logging.getLogger("gfast")


class EvaluateCallback(TrainerCallback):
    """Evaluates the model before training, every `every` optimizer steps and after the last one.

    Each evaluation is a log, `<output_dir>/evaluations/step-00000010.json`, as `gfast.metrics.load_log` reads it. Its
    numbers are in `summaries[step]` of every process, and of all steps in `<output_dir>/evaluations/summaries.json`,
    where `gfast report` finds what the model keeps at equal forgetting. Several processes share the samples and gather
    what they found (with FSDP or ZeRO-3 each runs all of them, as their forwards must stay in step). Parameters,
    gradients, modes and random states are as before an evaluation. The Trainer's mixed precision (bf16, fp16) is no
    part of it: the numbers are those of `gfast evaluate` of the saved model.

    Args:
        every: optimizer steps between evaluations; 0: before and after training only.
        sets: what to ask, `gfast.evaluation.EvaluationSet`; `gfast.evaluation.sources` has those of benchmarks.
        tokenizer: the model's.
        retain_log: of the model that never saw the forget set, on the same rows: forget quality needs it.
        batch_size, extraction: as `gfast evaluate` has them. template, chat_kwargs: the prompt's.
        folder: where logs go; None: `<output_dir>/evaluations`.

    Errors: ValueError for rows that cannot be evaluated, or are too long for the model, a retain log that does not
    compare, and options that no set has a use for, before training; for a negative `every`.

    >>> from gfast.evaluation import EvaluateCallback, sources
    >>> callback = EvaluateCallback(10, sources.bundled(), tokenizer)           # doctest: +SKIP
    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])    # doctest: +SKIP
    """

    def __init__(
        self,
        every: int,
        sets: Sequence[EvaluationSet],
        tokenizer: Any,
        *,
        retain_log: EvaluationLog | None = None,
        batch_size: int = 16,
        extraction: Sequence[str] = (),
        template: str = "auto",
        chat_kwargs: Mapping[str, Any] | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        every = whole("gfast: every", every, meaning="the optimizer steps between evaluations, or 0")
        require_libraries(retain_log, any(eval_set.name == "holdout" for eval_set in sets))
        self.every, self.retain_log, self.folder = every, retain_log, folder
        if (template != "auto" or chat_kwargs) and all(eval_set.encode is not None for eval_set in sets):
            raise ValueError(
                "gfast: template and chat_kwargs have no effect on these sets, which write their own prompts (encode): "
                "leave them out"
            )
        samples = [encoded(eval_set, tokenizer, template, chat_kwargs) for eval_set in sets]
        if retain_log is not None:
            check_retain_log(sets, samples, retain_log)
        self.evaluation = Evaluation(sets, samples, tokenizer, batch_size, extraction)
        self.summaries: dict[int, dict[str, Any]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module = None, **kwargs: Any) -> None:
        self.evaluation.check_model(wrappers.measured(model))
        # Of a run that is gone on with, what it found until then.
        there = read_summaries(self._folder(args)) if state.global_step else {}
        self.summaries = {step: summary for step, summary in there.items() if step <= state.global_step}
        if state.is_world_process_zero:  # logs of later steps are of another course
            for path in self._folder(args).glob("step-*.json"):
                if path.stem[5:].isdecimal() and int(path.stem[5:]) > state.global_step:
                    path.unlink()
        if state.global_step == 0:
            self._evaluate(args, state, model, kwargs.get("optimizer"))

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module = None, **kwargs: Any) -> None:
        if (self.every and state.global_step % self.every == 0) or state.global_step >= state.max_steps:
            self._evaluate(args, state, model, kwargs.get("optimizer"))

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module = None, **kwargs: Any) -> None:
        # Only a run that was stopped early gets here unmeasured.
        if not args.load_best_model_at_end and state.global_step not in self.summaries:
            self._evaluate(args, state, model, kwargs.get("optimizer"))

    def _evaluate(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        units, world = self.evaluation.units(), args.world_size
        in_step = wrappers.has_fsdp(model) or not wrappers.is_whole(next(model.parameters()))
        in_step = in_step or wrappers.tensor_parallel_over(model) > 1
        share = units if in_step or world == 1 else units[args.process_index :: world]
        with rng_kept(), wrappers.own_precision(model), averaged(optimizer):
            measured = self._own(model, share, world)
        log = self.evaluation.log(measured, f"step {state.global_step}", {"step": state.global_step})
        summary = summarize(parse_log(log), self.retain_log)
        self.summaries[state.global_step] = summary
        folder = self._folder(args)

        def write() -> None:
            write_json(folder / f"step-{state.global_step:08d}.json", log)
            write_summaries(folder, self.summaries)

        together(write if state.is_world_process_zero else None, world)
        if state.is_world_process_zero:
            said = [
                f"{name}: "
                + ", ".join(f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float))
                for name, values in summary["sets"].items()
            ]
            logger.info("step %d, evaluation of %s", state.global_step, "; ".join([*said, *wholes(summary)]))

    def _folder(self, args: Any) -> Path:
        return Path(args.output_dir) / "evaluations" if self.folder is None else Path(self.folder)

    def _own(self, model: nn.Module, share: Sequence[Any], world: int) -> dict[str, Any]:
        """The results of all units: those of this process's, and what the others found. All fail where one does."""
        results: dict[str, Any] = {}
        together(lambda: results.update(self.evaluation.run(model, units=share)), world)
        if world > 1:
            from accelerate.utils import gather_object

            for part in gather_object([results]):
                results = {**results, **part}
        return results
