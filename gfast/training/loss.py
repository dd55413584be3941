# SPDX-License-Identifier: Apache-2.0
"""Objectives as the loss of any Trainer of transformers, over counts of their own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gfast import wrappers
from gfast.data import epoch_callback
from gfast.hf import OWN_KEYS
from gfast.model_output import ModelOutput
from gfast.model_state import evaluating
from gfast.objectives import NLL, PDU, RMU, RR, Mix, Objective, as_objective
from gfast.original import check_reference_name, with_reference
from gfast.packed import BOUNDS, check_pairs
from gfast.sides import SETS
from gfast.training import batches
from gfast.training.averaged import SavesAveraged, refuse_flat
from gfast.training.counting import CountedSteps
from gfast.training.dual import DualVariable, check_dual, moves
from gfast.training.evaluation import ExactEvaluation
from gfast.training.joint import outputs, refuse_joint
from gfast.training.known_original import KnownOriginal
from gfast.training.live import LiveSteps, RecordLive, loss_and_risk
from gfast.training.options import (
    REFUSED,
    check_switches,
    refuse_another_loss,
    refuse_compiled,
    refuse_cut_texts,
    refuse_ignored_arguments,
    refuse_ignored_options,
    refuse_own_steps,
    refuse_reentrant,
    refuse_search,
    refuse_summed_again,
    said_unreached,
    say_other_labels,
    say_what_a_batch_is,
    say_what_is_not_called,
)
from gfast.training.precision import say_other_precision
from gfast.training.reference import ReferenceCache
from gfast.training.terms import StepTerms

logger = logging.getLogger("gfast")

_FREE = ("remove_unused_columns", "average_tokens_across_devices")


class GFastLossMixin(CountedSteps, ExactEvaluation, SavesAveraged):
    r"""Gives a Trainer of one's own, or of TRL, the loss :math:`\gamma L_{forget}(D_u) + \alpha L_{retain}(D_r)`.

    Put it before the Trainer among the bases: ``class MyTrainer(GFastLossMixin, Trainer): objective = NPO(beta=0.1)``.
    The model runs by the call of its own outermost wrapper (DDP, FSDP, DeepSpeed); logits are not made where they need
    not be. Each term is divided by its own count (valid tokens, sequences or pairs) over all micro-batches of an
    optimizer step and all processes, so gradient accumulation and data parallelism give the gradient of one big batch,
    whatever ``average_tokens_across_devices`` is; but not of BalDRO, which weighs the texts of a micro-batch against
    each other: a warning says so. Logs hold ``loss`` and, per term, ``forget_loss``, ``retain_loss``,
    ``mean_weight`` (of the forget tokens' log-prob gradients) and ``mean_inverse_confidence`` (of 1/p over the forget
    tokens). Evaluation gives the token-mean NLL, of pairs that of the answers to forget. With PDU(primal_dual=True)
    alpha is where the factor of the retain loss starts, and ``dual`` what it has come to.

    Args (besides the Trainer's, by keyword):
        objective: an objective, a function of weights, or a Mix; without it the class's own `objective` is taken.
        references: {"forget": ReferenceCache, "retain": ReferenceCache}, those that the objective needs; items of the
            data set then have a `sample_id`. Without one the values are those of the Trainer's `ref_model`, where it
            has one (TRL's do), or with PEFT adapters those of the model itself as ``reference`` says.
        reference: as ``gfast.model_loss``: "auto", "base", or "adapter:NAME".
        own_loss_terms: add the terms that the model adds to its own loss, such as the balance of experts.
        joint_forward: run both sides in one call of the model, not in one each: FSDP and ZeRO-3 gather the weights once
            a step, and embeddings have one gradient. The loss differs by rounding; dropout draws other numbers.
        geffect_live, geffect_live_unlearn: measure the G-effect of every step from its own gradients (``
            gfast.GEffectMonitor``), on the unlearn side too: recorded in the run folder under the objective's name and
            " (live)", and logged as "geffect_live/retain", "geffect_live/cosine/retain", ... Batches have a retain side
            then.
        geffect_live_update: and what each step of Adam, AdamW or SGD with momentum did to the risk.
        surgery: what becomes of gradients that pull against each other, such as "pcgrad:group"
            (``gfast.geffect.Surgery``); it measures as geffect_live does.
        groups: of the live effect, "paper", "layer" or a function.

    Batches are {"forget": batch, "retain": batch} or plain Hugging Face batches, which are forget batches; override
    `gfast_batch` where they are something else.

    Raises:
        ValueError: no objective, an option or argument that would have no effect (``gfast.training.options``); at the
            first step, before any work, a batch that lacks what the objective needs.

    Source: arXiv 2502.19301.

    Example:
        >>> from gfast.objectives import WGA
        >>> from transformers import Trainer
        >>> class Forget(GFastLossMixin, Trainer):
        ...     objective = WGA(alpha=1.0)
        >>> trainer = Forget(model, args, train_dataset=data, data_collator=collator)    # doctest: +SKIP
    """

    objective: Any = None
    # Options of TrainingArguments that would have no effect. Not of two: columns that gfast reads are kept, and counts
    # are over all processes whatever is said.
    _refused_options = tuple(name for name in REFUSED if name not in _FREE)

    def __init__(
        self,
        *trainer_positional: Any,
        objective: Objective | None = None,
        references: Mapping[str, ReferenceCache] | None = None,
        reference: str = "auto",
        own_loss_terms: bool = False,
        joint_forward: bool = False,
        geffect_live: bool = False,
        geffect_live_unlearn: bool = False,
        geffect_live_update: bool = False,
        surgery: str | None = None,
        groups: Any = "paper",
        **trainer_arguments: Any,
    ) -> None:
        objective = type(self).objective if objective is None else objective
        if objective is None:
            raise ValueError(
                f"{type(self).__name__} has no objective: give objective=, one of gfast.objectives such as "
                f"NPO(beta=0.1), or set it in the class"
            )
        objective = as_objective(objective)
        check_reference_name(reference)
        check_switches(own_loss_terms=own_loss_terms, joint_forward=joint_forward, geffect_live=geffect_live)
        check_switches(geffect_live_unlearn=geffect_live_unlearn, geffect_live_update=geffect_live_update)
        refuse_ignored_arguments(type(self).__name__, **trainer_arguments)
        say_what_is_not_called(type(self), GFastLossMixin)
        super().__init__(*trainer_positional, **trainer_arguments)
        refuse_ignored_options(self.args, self._refused_options, type(self).__name__)
        refuse_compiled(self.accelerator)
        refuse_flat(self.args, self.optimizer, self.is_deepspeed_enabled)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel) cannot share one count: start one process a "
                f"GPU with torchrun, or show this one a single GPU (CUDA_VISIBLE_DEVICES)"
            )
        self.objective = objective if isinstance(objective, Mix) else Mix(objective)
        refuse_another_loss(self.args, self.objective.forget, type(self).__name__)
        self.references = dict(references or {})
        unknown = set(self.references) - set(SETS)
        if unknown:
            raise ValueError(f"references has the keys {sorted(unknown)}; the keys are forget and retain")
        if self.references:
            self.data_collator = batches.ReferenceJoin(self.data_collator, self.references)
        batches.check_layers(self.references, self.objective)
        say_other_precision(self.references | batches.caches_of(self.data_collator), self.accelerator, self.model)
        objectives = [each for each in (self.objective.forget, self.objective.retain) if each is not None]
        refuse_cut_texts(self.args, objectives, type(self).__name__)
        self.data_collator = batches.as_dealt(self.data_collator, objectives, self.accelerator, self.train_dataset)
        self._heads = {side: cache.head for side, cache in self.references.items()}
        self._reference, self._own_loss_terms, self._joint = reference, own_loss_terms, joint_forward
        # The loss is already normalised over the accumulated batch: Trainer must not divide it again (5.x, then 4.x).
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.terms = StepTerms()
        check_dual(self.objective)
        self.dual = DualVariable(self) if moves(self.objective) else None
        if self.dual is not None:
            self.add_callback(self.dual)
        self.live = None
        if geffect_live or geffect_live_unlearn or geffect_live_update or surgery is not None:
            if self.dual is not None:
                raise ValueError(
                    f"live effects and surgery work with fixed factors, and the dual variable of "
                    f"{self.objective.forget} moves one: leave geffect_live and surgery out, or give primal_dual=False"
                )
            refuse_own_steps(type(self), GFastLossMixin)
            self.live = LiveSteps(self, groups, geffect_live_unlearn, surgery, geffect_live_update)
            self.add_callback(RecordLive(self.live, getattr(self.args, "record_every", 1)))
        if joint_forward:
            refuse_joint(objectives, own_loss_terms, self.live is not None)
        self.add_callback(KnownOriginal())
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(epoch_callback(self.train_dataset))
        say_what_a_batch_is(self.args, objectives, self.accelerator.num_processes)

    token_weights: Any = None  # gives forget batches weights (`gfast.training.conflict`)

    def weighs(self, batch: Mapping[str, Any], side: str) -> bool:
        """Whether the tokens of a batch have weights beside the objective's own."""
        return batch.get("weight") is not None or (side == "forget" and self.token_weights is not None)

    def gfast_batch(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch of the Trainer's collator as gfast takes it; the batch itself unless overridden. It is called for
        counting too, so it must be cheap, and must not run the model. What masks labels does it here or in the
        collator: those that a `compute_loss` or `_prepare_inputs` takes out have been counted.
        """
        return batch

    def _set_signature_columns_if_needed(self) -> None:
        """Trainer's, which drops columns that the model does not take; and what gfast reads."""
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh:
            columns = {*self._signature_columns, *OWN_KEYS, *BOUNDS, *SETS}
            # without its preferred half, a batch of pairs would be taken for half as many pairs
            self._signature_columns = sorted(columns | {f"preferred_{name}" for name in columns})

    @property
    def _parts(self) -> list[tuple[str, Objective, float]]:
        parts = [("forget", self.objective.forget, self.objective.gamma)]
        if self.objective.retain is not None:
            alpha = self.objective.alpha if self.dual is None else self.dual.value
            parts.append(("retain", self.objective.retain, alpha))
        return parts

    def _sides(self, batch: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        return batches.sides(self.gfast_batch(batch))

    def _reference_model(self, objective: Objective, batch: Mapping[str, Any]) -> Any:
        """The Trainer's own reference model, where it has one and the batch lacks log-probs of the original."""
        wanted = set(objective.needs) & {"ref_logp"} - set(batch)
        return getattr(self, "ref_model", None) if wanted else None

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, refused: it writes over the objective."""
        refuse_search(type(self).__name__)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's: a training from its beginning, also after another one, or an attempt that did not fit."""
        self.terms.reset()
        for part in self._course:
            part.load(None)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:  # after an error too: whoever trains on these data next sets their epochs
            getattr(self.train_dataset, "release_epoch", lambda: None)()

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's; with a live G-effect or surgery, the two backwards of `gfast.GEffectMonitor`."""
        if self._step != self.state.global_step:
            raise ValueError(
                f"{type(self).__name__} has a get_batch_samples of its own, so that nobody counted what the loss of a "
                f"step is divided by: let it return super().get_batch_samples(...), or leave it out"
            )
        with said_unreached():
            if self.live is not None:
                return self.live.training_step(model, inputs)
            loss = super().training_step(model, inputs, *args, **kwargs)
        refuse_summed_again(self.model, self._micro_batches)  # hooks that come with the first forward
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        for part in self._course:
            part.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        for part in self._course:
            part.load(checkpoint)

    @property
    def _course(self) -> list[Any]:
        """What a resumed run goes on with beside the optimizer."""
        return [part for part in (self.live, self.token_weights) if part is not None]

    def _prepare_input(self, data: Any) -> Any:
        """Trainer's, which under DeepSpeed casts whatever is no integer to the model's dtype: not what gfast reads."""
        moved = super()._prepare_input(data)
        if isinstance(data, Mapping) and getattr(self, "is_deepspeed_enabled", False):
            return type(data)({**moved, **batches.to_device(batches.own_numbers(data), self.args.device)})
        return moved

    def _check_batch(self, batch: Any) -> None:
        batches.check_trained(batch, self.model)
        if len(self._parts) > 1 and self.live is None and not self._joint:  # both in one backward
            refuse_reentrant(self.model_wrapped)
        sides = self._sides(batch)
        for side, objective, _ in self._parts:
            if side not in sides:
                raise ValueError(
                    f"the objective {self.objective} has a {side} term, but the batches hold only {', '.join(sides)}; "
                    "use gfast.data.ForgetRetain with ForgetRetainCollator"
                )
            if "labels" not in sides[side]:
                raise ValueError(f"the {side} batch has no labels (its keys are {sorted(sides[side])})")
            check_pairs(sides[side], objective)
            if self._reference_model(objective, sides[side]) is None:
                batches.require_reference(sides[side], objective, side, self.model, self._heads)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """The weighted sum of the terms, each divided by its count over the whole optimizer step."""
        if return_outputs:
            raise ValueError("gfast computes losses without logits, so there are no outputs to return")
        sides = self._sides(inputs)
        self.terms.start_step(self.state.global_step if self._stepping else None)

        def losses(module: Any) -> Tensor:
            total = None
            answers = outputs(module, {side: sides[side] for side, _, _ in self._parts}) if self._joint else {}
            for side, objective, factor in self._parts:
                loss = factor * self._side_loss(module, sides[side], objective, side, factor, answer=answers.get(side))
                total = loss if total is None else total + loss
            return total - self._constant()

        # What follows the model's own forward, which carries Accelerate's autocast, has it too.
        with wrappers.autocast_of(self.accelerator):
            loss = wrappers.inside(model, losses)
        self.terms.add({"loss": loss})
        # Data parallelism averages gradients over processes; the terms of a step are divided by the global count.
        return loss * self.accelerator.num_processes if self._stepping else loss

    def _constant(self) -> float:
        """This micro-batch's share of what PDU takes off the retain loss, which has no gradient."""
        shares = self._parts_of_step
        if self.dual is not None:
            self.terms.add(
                {"dual": torch.tensor(self.dual.value / shares, dtype=torch.float64, device=self.args.device)}
            )
        if not isinstance(self.objective.forget, PDU) or self.objective.retain is None:
            return 0.0
        return self._parts[1][2] * self.objective.forget.retain_loss_eps / shares

    def _side_loss(
        self, model: Any, batch: Mapping[str, Any], objective: Objective, side: str, factor: float,
        risk_count: int | None = None, answer: ModelOutput | None = None,
    ) -> Any:  # fmt: skip
        """The loss of a side; with a risk_count also the NLL over that count, from the same forward. answer: what the
        model has answered already.
        """
        from gfast.model import check_batch, loss_and_own_terms, loss_of_output, output_loss
        from gfast.model_output import model_logp, model_output

        batch = dict(batch)
        device = batch["labels"].device
        if side in self._heads:
            # Moved once: the head is the largest thing that comes with a batch, and it is always the same.
            self._heads[side] = {name: tensor.to(device) for name, tensor in self._heads[side].items()}
            batch |= {name: tensor for name, tensor in self._heads[side].items() if name not in batch}
        reference_model = self._reference_model(objective, batch)
        if reference_model is not None:
            with torch.no_grad(), evaluating(reference_model):
                batch["ref_logp"] = model_logp(reference_model, batch)  # [B, T]
        stepping = self._stepping
        normalizer = self._normalizers.get(side) if stepping else None
        if stepping and side in self._counted:
            say_other_labels(batch["labels"], self._counted, side)
        # The model's own terms are means: over micro-batches and processes, whatever the factor of the objective is.
        own_terms = 0.0
        if self._own_loss_terms and factor and not isinstance(objective, (RMU, RR)):
            own_terms = 1.0 / (factor * self._parts_of_step)
        if side == "forget" and self.token_weights is not None and stepping:
            if self.token_weights.reads_answer and answer is None:
                answer = model_output(model, batch)
            batch["weight"] = self.token_weights.of(batch, answer)
        options = dict(normalizer=normalizer, reference=self._reference)
        risk = own = None
        if answer is not None:
            if check_batch(model, batch, objective):
                batch = with_reference(model, batch, objective, self._reference)
            out = loss_of_output(answer, batch, objective, normalizer=normalizer)
            if risk_count is not None:
                risk = output_loss(answer, {**batch, "weight": None}, NLL(), normalizer=risk_count).loss
        elif risk_count is None:
            out, own = loss_and_own_terms(model, batch, objective, own_terms != 0, **options)
        else:
            out, risk = loss_and_risk(model, batch, objective, risk_count, **options)
        self.terms.add({f"{side}_loss": out.loss})
        if side == "forget" and out.weight is not None:
            self.terms.add_weights(out.weight, out.logp, batch["labels"])
        loss = out.loss if own is None else out.loss + own_terms * own  # logged without them
        return loss if risk is None else (loss, risk)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log with the terms since the last one, averaged over steps."""
        if "loss" in logs:
            logs = {**logs, **self.terms.since_last_log(self.accelerator)}
            if self.live is not None:
                logs |= {f"geffect_live/{name}": value for name, value in self.live.latest.items()}
        super().log(logs, *args, **kwargs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Trainer's count of the tokens seen (transformers 5), summed over the sides."""
        for part in self._sides(inputs).values():
            super()._track_num_input_tokens(part)

    def floating_point_ops(self, inputs: Any) -> float:
        """Trainer's estimate, summed over the sides."""
        return sum(super(GFastLossMixin, self).floating_point_ops(part) for part in self._sides(inputs).values())
