"""The two gradients of a step: one set aside, the other dotted with it and merged as it appears, parameter by
parameter.

Beside the gradients of a plain step there is one parameter's more, or that of the small ones that wait to be dotted in
one call, or of a unit of surgery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from gfast.geffect.directions import GATHERED
from gfast.geffect.live.hooks import added, each_alone
from gfast.geffect.live.processes import Processes, here, reduce_partial
from gfast.geffect.live.surgery import Surgery, average, combined, sign_aligned, units_of
from gfast.geffect.live.updates import Updates
from gfast.ops.grad_dot import dots_of_each

# Columns of a parameter's row: dots of its forget (u), new (r) and merged (m) gradients, and with the last update (d).
UR, RR, UU, RM, MM, RD, UD = range(7)
COLUMNS = 7
Rows = dict[int, Tensor]
_UNREACHED = (
    "gfast: no parameter has a gradient after the backward: the loss is of another model than the monitor's, or the "
    "model is sharded by FSDP2, where every backward must reduce: leave set_requires_gradient_sync(True)"
)
_TAKEN = (
    "gfast: a hook has taken the gradient of {!r} within the backward (an optimizer that steps there, such as LOMO?), "
    "so that the two gradients of a step are never there together: step after the last retain()"
)


class Gradients:
    """The gradients of a model's parameters in a step.

    Attributes:
        aside: parameter's index -> the forget gradient, while it is set aside.
        torn: parameters whose gradient came in parts in this step although nothing before had shown it.
    """

    def __init__(
        self, names: list[str], parameters: list[nn.Parameter], processes: Processes, surgery: Surgery | None,
        group_of: list[int], backward: Callable[..., None], held: bool,
    ) -> None:  # fmt: skip
        self.names, self.parameters, self.processes, self.surgery = names, parameters, processes, surgery
        self.backward = backward
        self.units = units_of(surgery, group_of) if surgery else []
        self.aside: dict[int, Tensor] = {}
        self.torn: set[int] = set()
        self._parts: set[int] = set()  # parameters whose gradient comes in parts: re-entrant checkpointing
        self.averages: dict[int, Tensor] = {}  # of gru, without a GradScaler's scale
        self.scale = 1.0  # a GradScaler's in this step
        self.owed = False  # a backward of this step was one under DDP.no_sync()
        self._newest: dict[int, Tensor] = {}  # what they become if the step is not dropped
        self.updates: Updates | None = None  # where the last update is dotted with the new gradients
        self.updates_forget = False  # and with the forget gradients
        self._limit = GATHERED * max(here(p).nbytes for p in parameters)
        # Gradients or units are complete only at the end: those of all processes, or of all parameters.
        whole = surgery is not None and (surgery.scope == "global" or processes.sharded)
        self.late = whole or processes.zero is not None or (held and processes.replicated is not None)
        self._views = getattr(processes.replicated, "gradient_as_bucket_view", False)  # DDP writes into gradients

    def drop(self) -> None:
        """No gradients, and nothing set aside."""
        self.aside.clear()
        self.torn.clear()
        self.owed = False
        self.forget_averages()
        for parameter in self.parameters:
            parameter.grad = None
        if self.processes.zero is not None:
            self.processes.zero.clear()

    def keep_averages(self) -> None:
        """The step is good: gru's averages are those that it made."""
        self.averages |= self._newest
        self.forget_averages()

    def forget_averages(self) -> None:
        """The step is not: they stay what they were before it."""
        self._newest = {}

    def reduce(self) -> None:
        """Gradients of which a backward has left parts in the processes are their sums."""
        for parameter in self.parameters if self.processes.mesh is not None else ():
            reduce_partial(parameter)

    def none(self) -> bool:
        return all(parameter.grad is None for parameter in self.parameters)

    def marks(self) -> list[tuple[WeakIdRef, int] | None]:
        """What is another one once somebody else has changed a gradient; nothing of views, which DDP renews itself."""
        if self._views:
            return []
        grads = [getattr(p.grad, "_local_tensor", p.grad) for p in self.parameters]
        return [None if g is None else (WeakIdRef(g), g._version) for g in grads]

    def sweep(self, loss: Tensor, take: Callable[[int], Any] | None, retain_graph: bool = False) -> None:
        """A backward with `take` called for every parameter once its gradient is complete; None: all are to stay."""
        stays, take = take is None, take or (lambda index: None)
        if self.processes.zero is not None:  # whose hooks take gradients, and hand their shards on at the end
            self.backward(loss, retain_graph=retain_graph)
            for index in range(len(self.parameters)):
                take(index)
            return
        came: set[int] = set()

        def hook(index: int) -> Callable[[Tensor], None]:
            def run(parameter: Tensor) -> None:
                if index in self._parts:
                    return
                if parameter.grad is None and len(parameter._post_accumulate_grad_hooks) == 1:
                    return  # what is between it and the loss has no gradient to give (rounding)
                if index in came:
                    self.torn.add(index)
                came.add(index)
                if parameter.grad is None:
                    raise ValueError(_TAKEN.format(self.names[index]))
                reduce_partial(parameter)
                take(index)

            return run

        with self.each_alone():
            handles = [p.register_post_accumulate_grad_hook(hook(index)) for index, p in enumerate(self.parameters)]
            try:
                self.backward(loss, retain_graph=retain_graph)
            finally:
                for handle in handles:
                    handle.remove()
        parts = [index for index in sorted(self._parts) if self.parameters[index].grad is not None]
        if not came and not parts:
            raise ValueError(_UNREACHED)
        lost = next((index for index in sorted(came) if stays and self.parameters[index].grad is None), None)
        if lost is not None:  # later than its own hooks: in those of another parameter
            raise ValueError(_TAKEN.format(self.names[lost]))
        for index in parts:
            take(index)

    def each_alone(self) -> AbstractContextManager[None]:
        """Around a backward, whose gradients hooks may sum over processes."""
        return each_alone(self.names, self.parameters)

    def learn_parts(self) -> None:
        """What came in parts in a backward whose gradients nobody has looked at yet is known from now on."""
        self._parts |= self.torn
        self.torn.clear()

    def set_aside(self) -> None:
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                self.aside[index] = parameter.grad.clone() if self._views else parameter.grad
                parameter.grad = None

    def put_back(self) -> None:
        """What was set aside, added to what has come since."""
        for index in list(self.aside):
            parameter, u = self.parameters[index], self.aside.pop(index)
            parameter.grad = u if parameter.grad is None else added(u, parameter.grad)

    def measure(self, loss: Tensor, rows: Rows, retain_graph: bool = False) -> None:
        """A backward whose gradients are dotted with the forget gradients and dropped; those are left as they are."""
        self.set_aside()
        waiting: dict[int, Tensor] = {}

        def flush() -> None:
            for index, row in self._dots(waiting).items():
                rows[index] = rows[index].to(row.device) + row if index in rows else row
            waiting.clear()

        def take(index: int) -> None:
            parameter = self.parameters[index]
            if index in waiting:
                flush()
            waiting[index], parameter.grad = parameter.grad, None
            if sum(here(r).nbytes for r in waiting.values()) > self._limit:
                flush()

        self.sweep(loss, take, retain_graph)
        flush()
        self._rest(rows)
        self.put_back()

    def merge(self, loss: Tensor, rows: Rows, adds: bool = True) -> None:
        """A backward whose gradients are dotted with the forget gradients and added to them, or what surgery makes of
        both. Without `adds` surgery sees the new ones, and does not add them.
        """
        if not self.aside:
            self.set_aside()
        self._pay()
        if self.late:
            self.backward(loss)
            gradients = {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
            if not gradients:
                raise ValueError(_UNREACHED)
            self._take(self._with_zeros(gradients, range(len(self.parameters))), rows, adds)
        else:
            self._merge_on_the_way(loss, rows, adds)
        if self.torn and self.surgery is not None:
            raise ValueError(
                f"gfast: the retain gradient of {self.names[min(self.torn)]!r} came in parts, which surgery cannot "
                f"work on: checkpoint activations with use_reentrant=False"
            )
        self._rest(rows)
        self.put_back()

    def _pay(self) -> None:
        """DDP looks for unused parameters, and wants a gradient of all that backwards without a reduction have reached,
        whatever the next one reaches.
        """
        ddp, owed, self.owed = self.processes.replicated, self.owed, False
        if owed and ddp.find_unused_parameters and not self.processes.silent:
            for index in self.aside:
                if self.parameters[index].grad is None:
                    self.parameters[index].grad = torch.zeros_like(self.parameters[index])

    def _with_zeros(self, gradients: dict[int, Tensor], among: Iterable[int]) -> dict[int, Tensor]:
        """For surgery: a parameter that the retain loss does not reach has a gradient of zeros."""
        zeros = [i for i in among if i not in gradients and (i in self.aside or i in self.averages)]
        return {**gradients, **{i: torch.zeros_like(self.parameters[i]) for i in zeros if self.surgery is not None}}

    def _merge_on_the_way(self, loss: Tensor, rows: Rows, adds: bool) -> None:
        waiting: dict[int, Tensor] = {}
        at_once = self.processes.replicated is not None  # DDP takes what the hook leaves
        left = [self.units.count(unit) for unit in range(max(self.units, default=-1) + 1)]
        size, taken = 0, set()

        def flush(unit: int | None) -> None:
            nonlocal size
            ready = {i: waiting.pop(i) for i in list(waiting) if unit is None or self.units[i] == unit}
            self._take(ready, rows, adds)
            size = 0

        def take(index: int) -> None:
            nonlocal size
            if index in self.torn:  # a second part: the sum is right, its norm is not known
                return
            parameter = self.parameters[index]
            taken.add(index)
            waiting[index], parameter.grad = parameter.grad, None
            if self.units:
                unit = self.units[index]
                left[unit] -= 1
                if not left[unit]:
                    flush(unit)
                return
            size += here(waiting[index]).nbytes
            if at_once or size > self._limit:
                flush(None)

        self.sweep(loss, take)
        for index, parameter in enumerate(self.parameters):  # of micro-batches before this one alone
            if index not in taken and parameter.grad is not None:
                waiting[index], parameter.grad = parameter.grad, None
        waiting |= self._with_zeros({}, [i for i in range(len(self.units)) if i not in taken and i not in waiting])
        for unit in sorted({self.units[i] for i in waiting}) if self.units else [None] * bool(waiting):
            flush(unit)

    def _take(self, gradients: dict[int, Tensor], rows: Rows, adds: bool) -> None:
        """Complete gradients: their rows, and what becomes of them and of those set aside."""
        dots = self._dots(gradients)
        pairs = {i: (r, self.aside.pop(i, None)) for i, r in gradients.items()}
        if self.surgery is None:
            merged = {i: r if u is None else added(u, r) for i, (r, u) in pairs.items()}
        else:
            merged = self._operated(pairs, dots, adds)
            ms, rs = [here(m) for m in merged.values()], [here(r) for r, _ in pairs.values()]
            if ms:
                for index, values in zip(pairs, dots_of_each(ms, [rs]), strict=True):
                    dots[index][RM : MM + 1] = values
        rows.update(dots)
        for index, m in merged.items():
            parameter = self.parameters[index]
            # a second part may have come while the first waited
            late = None if parameter.grad is gradients[index] else parameter.grad
            parameter.grad = m if late is None else added(m, late)

    def _operated(self, pairs: dict[int, tuple[Tensor, Tensor | None]], rows: Rows, adds: bool) -> dict[int, Tensor]:
        """Gradients after surgery, of whole units."""
        pairs = {i: (_dense(r), None if u is None else _dense(u)) for i, (r, u) in pairs.items()}
        if self.surgery.kind == "sago":
            return {
                i: sign_aligned(torch.zeros_like(r) if u is None else u, r, adds) for i, (r, u) in pairs.items()
            }  # fmt: skip
        others = {i: r for i, (r, _) in pairs.items()}
        if self.surgery.kind == "gru":
            moving, scale = self.surgery.moving, self.scale
            others = {i: average(self.averages.get(i), r, moving, scale) for i, r in others.items()}
            self._newest |= others
            rows = _rows(others, {i: u for i, (_, u) in pairs.items()})
        dots = self.processes.sums_of(torch.stack([rows[i] for i in pairs]), list(pairs))
        units = sorted({self.units[i] for i in pairs})
        place = torch.tensor([units.index(self.units[i]) for i in pairs], device=dots.device)
        sums = dots.new_zeros(len(units), dots.shape[1]).index_add_(0, place, dots)
        factors = [factor[place] for factor in self.surgery.factors(sums[:, UR], sums[:, RR], sums[:, UU], adds)]
        return {
            i: combined(u, r, others[i], tuple(factor[n] for factor in factors), adds)
            for n, (i, (r, u)) in enumerate(pairs.items())
        }

    def _dots(self, gradients: dict[int, Tensor]) -> Rows:
        us = {i: self.aside.get(i) for i in gradients}
        rows = _rows(gradients, us)
        if self.updates is not None:
            for index, row in rows.items():
                u = [us[index]] if self.updates_forget and us[index] is not None else []
                row[RD : RD + 1 + len(u)] = self.updates.dots(index, [gradients[index], *u])
        return rows

    def _rest(self, rows: Rows) -> None:
        """Rows of forget gradients that the other backward did not reach."""
        rest = {i: u for i, u in self.aside.items() if i not in rows}
        for index, row in _rows(rest, rest).items():
            row[[UR, RR, RM, MM]] = 0.0
            if self.updates is not None and self.updates_forget:
                row[UD] = self.updates.dots(index, [rest[index]])[0]
            rows[index] = row


def merged_squares(parameters: list[nn.Parameter]) -> Tensor:
    """Squared norms [P] of the gradients that are there."""
    there = [i for i, p in enumerate(parameters) if p.grad is not None]
    squares = dots_of_each([here(parameters[i].grad) for i in there], [])[:, 0]
    out = torch.zeros(len(parameters), dtype=torch.float64, device=squares.device)
    out[there] = squares
    return out


def _rows(rs: dict[int, Tensor], us: dict[int, Tensor | None]) -> Rows:
    """Rows of gradients and of those set aside (None: zero), all in one call."""
    out: Rows = {}
    both = [i for i in rs if us[i] is not None]
    alone = [i for i in rs if us[i] is None]
    if both:
        r, u = [here(rs[i]) for i in both], [here(us[i]) for i in both]
        dots = dots_of_each(r + u, [u + u])  # [2n, 2]: (ru, rr), then (uu, uu)
        n = len(both)
        table = torch.cat([dots[:n], dots[n:, 1:], dots.new_zeros(n, COLUMNS - 3)], 1)
        out |= dict(zip(both, table, strict=True))
    if alone:
        r = [here(rs[i]) for i in alone]
        table = r[0].new_zeros(len(alone), COLUMNS, dtype=torch.float64)
        table[:, RR] = dots_of_each(r, [])[:, 0]
        out |= dict(zip(alone, table, strict=True))
    return out


def _dense(x: Tensor) -> Tensor:
    return x if x.layout == torch.strided else x.to_dense()
