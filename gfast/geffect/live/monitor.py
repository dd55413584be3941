"""GEffectMonitor: the G-effect of a training step, from the gradients that the step makes anyway."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gfast import peft_models, sharded, wrappers
from gfast.geffect.data import Term, identity_factor
from gfast.geffect.groups import assign
from gfast.geffect.live.calls import check_parameters, check_retain
from gfast.geffect.live.losses import Loss, check_factor, refuse, shares_forward, value_of
from gfast.geffect.live.merging import Gradients
from gfast.geffect.live.processes import Processes, here, like, refuse_hooks, refuse_inner
from gfast.geffect.live.step import LiveStep
from gfast.geffect.live.surgery import Surgery
from gfast.geffect.live.updates import Updates
from gfast.geffect.live.zero import MasterUpdates
from gfast.geffect.results import GEffect
from gfast.objectives import NLL, Objective
from gfast.wrappers import unwrap_name

logger = logging.getLogger("gfast")

ACCUMULATE = ("first", "exact")


class GEffectMonitor:
    r"""The G-effect of every training step, from the two gradients that the step computes anyway.

        e(D_r) = < grad R(D_r), grad L(D_u) >        and the norms of both, by layer group

    In place of ``(loss_u + loss_r).backward()`` the step calls ``forget(loss_u)`` and ``retain(loss_r)``. The first is
    a plain backward. The second sets the forget gradients aside (no copy), and as each parameter's retain gradient is
    complete, dots it with the one set aside, adds the two, and frees. The optimizer finds the gradients of the plain
    step, bit for bit those of ``loss_u.backward(); loss_r.backward()``; beside them one parameter's gradient exists.

    Args:
        model: what is trained: a Hugging Face model, possibly wrapped (PEFT, DDP, FSDP2, DeepSpeed's engine with
            ZeRO), or any module with groups= a function. In several processes each calls the monitor alike, and gets
            the effect of the global gradients.
        groups: as for ``gfast.g_effect``.
        unlearn: measure e(D_u) too. Free where `objective` is GA or NLL; else ``forget`` takes the risk of the forget
            batch, and one more backward.
        objective: what loss_u is, for the result's label and for that; an objective, or a label.
        risk: R, for the label.
        accumulate: with several retain micro-batches, "first": the effect on the first of them, free. "exact": on all
            of them, holding one more gradient, and under DDP the retain norm whatever its size. The
            result's `measured` says which.
        surgery: what is done where the gradients pull against each other: "pcgrad:group", "retain", "gru", "sago" ...;
            see ``gfast.geffect.Surgery``. None adds them up.
        optimizer: measure also what its steps do, for `update_effect`: Adam, AdamW, or SGD with momentum; any of a
            DeepSpeed engine.
        scaler: the GradScaler of a loop in fp16; losses are scaled by it and effects are of the losses themselves.

    Raises:
        ValueError: what ``g_effect`` refuses of a model and of groups, FSDP1, an unknown surgery. In ``forget``
            and ``retain``, before any work: a loss without a graph, gradients of an earlier step, retain without
            forget, a second retain, a model that was changed in between. After an error or Ctrl-C within a step the
            model has no gradients and no hooks, as when the step began. A step whose gradients are not finite is
            dropped: its gradients are taken away, so that the optimizer does nothing, a warning is logged, and
            `dropped` says why (with a scaler the gradients stay: it looks for itself).

    Source: arXiv 2502.19301, Definition 1.

    Example:
        >>> import torch, gfast
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
        >>> batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
        >>> monitor = gfast.GEffectMonitor(model)
        >>> monitor.forget(gfast.model_loss(model, batch, gfast.objectives.WGA()))
        >>> monitor.retain(gfast.model_loss(model, batch, gfast.objectives.NLL()))
        >>> monitor.effect().total("retain") < 0  # optimizer.step() and zero_grad() as ever
        True
    """

    def __init__(
        self,
        model: nn.Module,
        groups: str | Callable[[str], str] = "paper",
        unlearn: bool = False,
        *,
        objective: Objective | str = "forget loss",
        risk: Objective = NLL(),  # noqa: B008 - frozen
        accumulate: str = "first",
        surgery: str | Surgery | None = None,
        scaler: Any = None,
        optimizer: Any = None,
    ) -> None:
        if accumulate not in ACCUMULATE:
            raise ValueError(f'gfast: accumulate must be "first" or "exact", not {accumulate!r}')
        wrappers.refuse_offloaded(model)
        peft_models.refuse_merged(model)
        sharded.reshard(model)
        self.model, self.unlearn, self.objective, self.risk = model, unlearn, objective, risk
        self.accumulate, self.scaler = accumulate, scaler
        self.surgery = None if surgery is None else Surgery.parse(surgery)
        self.held = accumulate == "exact" or surgery is not None  # retain gradients apart until all are there
        self.groups = assign(model, groups)
        named = dict(model.named_parameters())
        names = list(self.groups.index)
        parameters = [named[name] for name in names]
        group_of = list(self.groups.index.values())
        self.group_of = torch.tensor(group_of, device="cpu")
        self.processes = Processes(model, names, parameters)
        zero = self.processes.zero
        if zero is not None:  # which has shards in their place, and a scale of its own
            if scaler is not None:
                refuse("DeepSpeed's engine scales losses itself: leave scaler= out")
            self.scaler, parameters = zero, zero.shards
        self.gradients = Gradients(names, parameters, self.processes, self.surgery, group_of, self._backward, self.held)
        self._updates = None
        if optimizer is not None:
            self._updates = Updates(optimizer, names, parameters) if zero is None else MasterUpdates(zero)
        self._finished: LiveStep | None = None
        self.dropped: str | None = None
        self._said, self._step = False, LiveStep()  # said: that the forget risk is lacking

    @property
    def identity(self) -> float | None:
        """c where the forget gradient is c times the forget risk's."""
        objective = self.objective
        return identity_factor(Term(objective, "forget"), self.risk) if isinstance(objective, Objective) else None

    def state_dict(self) -> dict[str, Tensor]:
        """What goes on from step to step, for a checkpoint: gru's averages, by parameter; nothing of other surgery."""
        names = self.gradients.names
        return {unwrap_name(names[index]): value for index, value in self.gradients.averages.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`; of DTensors it may hold what this process has of them.

        Raises:
            ValueError: it is of other parameters, or of another surgery; nothing of it is taken.
        """
        places = {unwrap_name(name): index for index, name in enumerate(self.gradients.names)}
        averages: dict[int, Tensor] = {}
        for name, value in state.items():
            if self.surgery is None or self.surgery.kind != "gru":
                refuse(f"the state holds averages of gru, and the monitor's surgery is {self.surgery}")
            parameter = self.gradients.parameters[places[name]] if name in places else None
            if parameter is None or here(value).shape != here(parameter).shape:
                refuse(f"the state holds an average of {name!r} {tuple(value.shape)}, which is no parameter here")
            averages[places[name]] = like(parameter, value)
        self.gradients.averages = averages

    def reset(self) -> None:
        """Give up a step that was begun: no gradients, and the next call starts a new one."""
        self.gradients.drop()
        self._step = LiveStep()

    def forget(self, loss: Loss, *, risk: Loss | None = None, factor: float = 1.0) -> None:
        """The backward of the forget loss; several calls are micro-batches, whose gradients add up.

        Args:
            loss: a scalar, what has one as `.loss` (``gfast.model_loss``), or a function that computes it. It is
                `factor` times the objective L that the effect is of.
            risk: R of the forget batch, for ``unlearn=True`` and other objectives than GA and NLL; it may share the
                loss's forward. With micro-batches, give it with the last: the effect is then on that one's risk.
            factor: what the objective is multiplied by in `loss`, the same with every micro-batch.
        """
        step, gradients = self._step, self.gradients
        if step.forgets and not step.retains and gradients.none() and not gradients.aside:
            step = self._step = LiveStep()  # given up by zero_grad()
        if step.retains:
            refuse("forget was called between the retain losses of a step: give all forget losses first")
        if risk is not None and not (self.unlearn and self.identity is None):
            refuse("forget(risk=...) is for unlearn=True with an objective that is neither GA nor NLL")
        if not step.forgets:
            present = [n for n, p in zip(gradients.names, gradients.parameters, strict=True) if p.grad is not None]
            if present:
                refuse(
                    f"{present[0]!r} has a gradient before the step begins: call optimizer.zero_grad() (with "
                    f"set_to_none=True, its default) before forget()"
                )
            if self._finished is None:  # once: DDP may be put around a model after its monitor is made
                refuse_inner(self.model)
                refuse_hooks(self.model)  # which are registered then, too
            if self.processes.zero is not None and self.dropped is None:
                self.processes.zero.begin()
            check_parameters(self.model, self.gradients, self.processes.sharded)
            step.weights = self._weights()
            step.updated = self._updates is not None and self._updates.begin()
            gradients.updates = self._updates if step.updated else None
            gradients.updates_forget = self.unlearn and self.identity is not None
        self._check_unchanged()
        check_factor(factor)
        if step.forgets and factor != step.forget_factor:
            refuse(
                f"forget(factor={factor:g}) after factor={step.forget_factor:g} in one step: it is what the objective "
                f"is multiplied by in the sum of the micro-batches' losses, the same for each"
            )
        shared = shares_forward(risk, self.processes.sharded)
        loss = value_of(loss, "forget loss")
        with self._undone():
            step.local |= self.processes.silent
            gradients.sweep(loss, None, retain_graph=shared)
            gradients.learn_parts()
            step.forgets, step.forget_factor = step.forgets + 1, factor
            step.add("forget", loss)
            if risk is not None:
                self._reduce_forget()
                with self._no_sync():
                    risk = value_of(risk, "forget risk")
                    gradients.measure(risk, step.unlearn_rows)
                step.values["unlearn"] = risk.detach()
            step.gradients = gradients.marks()

    def retain(self, loss: Loss | None, *, risk: Loss | None = None, factor: float = 1.0, last: bool = True) -> None:
        """The backward of the retain loss, in which the effect is measured and the gradients become those of the step.

        Args:
            loss: as for ``forget``: `factor` times the risk R of the retain batch. None: the step has no retain loss;
                with surgery there may be several such calls, whose risks add up.
            risk: R of the retain batch where `loss` is something else (KL, or none): one more backward measures the
                effect. It may share the loss's forward; a function that computes it under FSDP2 and ZeRO, as both are
                under DDP.
            factor: what the risk is multiplied by in `loss`. With accumulate="first" and losses of micro-batches that
                are divided by the count of all, times the first one's share of it.
            last: more retain micro-batches follow unless True.
        """
        step, gradients = self._step, self.gradients
        if not step.forgets:
            refuse(
                "a second retain in one step: give last=False with all but the last retain micro-batch"
                if self._finished is not None and gradients.none() is False
                else "retain was called before forget: a step is monitor.forget(loss_u), then monitor.retain(loss_r)"
            )
        shared = check_retain(self, step, loss, risk, last)
        check_factor(factor)
        self._check_unchanged()
        step.local_retain = self.processes.silent
        if step.local_retain and last and self.held:
            refuse(
                "surgery and accumulate='exact' work on the gradients of all processes: leave DDP.no_sync() for the "
                "last retain loss"
            )
        if self.scaler is not None and self.surgery is not None:
            gradients.scale = float(self.scaler.get_scale())
        with self._undone():
            if not step.retains:
                self._reduce_forget()
                if self.unlearn and self.identity is None and "unlearn" not in step.values:
                    self._lacks_risk()
            if risk is not None and step.retains == 0 and not (loss is None and self.surgery is not None):
                with self._no_sync():
                    risk = value_of(risk, "retain risk")
                    gradients.measure(risk, step.rows, retain_graph=shared and loss is not None)
                step.values["retain"], step.own_risk = risk.detach(), True
            if loss is not None:
                self._retain_loss(value_of(loss, "retain loss"), factor, last)
            elif self.surgery is not None:
                risk = value_of(risk, "retain risk")
                step.add("retain", risk)
                if not step.retains:
                    gradients.set_aside()
                if last:
                    gradients.merge(risk, step.rows, adds=False)
                else:
                    self._backward(risk)
            step.retains += 1
            step.gradients = gradients.marks()
            if last:
                self._finish()

    def _lacks_risk(self) -> None:
        if not self._said:
            logger.warning(
                "gfast: GEffectMonitor(unlearn=True) of %s got no risk of the forget batch, so e(D_u) of this step is "
                "NaN: give forget(..., risk=), or objective= if the loss is GA or NLL",
                self.objective,
            )
        self._said = True

    def _retain_loss(self, loss: Tensor, factor: float, last: bool) -> None:
        step, gradients = self._step, self.gradients
        first = not step.retains
        measures = last if self.held else first
        step.retain_loss = True
        if not step.own_risk and (self.held or first):
            step.add("retain", loss)
        if self.held and first:
            gradients.set_aside()
        if measures and (self.surgery is not None or not step.own_risk):
            if step.own_risk:
                gradients.updates = None  # of the risk, which was measured
            gradients.merge(loss, {} if step.own_risk else step.rows)
            if not step.own_risk:
                step.merged, step.retain_factor = True, factor
        else:
            self._backward(loss)
            if self.held and last:
                gradients.put_back()

    def effect(self, max_norm: float | None = None, of: str = "forget") -> GEffect:
        """The G-effect of the last finished step.

        Args:
            max_norm: for gradients that are then clipped to this norm, as ``torch.nn.utils.clip_grad_norm_`` does:
                the effect after clipping.
            of: "forget": of the forget loss. "step": of the gradient that the optimizer gets, after surgery.

        Returns:
            GEffect. Its unlearn side is NaN where it was not measured; `measured` says how each side was, and has
            step_norm, the norm of the step's gradient, and clip, what clipping multiplies it by. `risks` has the
            risks that were at hand.

        Raises:
            ValueError: no finished step, one that was dropped, or one whose gradient came in parts.
        """
        if of not in ("forget", "step"):
            refuse(f'of must be "forget" or "step", not {of!r}')
        if max_norm is not None and not max_norm >= 0:
            refuse(f"max_norm must be a norm, 0 or more, or None where gradients are not clipped, not {max_norm}")
        if self._finished is None:
            refuse(f"there is no G-effect: {self.dropped or 'no step was finished'}")
        if self._finished.torn is not None:
            refuse(
                f"there is no G-effect of this step: the retain gradient of {self._finished.torn!r} came in parts "
                f"(re-entrant checkpointing). The step's gradients are right, and the next step is measured"
            )
        return self._finished.result(self, max_norm, of)

    def update_effect(self) -> GEffect | None:
        r"""What the optimizer's last step did to the risk: < grad R(D), theta_after - theta_before > by group.

        It is the first-order change of R on the batches of the last finished step, by the optimizer's step before it,
        with the gradient at its end: momentum moves weights on when an objective's gradient has vanished, and the
        G-effect does not see that. The update is computed from the optimizer's state.

        Returns:
            GEffect without norms, its unlearn side NaN where `effect` has none; above zero R has risen. None before
            the optimizer's first step, and where it made none since the step before.

        Raises:
            ValueError: a monitor without `optimizer=`, and as `effect`.
        """
        if self._updates is None:
            refuse("the update's effect needs GEffectMonitor(..., optimizer=...)")
        self.effect()
        return self._finished.update(self) if self._finished.updated else None

    def _backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        if self.processes.zero is not None:
            self.processes.zero.backward(loss, retain_graph)
        else:
            self.gradients.owed |= self.processes.silent
            with self.gradients.each_alone():
                (loss if self.scaler is None else self.scaler.scale(loss)).backward(retain_graph=retain_graph)
            self.gradients.reduce()

    def _weights(self) -> list[tuple[int, bool]]:
        if self.processes.zero is not None:
            return self.processes.zero.versions()
        return [(here(p)._version, p.requires_grad) for p in self.gradients.parameters]

    def _check_unchanged(self) -> None:
        step, gradients = self._step, self.gradients
        now = self._weights(), gradients.marks()
        for what, current, before in zip(("", "the gradient of "), now, (step.weights, step.gradients), strict=True):
            changed = [name for name, x, y in zip(gradients.names, current, before, strict=False) if x != y]
            if changed:
                self.reset()
                refuse(
                    f"{what}{changed[0]!r} was changed after forget(): both gradients of a step must be of the same "
                    f"weights, and nothing else may add to them, clip them or set them to zero before the last "
                    f"retain(). The step was given up, its gradients are gone"
                )

    def _no_sync(self) -> Any:
        ddp = self.processes.replicated
        return nullcontext() if ddp is None else ddp.no_sync()

    def _reduce_forget(self) -> None:
        """Forget gradients that DDP.no_sync() left local become their mean over processes."""
        if not self._step.local:
            return
        for parameter in self.gradients.parameters:
            if parameter.grad is None:  # it may be there in another process
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(self.processes.mean(parameter.grad))
        self._step.local = False

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """After an error, Ctrl-C too, there are no gradients, as when the step began."""
        try:
            yield
        except BaseException:
            self.reset()
            raise

    def _finish(self) -> None:
        """Sums over processes and groups, one look at all numbers, and a step that is not finite is dropped."""
        step, gradients = self._step, self.gradients
        step.finish(self)
        gradients.learn_parts()
        if self.processes.zero is not None:
            self.processes.zero.give()
        if self._updates is not None:
            self._updates.end()
        self._step = LiveStep()
        self.dropped, self._finished = None, step
        if step.bad is None:
            gradients.keep_averages()
            return
        self._finished = None
        self.dropped = f"the step was dropped, because the gradient of {step.bad!r} is not finite"
        gradients.forget_averages()
        if self.scaler is None:  # which looks for itself, and wants to see them
            gradients.drop()
        logger.warning("gfast: %s: check the losses, the learning rate and, in float16, the loss scale", self.dropped)
