# SPDX-License-Identifier: Apache-2.0
"""Training steps that measure their own G-effect, and may operate on their gradients: `gfast.GEffectMonitor` in a
Trainer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback

from gfast import wrappers
from gfast.geffect.data import OWN_DATA
from gfast.geffect.groups import assign
from gfast.geffect.live.processes import here
from gfast.geffect.live.surgery import Surgery
from gfast.geffect.live.zero import check_config
from gfast.model import output_loss
from gfast.model_output import model_output
from gfast.objectives import GA, NLL, UNWEIGHTED, Mix, Objective
from gfast.ops.reductions import LossOutput
from gfast.original import with_reference
from gfast.packed import count
from gfast.sides import SETS, SIDES
from gfast.tensor_files import TensorFile, write_tensors
from gfast.training.records import run_name, write_record

if TYPE_CHECKING:
    from transformers import Trainer

    from gfast.geffect import GEffectMonitor
    from gfast.geffect.results import GEffect

logger = logging.getLogger("gfast")

AVERAGES = "gru_average{shard}.safetensors"  # in a checkpoint; of several processes that shard parameters, one each
LIVE = " (live)"  # what the objective's name ends with in the records of live effects


class LiveSteps:
    """The steps of a Trainer with `GFastLossMixin`, through a monitor.

    The forget backwards of all micro-batches of a step come first, then the retain backwards.
    """

    def __init__(self, trainer: Trainer, groups: Any, unlearn: bool, surgery: str | None, update: bool) -> None:
        self.trainer, self.groups = trainer, groups
        forget, retain = trainer.objective.forget, trainer.objective.retain
        check_live(trainer.objective, unlearn)
        if surgery is not None:
            surgery = str(Surgery.parse(surgery))
        if getattr(trainer, "is_deepspeed_enabled", False):
            check_config(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
        assign(wrappers.measured(trainer.model), groups)  # refused here, not at the first step
        self.unlearn, self.surgery, self.update = unlearn, surgery, update
        self.label = str(trainer.objective if retain is not None or trainer.objective.gamma != 1.0 else forget) + LIVE
        self.batches: Sequence[Mapping[str, Any]] = []
        self._at = 0
        self._monitor: GEffectMonitor | None = None
        self._checkpoint: TensorFile | None = None  # whose averages the monitor goes on with
        self.effect: GEffect | None = None
        self.moved: GEffect | None = None
        self.latest: dict[str, float] = {}

    def begin(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """A new optimizer step, of these micro-batches."""
        if self._monitor is not None:
            self._monitor.reset()
        sides = [self.trainer._sides(batch) for batch in batches]
        for parts in sides:
            if "retain" not in parts or "labels" not in parts["retain"]:
                raise ValueError(
                    "a live G-effect and surgery need a retain batch beside every forget batch, and the batches hold "
                    f"only {', '.join(parts)}; use gfast.data.ForgetRetain with ForgetRetainCollator"
                )
        # Sides whose loss has weights of its own, or the model's terms: its gradient is no risk's.
        terms = self.trainer._own_loss_terms
        apart = [terms or any(self.trainer.weighs(parts[side], side) for parts in sides) for side in SETS]
        tokens = [[count(NLL(), parts[side]) for parts in sides] for side in SETS]
        counts = [tokens[0][-1], sum(tokens[0]), tokens[1][0], sum(tokens[1]), *map(int, apart)]
        forget, all_forget, first, retain, *apart = self.trainer._over_processes(counts)
        self._apart = {side for side, processes in zip(SETS, apart, strict=True) if processes}
        self.batches, self._at, self._first_share = batches, 0, first / max(retain, 1)
        # Of the micro-batches, in all processes, that a risk of its own is measured on: the last forget one, the first
        # retain one; all retain ones where surgery spares them without a retain loss.
        spared = self.surgery is not None and self.trainer.objective.retain is None
        self._risk_counts = {"forget": max(forget, 1), "retain": max(retain if spared else first, 1)}
        held = spared or (self.surgery is not None and not self._retain_apart)  # surgery waits for all of them
        on = {"unlearn": all_forget if self._free else forget, "retain": retain if held else first}
        self._without = [side for side in SIDES if not on[side]]  # of no labels there is no risk, and no effect

    @property
    def _free(self) -> bool:
        """Whether the forget loss is the risk's."""
        return isinstance(self.trainer.objective.forget, (GA, NLL)) and "forget" not in self._apart

    @property
    def _retain_apart(self) -> bool:
        """Whether the retain loss is not the risk, which is measured by a backward of its own."""
        return self.trainer.objective.retain != NLL() or "retain" in self._apart

    def monitor(self, model: Any) -> GEffectMonitor:
        """The monitor of the model as the Trainer has wrapped it."""
        from gfast.geffect import GEffectMonitor

        if self._monitor is None or self._monitor.model is not model:
            scaler = getattr(self.trainer.accelerator, "scaler", None)
            optimizer = self.trainer.optimizer if self.update else None
            options = dict(surgery=self.surgery, scaler=scaler, optimizer=optimizer)
            self._monitor = GEffectMonitor(model, self.groups, **options)
            if self._checkpoint is not None:
                self._monitor.load_state_dict({name: self._checkpoint.get(name) for name in self._checkpoint.names})
                self._checkpoint = None
        forget = self.trainer.objective.forget  # with weights in this step nothing follows of it
        self._monitor.objective = str(forget) if "forget" in self._apart else forget
        self._monitor.unlearn = self.unlearn or self._free
        return self._monitor

    def _averages(self, folder: str) -> Path:
        args, parameters = self.trainer.args, self.trainer.model.parameters()
        sharded = self.trainer.is_deepspeed_enabled or any(hasattr(p, "device_mesh") for p in parameters)
        sharded = sharded and args.world_size > 1
        return Path(folder) / AVERAGES.format(shard=f"-{args.process_index}-of-{args.world_size}" if sharded else "")

    def save(self, folder: str) -> None:
        """Into a checkpoint: what gru goes on with, without which a resumed run is another one."""
        path = self._averages(folder)
        if self._monitor is None or not (self.surgery or "").startswith("gru"):
            return
        if "-of-" in path.name or self.trainer.args.should_save:
            path.parent.mkdir(parents=True, exist_ok=True)
            state = {name: here(value) for name, value in self._monitor.state_dict().items()}
            write_tensors(path, state, self.surgery)

    def load(self, folder: str | None) -> None:
        """From a checkpoint, or from None: a training that begins."""
        self._monitor = self._checkpoint = None
        if folder is None or not (self.surgery or "").startswith("gru"):
            return
        path = self._averages(folder)
        if not path.exists():
            raise ValueError(
                f"the checkpoint {folder} has no {path.name}, the averages of surgery {self.surgery!r} that the run "
                f"goes on with: it is one of another surgery, or of another number of processes; start a run of its own"
            )
        self._checkpoint = TensorFile(path, "go on from the checkpoint before it")
        if self._checkpoint.description != self.surgery:
            raise ValueError(
                f"the checkpoint {folder} is of a run with surgery {self._checkpoint.description!r}, and this one has "
                f"{self.surgery!r}: give that, or start a run of its own"
            )

    def training_step(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """In place of Trainer's, for the next micro-batch."""
        trainer, mix = self.trainer, self.trainer.objective
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()
        for module in model.modules():  # under FSDP2 every backward must reduce
            if hasattr(module, "set_requires_gradient_sync"):
                module.set_requires_gradient_sync(True)
        monitor = self.monitor(model)
        trainer.terms.start_step(trainer.state.global_step)
        if self._at == 0:
            batches = [trainer._prepare_inputs(batch) for batch in self.batches]
            self._values = [
                self._forget(monitor, trainer._sides(batch)["forget"], last=index == len(batches) - 1)
                for index, batch in enumerate(batches)
            ]
        value, first, last = self._values[self._at], self._at == 0, self._at == len(self.batches) - 1
        self._at += 1
        if mix.retain is None and self.surgery is None:
            inputs = self.batches[0]  # that the effect is measured on, at the end
        part = trainer._sides(trainer._prepare_inputs(inputs))["retain"]
        risk = partial(self._risk, model, part, "retain")
        if mix.retain is None:
            if last or self.surgery is not None:
                monitor.retain(None, risk=risk, last=last)
        else:
            values: list[Tensor] = []

            def loss() -> Tensor:
                retain_loss = mix.alpha * self._compute(
                    model, trainer._side_loss, part, mix.retain, "retain", mix.alpha
                )
                values.append(retain_loss.detach())
                return retain_loss * self._processes

            apart = risk if first and self._retain_apart else None
            share = self._first_share if self.surgery is None else 1.0  # surgery waits for all micro-batches
            monitor.retain(loss, risk=apart, factor=mix.alpha * (share or 1.0), last=last)
            value = value + values[0] - trainer._constant()
        trainer.terms.add({"loss": value})
        if last:
            self._finished(monitor)
            if monitor.processes.zero is not None:
                monitor.processes.zero.step(dropped=monitor.dropped is not None)
        return value * self._processes

    def _forget(self, monitor: GEffectMonitor, batch: Mapping[str, Any], last: bool) -> Tensor:
        trainer, mix, model = self.trainer, self.trainer.objective, monitor.model
        measures = last and monitor.unlearn and monitor.identity is None
        # FSDP and ZeRO free what a second backward would need
        shares = measures and not trainer._own_loss_terms and not monitor.processes.sharded
        shares = shares and not isinstance(mix.forget, UNWEIGHTED)
        computed = self._compute(
            model, trainer._side_loss, batch, mix.forget, "forget", mix.gamma,
            *([self._risk_counts["forget"]] if shares else []),
        )  # fmt: skip
        loss, risk = (
            computed if shares else (computed, partial(self._risk, model, batch, "forget") if measures else None)
        )
        if shares:
            risk = risk * self._processes
        monitor.forget(mix.gamma * self._processes * loss, risk=risk, factor=mix.gamma)
        return mix.gamma * loss.detach()

    def _risk(self, model: Any, batch: Mapping[str, Any], side: str) -> Tensor:
        from gfast.model import model_loss

        divisor = self._risk_counts[side]
        batch = {**batch, "weight": None}  # never the risk's
        loss = self._compute(model, lambda module: model_loss(module, batch, NLL(), normalizer=divisor).loss)
        return loss * self._processes

    @property
    def _processes(self) -> int:
        """Data parallelism takes the mean over processes of what is divided by a count over all of them."""
        return self.trainer.accelerator.num_processes

    def _compute(self, model: Any, call: Callable[..., Any], *args: Any) -> Any:
        with wrappers.autocast_of(self.trainer.accelerator):
            return wrappers.inside(model, lambda module: call(module, *args))

    def _finished(self, monitor: GEffectMonitor) -> None:
        """What is recorded and logged of a step, at the weights before it."""
        norm = self.trainer.args.max_grad_norm
        self.effect, self.latest = None, {"dropped": 1.0}
        if monitor.dropped is not None:
            return
        self.effect = effect = self._of_labels(monitor.effect())
        self.latest = {f"nll/{side}": value for side, value in effect.risks.items()}
        self.latest |= {side: effect.total(side) for side in effect.sides}
        self.latest |= {f"cosine/{side}": effect.cosine(side) for side in effect.sides if side in effect.norms}
        clip = monitor.effect(max_norm=norm).measured["clip"] if norm and norm > 0 else 1.0  # as Trainer clips
        self.latest |= {"step_norm": effect.measured["step_norm"], "clip": clip}
        if self.surgery is not None:
            step = self._of_labels(monitor.effect(of="step"))
            self.latest |= {f"step/{side}": step.total(side) for side in step.sides}

        self.moved = monitor.update_effect() if self.update else None
        if self.moved is not None:
            self.moved = self._of_labels(self.moved)
            self.latest |= {f"update/{side}": self.moved.total(side) for side in self.moved.sides}

    def _of_labels(self, effect: GEffect) -> GEffect:
        """An effect without the sides that no label was measured on: not measured, rather than 0."""
        nothing = {side: dict.fromkeys(getattr(effect, side), math.nan) for side in self._without}
        parts = effect.norms, effect.risks
        norms, risks = ({name: x for name, x in part.items() if name not in nothing} for part in parts)
        return replace(effect, **nothing, norms=norms, risks=risks)

    def rows(self) -> list[dict[str, Any]]:
        """Of the last step, as records have them."""
        latest = self.latest
        if self.effect is None:
            return [{"quantity": "dropped", "value": 1.0}]
        rows = self.effect.rows()
        rows += [{"quantity": "risk", "side": side, "value": latest[f"nll/{side}"]} for side in self.effect.risks]
        rows += [{"quantity": name, "value": latest[name]} for name in ("step_norm", "clip")]
        for side in SIDES:
            if f"step/{side}" in latest:
                rows.append(
                    {"quantity": "step_effect", "side": side, "group": "total", "value": latest[f"step/{side}"]}
                )
        for row in [] if self.moved is None else self.moved.rows():
            if row["quantity"] == "g_effect":
                rows.append({**row, "quantity": "update_effect"})
        return rows


def check_live(objective: Mix, unlearn: bool) -> None:
    """ValueError for an objective whose live effects there are not."""
    if unlearn and objective.forget.needs & OWN_DATA:
        raise ValueError(
            f"{objective.forget} has batches of its own, not those of the forget set, so that there is no unlearn "
            "side: leave geffect_live_unlearn out"
        )
    if objective.gamma == 0.0 or (objective.retain is not None and objective.alpha == 0.0):
        raise ValueError(
            "live effects and surgery need the gradients of both terms, and gamma or alpha is 0: leave a retain "
            "term of 0 out, and without a forget term geffect_live and surgery"
        )


def measured_live(forget: Objective, unlearn: bool, apart: bool = False) -> frozenset[str]:
    """What a live effect of this forget objective measures, as rules of gfast.training.stop call it. apart: its loss
    has weights of its own, or the model's terms, and its gradient is no risk's.
    """
    sides = ("retain", "unlearn") if unlearn or (isinstance(forget, (GA, NLL)) and not apart) else ("retain",)
    return frozenset({f"{side}_{name}" for side in sides for name in ("effect", "cosine", "norm")} | {"objective_norm"})


class RecordLive(TrainerCallback):
    """Writes the live effect of every `every`-th step to the records of the step that it was measured at: as
    `GEffectCallback`, at the weights before the update. Its objective's name ends with " (live)".
    """

    def __init__(self, live: LiveSteps, every: int) -> None:
        self.live, self.every = live, every

    @property
    def measures(self) -> frozenset[str]:
        """What it measures, as rules of gfast.training.stop call it."""
        trainer = self.live.trainer
        apart = trainer._own_loss_terms or trainer.token_weights is not None
        return measured_live(trainer.objective.forget, self.live.unlearn, apart) if self.every else frozenset()

    def names(self) -> set[str]:
        """Objectives in whose name values are recorded."""
        return {self.live.label}

    def step_of(self, state: Any) -> int:
        """The step that a measurement at the end of this step is recorded at: that of the weights before it."""
        return state.global_step - 1

    def measures_at(self, state: Any) -> bool:
        """Whether there is a measurement at the end of this step."""
        return bool(self.every) and self.step_of(state) % self.every == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = self.step_of(state)
        if not self.measures_at(state) or not state.is_world_process_zero:
            return
        common = {"run": run_name(args.output_dir), "objective": self.live.label, "step": step, "epoch": state.epoch}
        write_record(args.output_dir, [{**common, **row} for row in self.live.rows()])


def loss_and_risk(
    model: Any, batch: Mapping[str, Any], objective: Objective, count: int, *, normalizer: Any, reference: str
) -> tuple[LossOutput, Tensor]:
    """`gfast.model_loss` of an objective with token weights, and the NLL over `count`, from one forward."""

    def both(module: Any) -> tuple[LossOutput, Tensor]:
        given = with_reference(module, batch, objective, reference)
        output = model_output(module, given)
        risk = output_loss(output, {**given, "weight": None}, NLL(), normalizer=count).loss
        return output_loss(output, given, objective, normalizer=normalizer), risk

    return wrappers.inside(model, both)
