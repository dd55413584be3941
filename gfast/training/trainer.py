# SPDX-License-Identifier: Apache-2.0
"""UnlearnTrainer: the Hugging Face Trainer with a forget stream, a retain stream and any gfast objective."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer

from gfast.locks import claimed
from gfast.objectives import Objective
from gfast.training.along import asked_of_trainer
from gfast.training.config import UnlearnConfig
from gfast.training.conflict import check_weights, weights_of
from gfast.training.loss import GFastLossMixin
from gfast.training.options import refuse_ignored_arguments, refuse_ignored_options, refuse_ignored_with_data
from gfast.training.processes import together
from gfast.training.reference import ReferenceCache
from gfast.training.resume import check_adapters_saved, check_checkpoint, checkpoint_to_resume, saving
from gfast.training.stop import StopCallback
from gfast.training.terms import RecordTerms
from gfast.training.trajectory import callbacks_of


class UnlearnTrainer(GFastLossMixin, Trainer):
    r"""Trains on :math:`\gamma L_{forget}(D_u) + \alpha L_{retain}(D_r)`.

    Args (besides Trainer's, by keyword):
        args: UnlearnConfig; it names the objective unless `objective` is given.
        train_dataset, data_collator: batches are {"forget": batch, "retain": batch} (gfast.data.ForgetRetain and
            ForgetRetainCollator) or plain Hugging Face batches, which are forget batches.
        objective: an objective or a Mix.
        references: {"forget": ReferenceCache, "retain": ReferenceCache}, those that the objective needs. Not needed
            with PEFT adapters: the reference is then the model with its adapters off, computed each step where no cache
            is given.

    `geffect_every` and `nll_every` of the arguments measure the first `geffect_samples` items of both sets of a
    ForgetRetain data set; with other data, or other measurements, give a GEffectCallback or NLLCallback instead.

    The loss, its counts, logs and evaluation are those of `GFastLossMixin`; the terms of each step are recorded, runs
    resume, and a folder belongs to one run.

    Errors: ValueError for an option or argument of Trainer that would have no effect (compute_metrics,
    compute_loss_func, torch_compile, ...: gfast.training.options; geffect_every where it is not known what to
    measure on), with what to do instead; ValueError at the first step, before any work, for a batch that lacks what the
    objective needs.

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
        objective = args.build_objective() if objective is None else objective
        super().__init__(
            model=model,
            args=args,
            objective=objective,
            references=references,
            reference=args.reference,
            own_loss_terms=args.own_loss_terms,
            joint_forward=args.joint_forward,
            geffect_live=args.geffect_live,
            geffect_live_unlearn=args.geffect_live_unlearn,
            geffect_live_update=args.geffect_live_update,
            surgery=args.surgery,
            groups=args.groups,
            **trainer_arguments,
        )
        for callback in asked_of_trainer(self, objective):
            self.add_callback(callback)
        self.add_callback(RecordTerms(self.terms, str(objective), args.record_every, self.accelerator))
        if args.weights != "none":
            every, tau = args.weights_every, args.weights_tau
            check_weights(args.weights, self.objective.forget, tau, every, args.own_loss_terms)
            self.token_weights = weights_of(self, args.weights, every, tau)
            self.add_callback(self.token_weights)
        if args.stop:
            self.add_callback(StopCallback(args.stop))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's train; `resume_from_checkpoint=True` takes the newest complete checkpoint, if there is one.

        Errors: FolderInUse where another process trains into the output folder; DamagedFile for a checkpoint that is
        not as it was saved; ValueError for one of adapters that lacks what is trained beside them.
        """
        for stop in [callback for callback in callbacks_of(self) if isinstance(callback, StopCallback)]:
            self.remove_callback(stop)
            self.add_callback(stop)  # after whatever measures
            stop.check(self)
        with contextlib.ExitStack() as stack:
            main, processes = self.is_world_process_zero(), self.accelerator.num_processes
            together((lambda: stack.enter_context(claimed(self.args.output_dir))) if main else None, processes)
            if resume_from_checkpoint is True:
                checkpoint = checkpoint_to_resume(self.args.output_dir)
                resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
            if resume_from_checkpoint:
                # Once a machine: each sees its own disk.
                local = self.is_local_process_zero()
                together((lambda: check_checkpoint(resume_from_checkpoint)) if local else None, processes)
            check_adapters_saved(self.model, bool(resume_from_checkpoint))
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, and the manifest by which a damaged checkpoint is known."""
        # With the trial of a hyper-parameter search as the second argument, the folder is that trial's.
        trial = args[1] if len(args) > 1 else kwargs.get("trial")
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with saving(folder, self.args.should_save):
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Trainer's. Gathered weights are tensors of their own, also those that are tied: a model that is saved with
        both would not be tied when it is loaded.
        """
        if state_dict:
            first: dict[int, str] = {}
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                if name in state_dict and first.setdefault(id(parameter), name) != name:
                    state_dict[name] = state_dict[first[id(parameter)]]
        super()._save(output_dir, state_dict)

    def _save_rng_state(self, *args: Any, **kwargs: Any) -> None:
        super()._save_rng_state(*args, **kwargs)
        # What makes a checkpoint complete, trainer_state.json, comes after this: it must not come before other
        # processes have written theirs.
        self.accelerator.wait_for_everyone()
