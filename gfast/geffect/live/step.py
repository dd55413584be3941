"""What a GEffectMonitor has measured in a step, and the G-effect that follows from it."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from gfast.geffect.groups import GroupMap
from gfast.geffect.live.merging import COLUMNS, MM, RD, RM, RR, UD, UR, UU, Gradients, Rows, merged_squares
from gfast.geffect.live.processes import Processes
from gfast.geffect.live.surgery import Surgery
from gfast.geffect.results import GEffect
from gfast.objectives import Objective

# Columns of the finished table beside those of a row: of the forget risk's gradient.
UNLEARN_UR, UNLEARN_RR, UNLEARN_RD = COLUMNS, COLUMNS + 1, COLUMNS + 2
# Under DDP the retain gradient's norm follows from the merged one's; below this share of it, it is lost to rounding.
LOST = 1e-3


class Monitored(Protocol):
    """What a step asks of its monitor."""

    groups: GroupMap
    group_of: Tensor  # of each parameter, int64 [P]
    objective: Objective | str
    risk: Objective
    identity: float | None  # c where the forget gradient is c times the forget risk's
    unlearn: bool
    accumulate: str
    held: bool
    surgery: Surgery | None
    scaler: Any
    processes: Processes
    gradients: Gradients


class LiveStep:
    """Filled by the monitor; `finish` sums it up, `result` is the effect."""

    def __init__(self) -> None:
        self.forgets = self.retains = 0
        self.weights: list[tuple[int, bool]] = []  # versions of the parameters at its beginning
        self.gradients: list[Any] = []  # by what those that its last call left are known again
        self.local = self.local_retain = False  # gradients are those of this process alone, under DDP.no_sync()
        self.derived = False  # the retain norm is, from the merged gradient's
        self.rows: Rows = {}
        self.unlearn_rows: Rows = {}
        self.values: dict[str, Any] = {}
        self.forget_factor = self.retain_factor = 1.0
        self.retain_loss = False  # there is one
        self.own_risk = False  # the retain side was measured by a backward of the risk
        self.merged = False  # the measured gradients are the merged ones
        self.bad: str | None = None  # a parameter whose gradient is not finite
        self.updated = False  # the optimizer's last update was dotted too
        self.torn: str | None = None  # one whose gradient came in parts

    def add(self, name: str, loss: Tensor) -> None:
        self.values[name] = loss.detach() + self.values[name] if name in self.values else loss.detach()

    def finish(self, monitor: Monitored) -> None:
        """One table of all dots, summed over processes; one wait for the device."""
        gradients, processes, surgery = monitor.gradients, monitor.processes, monitor.surgery
        parameters, ddp = gradients.parameters, processes.replicated is not None
        device = parameters[0].device
        zero = torch.zeros(COLUMNS, dtype=torch.float64, device=device)
        rows = torch.stack([self.rows.get(i, zero).to(device) for i in range(len(parameters))])
        unlearn = torch.stack([self.unlearn_rows.get(i, zero).to(device) for i in range(len(parameters))])
        table = torch.cat([rows, unlearn[:, [UR, RR, RD]]], 1)  # [P, COLUMNS + 3]
        whole = self.merged and (self.retains == 1 or monitor.held)  # what was measured is what the optimizer gets
        alone = ddp and (self.own_risk or not gradients.late)  # the new gradients were those of this process
        from_dots = surgery is None and not alone and (whole or not self.retain_loss)
        adds = float(self.retain_loss)
        if surgery is None:
            table[:, RM] = table[:, UR] + adds * table[:, RR]
        if from_dots:
            table[:, MM] = table[:, UU] + adds * (2 * table[:, UR] + table[:, RR])
        elif surgery is None or not whole:
            table[:, MM] = merged_squares(parameters)
        table = processes.sums(table)
        self.derived = alone and self.merged
        if ddp:
            if processes.differ(table[:, UU]):
                raise ValueError(
                    "gfast: the forget gradients differ between the processes, so that DDP has not reduced them: give "
                    "GEffectMonitor the DDP model, and compute losses by calling it"
                )
            if alone:
                table[:, UR] = processes.mean(table[:, UR].contiguous())
            of_one = [RD, UNLEARN_UR, UNLEARN_RD]  # gradients of this process alone, or alike in all
            table[:, of_one] = processes.mean(table[:, of_one].contiguous())
        names = list(self.values)
        values = torch.stack([self.values[name].double().reshape(()).to(device) for name in names])
        numbers = processes.mean(values).tolist()
        self.values = dict(zip(names, numbers, strict=True))
        table = table.cpu()
        bad = (~torch.isfinite(table[:, [UR, RR, UU, MM, UNLEARN_UR]])).any(1).nonzero()
        self.bad = gradients.names[int(bad[0])] if len(bad) else None
        self.torn = gradients.names[min(gradients.torn)] if gradients.torn else None
        groups = torch.zeros(len(monitor.groups.names), table.shape[1], dtype=torch.float64, device="cpu")
        self.sums = groups.index_add_(0, monitor.group_of, table)  # [G, COLUMNS + 3]
        self.whole = whole or (not self.retain_loss and not (self.own_risk and surgery is not None))
        self.scale = 1.0 if monitor.scaler is None else float(monitor.scaler.get_scale())
        if self.derived:
            rr = self.sums[:, MM] - self.sums[:, UU] - 2 * self.sums[:, UR]
            lost = rr <= LOST * self.sums[:, MM]
            self.sums[:, RR] = math.nan if not self.whole or self.local_retain else torch.where(lost, math.nan, rr)
            self.sums[:, RM] = self.sums[:, UR] + self.sums[:, RR]
        elif alone:
            self.sums[:, RR] = math.nan
        if ddp:
            self.sums[:, UNLEARN_RR] = math.nan

    def update(self, monitor: Monitored) -> GEffect:
        """<grad R, update> of the optimizer's step before this one."""
        groups, sums = monitor.groups, self.sums
        own_pass = self.own_risk or not self.retain_loss
        retain = sums[:, RD] / ((1.0 if own_pass else self.retain_factor) * self.scale)
        unlearn = torch.full_like(retain, math.nan)
        if monitor.unlearn and monitor.identity is not None:
            unlearn = sums[:, UD] / (monitor.identity * self.forget_factor * self.scale)
        elif monitor.unlearn and self.unlearn_rows:
            unlearn = sums[:, UNLEARN_RD] / self.scale
        sides = groups.named(unlearn), groups.named(retain)
        return GEffect("last update", *sides, norms={}, risk=str(monitor.risk), risks=self.risks(monitor))

    def risks(self, monitor: Monitored) -> dict[str, float]:
        """What is known of R on the batches of the step."""
        own_pass = self.own_risk or not self.retain_loss
        risks = {"retain": self.values["retain"] / (1.0 if own_pass else self.retain_factor)}
        if monitor.identity is not None:
            risks["unlearn"] = self.values["forget"] / (monitor.identity * self.forget_factor)
        elif "unlearn" in self.values:
            risks["unlearn"] = self.values["unlearn"]
        return risks

    def result(self, monitor: Monitored, max_norm: float | None, of: str) -> GEffect:
        """The effect on the scale of the losses themselves."""
        groups, sums, objective = monitor.groups, self.sums, monitor.objective
        f, q = self.forget_factor * self.scale, self.retain_factor * self.scale
        step_norm = math.sqrt(max(float(sums[:, MM].sum()), 0.0)) / self.scale
        clip = 1.0 if max_norm is None else min(1.0, max_norm / (step_norm + 1e-6))
        nothing = torch.full((len(groups.names),), math.nan, dtype=torch.float64, device="cpu")
        if of == "forget":
            retain, norm = sums[:, UR] / (f * q), sums[:, UU].sqrt() / abs(f)
        else:
            retain = sums[:, RM] / (self.scale * q) if self.whole else nothing
            norm = sums[:, MM].clamp(min=0.0).sqrt() / self.scale
        unlearn, how, norms = nothing, {}, {}
        if monitor.unlearn and monitor.identity is not None:
            how["unlearn"] = f"the forget loss's own gradient, that of {objective}"
            norms["unlearn"] = sums[:, UU].sqrt() / abs(f)
            if of == "forget":
                unlearn = monitor.identity * sums[:, UU] / f**2
            elif monitor.surgery is None and self.whole:
                unlearn = (sums[:, UU] + float(self.retain_loss) * sums[:, UR]) / (monitor.identity * f * self.scale)
        elif monitor.unlearn and self.unlearn_rows:
            micro = "" if self.forgets == 1 else f", on the last of {self.forgets} micro-batches"
            how["unlearn"] = "a backward of the risk" + micro
            norms["unlearn"] = sums[:, UNLEARN_RR].sqrt() / self.scale
            unlearn = sums[:, UNLEARN_UR] / (f * self.scale) if of == "forget" else nothing
        own_pass = self.own_risk or not self.retain_loss
        how["retain"] = "a backward of the risk" if own_pass else "the retain loss's own gradient"
        if self.retains > 1:
            which = "all" if monitor.held and not self.own_risk else "the first"
            how["retain"] += f", on {which} of {self.retains} micro-batches"
        norms["retain"] = sums[:, RR].sqrt() / abs(q)
        norms["objective"] = clip * norm
        if monitor.surgery is not None:
            how["surgery"] = str(monitor.surgery)
        label = str(objective) if of == "forget" else f"step of {objective}"
        scaled = groups.named(clip * unlearn), groups.named(clip * retain)
        known = {side: groups.named(values) for side, values in norms.items() if not bool(values.isnan().any())}
        how |= {"step_norm": step_norm, "clip": clip}
        return GEffect(label, *scaled, norms=known, risk=str(monitor.risk), risks=self.risks(monitor), measured=how)
