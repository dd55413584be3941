# SPDX-License-Identifier: Apache-2.0
"""UnlearnTrainer: the Hugging Face Trainer with a forget stream, a retain stream and any gfast objective."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from gfast import wrappers
from gfast.data import epoch_callback
from gfast.locks import claimed
from gfast.objectives import RMU, RR, Mix, Objective
from gfast.sides import SETS
from gfast.training import batches
from gfast.training.config import UnlearnConfig
from gfast.training.evaluation import EvaluationNLL, OwnBatches
from gfast.training.options import (
    refuse_compiled,
    refuse_ignored_arguments,
    refuse_ignored_options,
    refuse_ignored_with_data,
)
from gfast.training.processes import together
from gfast.training.reference import ReferenceCache
from gfast.training.resume import check_checkpoint, last_checkpoint, saving
from gfast.training.terms import RecordTerms, StepTerms


class UnlearnTrainer(Trainer):
    r"""Trains on :math:`\gamma L_{forget}(D_u) + \alpha L_{retain}(D_r)`.

    Args (besides Trainer's, by keyword):
        args: UnlearnConfig; it names the objective unless `objective` is given.
        train_dataset, data_collator: batches are {"forget": batch, "retain": batch} (gfast.data.ForgetRetain and
            ForgetRetainCollator) or plain Hugging Face batches, which are forget batches.
        objective: an objective or a Mix.
        references: {"forget": ReferenceCache, "retain": ReferenceCache}, those that the objective needs. Not needed
            with PEFT adapters: the reference is then the model with its adapters off, computed each step where no cache
            is given.

    Each term is normalised by its own count (valid tokens, sequences or pairs) over all micro-batches of an optimizer
    step and all processes, so gradient accumulation and data parallelism give the gradient of one big batch. Logs hold
    `loss` and, per term, `forget_loss`, `retain_loss`, `mean_weight` (of the forget tokens' log-prob gradients) and
    `mean_inverse_confidence` (of 1/p over the forget tokens). Evaluation gives the token-mean NLL.

    Errors: ValueError for an option or argument of Trainer that would have no effect (compute_metrics,
    compute_loss_func, torch_compile, ...: gfast.training.options), with what to do instead; ValueError at the first
    step, before any work, for a batch that lacks what the objective needs.

    >>> args = UnlearnConfig("run", objective="GA")    # doctest: +SKIP
    >>> trainer = UnlearnTrainer(model, args, train_dataset=data, data_collator=collator)    # doctest: +SKIP
    >>> trainer.train()    # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any = None,
        args: UnlearnConfig | None = None,
        *,
        objective: Objective | None = None,
        references: Mapping[str, ReferenceCache] | None = None,
        **trainer_arguments: Any,
    ) -> None:
        args = UnlearnConfig(output_dir="unlearned") if args is None else args
        if not isinstance(args, UnlearnConfig):
            raise ValueError(f"UnlearnTrainer takes an UnlearnConfig as args, not a {type(args).__name__}")
        # Options may have been set after the config was made.
        refuse_ignored_options(args)
        refuse_ignored_arguments(**trainer_arguments)
        refuse_ignored_with_data(args, trainer_arguments.get("train_dataset"))
        if args.n_gpu > 1:
            # DataParallel replicates the model a step and cannot share one normaliser; torchrun starts one process a
            # GPU.
            args._n_gpu = 1
        super().__init__(model=model, args=args, **trainer_arguments)
        refuse_compiled(self.accelerator)
        objective = args.build_objective() if objective is None else objective
        self.objective = objective if isinstance(objective, Mix) else Mix(objective)
        self.references = dict(references or {})
        unknown = set(self.references) - set(SETS)
        if unknown:
            raise ValueError(f"references has the keys {sorted(unknown)}; the keys are forget and retain")
        if self.references:
            self.data_collator = batches.ReferenceJoin(self.data_collator, self.references)
        self._heads = {side: cache.head for side, cache in self.references.items()}
        # The loss is already normalised over the accumulated batch: Trainer must not divide it again (5.x, then 4.x).
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.terms = StepTerms()
        self._normalizers: dict[str, float] = {}
        self._micro_batches = 1
        self.add_callback(RecordTerms(self.terms, str(objective), args.record_every, self.accelerator))
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(epoch_callback(self.train_dataset))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's train; `resume_from_checkpoint=True` takes the newest complete checkpoint, if there is one.

        Errors: FolderInUse where another process trains into the output folder; DamagedFile for a checkpoint that is
        not as it was saved.
        """
        with contextlib.ExitStack() as stack:
            main, processes = self.is_world_process_zero(), self.accelerator.num_processes
            together((lambda: stack.enter_context(claimed(self.args.output_dir))) if main else None, processes)
            if resume_from_checkpoint is True:
                found = last_checkpoint(self.args.output_dir)
                resume_from_checkpoint = None if found is None else str(found)
            if resume_from_checkpoint:
                # Once a machine: each sees its own disk.
                local = self.is_local_process_zero()
                together((lambda: check_checkpoint(resume_from_checkpoint)) if local else None, processes)
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, and the manifest by which a damaged checkpoint is known."""
        # With the trial of a hyper-parameter search as the second argument, the folder is that trial's.
        trial = args[1] if len(args) > 1 else kwargs.get("trial")
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with saving(folder, self.args.should_save):
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()

    def _save_rng_state(self, *args: Any, **kwargs: Any) -> None:
        super()._save_rng_state(*args, **kwargs)
        # What makes a checkpoint complete, trainer_state.json, comes after this: it must not come before other
        # processes have written theirs.
        self.accelerator.wait_for_everyone()

    @property
    def _reference(self) -> str:
        """Of a run that goes on from a checkpoint the adapters are not zero, and the base is the original still."""
        return "base" if self.args.reference == "auto" and self.state.global_step > 0 else self.args.reference

    @property
    def _parts(self) -> list[tuple[str, Objective, float]]:
        parts = [("forget", self.objective.forget, self.objective.gamma)]
        if self.objective.retain is not None:
            parts.append(("retain", self.objective.retain, self.objective.alpha))
        return parts

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: Any = None
    ) -> tuple[list[Any], int | None]:
        """The micro-batches of one optimizer step, and what their terms are to be divided by, over all processes."""
        batch_samples = []
        # Trainer looks whether a run is finished after a step: one that is resumed at its end would take one too many.
        for _ in range(num_batches if self.state.global_step < self.state.max_steps else 0):
            try:
                batch_samples.append(next(epoch_iterator))
            except StopIteration:
                break
        if not batch_samples:
            return batch_samples, None
        self._check_batch(batch_samples[0])
        self._micro_batches = len(batch_samples)
        counts = [
            sum(batches.count(objective, batches.sides(batch)[side]) for batch in batch_samples)
            for side, objective, _ in self._parts
        ]
        if self.accelerator.num_processes > 1:
            local = torch.tensor(counts, dtype=torch.int64, device=self.args.device)
            counts = self.accelerator.reduce(local, "sum").tolist()
        self._normalizers = {
            side: float(max(count, 1)) for (side, _, _), count in zip(self._parts, counts, strict=True)
        }
        # Not None: otherwise Trainer 4.x would divide the loss by the number of micro-batches.
        return batch_samples, int(sum(counts))

    def _check_batch(self, batch: Any) -> None:
        if not isinstance(batch, Mapping):
            raise ValueError(f"a batch must be a mapping, and the collator made a {type(batch).__name__}")
        found = batches.sides(batch)
        for side, objective, _ in self._parts:
            if side not in found:
                raise ValueError(
                    f"the objective {self.objective} has a {side} term, but the batches hold only {', '.join(found)}; "
                    "use gfast.data.ForgetRetain with ForgetRetainCollator"
                )
            if "labels" not in found[side]:
                raise ValueError(f"the {side} batch has no labels (its keys are {sorted(found[side])})")
            batches.require_reference(found[side], objective, side, self.model, self._heads)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """The weighted sum of the terms, each divided by its count over the whole optimizer step."""
        if return_outputs:
            raise ValueError("UnlearnTrainer computes losses without logits, so there are no outputs to return")
        found = batches.sides(inputs)
        self.terms.start_step(self.state.global_step)

        def losses(module: Any) -> Tensor:
            total = None
            for side, objective, factor in self._parts:
                loss = factor * self._side_loss(module, found[side], objective, side, factor)
                total = loss if total is None else total + loss
            return total

        # What follows the model's own forward, which carries Accelerate's autocast, has it too.
        with wrappers.autocast_of(self.accelerator):
            loss = wrappers.inside(model, losses)
        self.terms.add({"loss": loss})
        # Data parallelism averages gradients over processes; the terms are already divided by the global count.
        return loss * self.accelerator.num_processes

    def _side_loss(
        self, model: Any, batch: Mapping[str, Any], objective: Objective, side: str, factor: float
    ) -> Tensor:
        from gfast.model import model_loss

        batch = dict(batch)
        device = batch["labels"].device
        if side in self._heads:
            # Moved once: the head is the largest thing that comes with a batch, and it is always the same.
            self._heads[side] = {name: tensor.to(device) for name, tensor in self._heads[side].items()}
            batch |= {name: tensor for name, tensor in self._heads[side].items() if name not in batch}
        normalizer = self._normalizers.get(side) if model.training else None
        # The model's own terms are means: over micro-batches and processes, whatever the factor of the objective is.
        own_terms = 0.0
        if self.args.own_loss_terms and factor and not isinstance(objective, (RMU, RR)):
            own_terms = 1.0 / (factor * self._micro_batches * self.accelerator.num_processes)
        out = model_loss(model, batch, objective, normalizer=normalizer, reference=self._reference, own_terms=own_terms)
        self.terms.add({f"{side}_loss": out.loss})
        if side == "forget" and out.weight is not None:
            self.terms.add_weights(out.weight, out.logp, batch["labels"])
        return out.loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """NLL of a plain or nested batch, token mean; logits are never made, so predictions and labels are None."""
        from gfast.model import model_logp

        found = batches.sides(self._prepare_inputs(inputs))
        sums = {}
        with torch.no_grad(), wrappers.autocast_of(self.accelerator):
            for side, batch in found.items():
                logp = model_logp(model, batch)  # [B, T]
                tokens = (batch["labels"][..., 1:] != -100).sum()
                sums[side] = torch.stack([-logp.double().sum(), tokens.double()])
        if self._evaluation is not None:
            self._evaluation.add(sums, nested=len(found) > 1)
        total = sum(sums.values())
        return (total[0] / total[1].clamp(min=1)).float(), None, None

    _evaluation: EvaluationNLL | None = None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Trainer's; in one of several processes the batches that are its own."""
        if self.args.world_size == 1 or (eval_dataset is None and self.eval_dataset is None):
            return super().get_eval_dataloader(eval_dataset)
        key = eval_dataset if isinstance(eval_dataset, str) else None
        dataset = self.eval_dataset[key] if key is not None else eval_dataset
        return self._own_batches(self.eval_dataset if dataset is None else dataset, key)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Trainer's; in one of several processes the batches that are its own."""
        if self.args.world_size == 1:
            return super().get_test_dataloader(test_dataset)
        return self._own_batches(test_dataset)

    def _own_batches(self, dataset: Any, key: str | None = None) -> OwnBatches:
        # As Trainer does: workers that outlive an evaluation are started once a data set.
        if not self.args.dataloader_persistent_workers:
            return OwnBatches(dataset, self.data_collator, self.args)
        kept = self.__dict__.setdefault("_own_loaders", {})
        if key not in kept or kept[key].dataset is not dataset:
            kept[key] = OwnBatches(dataset, self.data_collator, self.args)
        return kept[key]

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's loop, with losses that are exact means over the tokens of the data set, per side for nested
        batches.
        """
        self._evaluation = EvaluationNLL(getattr(dataloader, "counted", None))
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics.update(self._evaluation.metrics(self.accelerator, prefix))
        finally:
            self._evaluation = None
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log with the terms since the last one, averaged over steps."""
        if "loss" in logs:
            logs = {**logs, **self.terms.since_last_log(self.accelerator)}
        super().log(logs, *args, **kwargs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Trainer's count of the tokens seen (transformers 5), summed over the sides."""
        for part in batches.sides(inputs).values():
            super()._track_num_input_tokens(part)

    def floating_point_ops(self, inputs: Any) -> float:
        """Trainer's estimate, summed over the sides."""
        return sum(super(UnlearnTrainer, self).floating_point_ops(part) for part in batches.sides(inputs).values())
