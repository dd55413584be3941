"""The stream engine: risk gradients are stored as directions, an objective's gradient is dotted with them and dropped.

A pass is a forward and backward over a set. A hook on every parameter takes its gradient as soon as it is accumulated,
so at most one parameter's gradient is alive beside the directions. Shared parameters fire once, with the sum of their
uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gfast.geffect.data import Data, Term, terms, to_device
from gfast.geffect.groups import GroupMap
from gfast.geffect.results import GEffect
from gfast.geffect.state import measuring, refuse_sharded
from gfast.model import model_loss
from gfast.objectives import GA, NLL, Objective
from gfast.ops.grad_dot import grad_dots

_SOURCES = ("forget", "retain")  # order of the two directions everywhere below


@dataclass
class Measured:
    """Per group: dots of a gradient with the two directions [G, 2] (forget, retain), its squared norm [G] if known."""

    dots: Tensor
    square: Tensor | None


def stream_effects(
    model: nn.Module,
    objectives: Sequence[Objective],
    data: Data,
    groups: GroupMap,
    risk: Objective,
    direction_dtype: torch.dtype,
    norms: bool,
    progress: bool,
) -> list[GEffect]:
    """G-effects of several objectives against the same two risk gradients; see `gfast.g_effect`."""
    refuse_sharded(model)
    split = [_split(objective, risk) for objective in objectives]
    passes = list(dict.fromkeys(job for _, rest in split for job, _ in _weights(rest, norms)))
    alone = len(passes) == 1 and not any(any(known) for known, _ in split)
    with _Passes(model, data, groups, direction_dtype, progress, 2 + len(passes)) as run, measuring(model):
        swapped = run.swapped(risk, passes[0]) if alone else None
        if swapped is not None:
            gram, measured = swapped
        else:
            gram = run.directions(risk, keep_last=bool(passes))
            measured = {job: run.objective(job, norms) for job in passes}
        counts = {"unlearn": data.count(Term(risk, "forget")), "retain": data.count(Term(risk, "retain"))}
    results = []
    for objective, (known, rest) in zip(objectives, split, strict=True):
        parts = [(factor, measured[job]) for job, factor in _weights(rest, norms)]
        results.append(_combine(str(objective), str(risk), groups, counts, gram, known, parts))
    return results


def identity_factor(term: Term, risk: Objective) -> float | None:
    """c when the gradient of the term is c times that of the risk on the same set, by construction; else None."""
    if term.source not in _SOURCES or term.objective.default_reduction != risk.default_reduction:
        return None
    if term.objective == risk:
        return 1.0
    return -1.0 if {type(term.objective), type(risk)} == {GA, NLL} else None


Job = tuple[tuple[float, Term], ...]  # a linear combination of terms measured in one pass


class Backward(NamedTuple):
    """One forward and backward: factor * objective of batch number `index` of its source, over the global count."""

    factor: float
    term: Term
    count: int
    index: int
    batch: Mapping[str, Any]


def _split(objective: Objective, risk: Objective) -> tuple[list[float], Job]:
    """The objective's gradient as known[0] G_forget + known[1] G_retain + the rest, which needs passes."""
    known, rest = [0.0, 0.0], []
    for factor, term in terms(objective):
        identity = identity_factor(term, risk)
        if identity is None:
            rest.append((factor, term))
        else:
            known[_SOURCES.index(term.source)] += factor * identity
    return known, tuple(rest)


def _weights(rest: Job, norms: bool) -> list[tuple[Job, float]]:
    """Passes for the rest with the factor of each. Norms of a sum need its terms accumulated into one gradient."""
    if norms and len(rest) > 1:
        return [(rest, 1.0)]
    return [(((1.0, term),), factor) for factor, term in rest]


class _Passes:
    """Forward and backward passes whose gradients go to a consumer, parameter by parameter."""

    def __init__(
        self, model: nn.Module, data: Data, groups: GroupMap, dtype: torch.dtype, progress: bool, passes: int
    ) -> None:
        self.model, self.data, self.dtype = model, data, dtype
        parameters = dict(model.named_parameters())
        self.names = list(groups.index)
        self.parameters = [parameters[name] for name in self.names]
        self.group_of = torch.tensor([groups.index[name] for name in self.names])  # [P]
        self.num_groups = len(groups.names)
        self.device = self.parameters[0].device
        self.stored: list[list[Tensor | None]] = []
        self.progress = _bar(progress, passes)

    def __enter__(self) -> _Passes:
        return self

    def __exit__(self, *error: object) -> None:
        self.stored.clear()
        self.progress.close()

    def directions(self, risk: Objective, keep_last: bool) -> Tensor:
        """Store grad R on both sets and return their dot products by group [G, 2, 2].

        Without `keep_last` the second one is dotted and dropped where one batch makes it whole.
        """
        gram = torch.zeros(self.num_groups, 2, 2, dtype=torch.float64)
        for side, source in enumerate(_SOURCES):
            job, gradient, whole = ((1.0, Term(risk, source)),), None, False
            if side == 1 and not keep_last and self._batches(job) <= 1:
                table, whole = self._stream(job)
            if not whole:
                table, gradient = self._accumulate(job)
            sums = self._by_group(table, _label(job))  # [G, side + 1]
            for other in range(side + 1):
                gram[:, side, other] = gram[:, other, side] = sums[:, other]
            if gradient is not None:
                self._store(gradient)
        return gram

    def swapped(self, risk: Objective, job: Job) -> tuple[Tensor, dict[Job, Measured]] | None:
        """One objective on single batches: its gradient is the only one stored, and both risks are dotted with it.

        None where that is not possible. The dot product of the two risks stays 0: nothing here needs it.
        """
        risks = [((1.0, Term(risk, source)),) for source in _SOURCES]
        if max(map(self._batches, (job, *risks))) > 1:
            return None
        table, gradient = self._accumulate(job)
        square = self._by_group(table, _label(job))[:, 0]
        self._store(gradient)
        gram = torch.zeros(self.num_groups, 2, 2, dtype=torch.float64)
        dots = torch.zeros(self.num_groups, 2, dtype=torch.float64)
        for side, risk_job in enumerate(risks):
            table, whole = self._stream(risk_job)
            if not whole:
                self.stored.clear()
                return None
            dots[:, side], gram[:, side, side] = self._by_group(table, _label(risk_job)).unbind(1)
        return gram, {job: Measured(dots, square)}

    def objective(self, job: Job, norms: bool) -> Measured:
        """Dots of the gradient of a combination of terms with both directions, and its norm where it can be had."""
        if self._batches(job) > 1 and norms:
            table, _ = self._accumulate(job)
            whole = True
        else:
            table, whole = self._stream(job)
        sums = self._by_group(table, _label(job))  # [G, 3]
        return Measured(sums[:, :2], sums[:, 2] if whole else None)

    def _store(self, gradient: list[Tensor | None]) -> None:
        for index, kept in enumerate(gradient):  # one at a time, so that no second copy of all of them exists
            if kept is not None and kept.dtype != torch.float64 and kept.dtype.itemsize > self.dtype.itemsize:
                gradient[index] = kept.to(self.dtype)
        self.stored.append(gradient)

    def _batches(self, job: Job) -> int:
        return sum(len(self.data.counted(term)) for _, term in job)

    def _accumulate(self, job: Job) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The gradient over all batches: its dots with the stored directions and itself, and the gradient."""
        gradient: list[Tensor | None] = [None] * len(self.parameters)
        table: list[Tensor | None] = [None] * len(self.parameters)
        work = self._work(job)
        single = len(work) == 1

        def consume(index: int, grad: Tensor, last: bool) -> None:
            kept = gradient[index]
            if kept is None:  # the first one is taken over, not copied; low precision is widened only to add to it
                gradient[index] = grad if single else grad.to(_sum_dtype(grad))
            elif kept.dtype == _sum_dtype(kept):
                kept.add_(grad)
            else:
                gradient[index] = kept.to(_sum_dtype(kept)).add_(grad)
            if last:  # dotted here because the gradient is still in the cache
                table[index] = self._dots(index, gradient[index])

        self._backward(work, consume)
        for index, kept in enumerate(gradient):
            if kept is not None and table[index] is None:
                table[index] = self._dots(index, kept)
        return table, gradient

    def _stream(self, job: Job) -> tuple[list[Tensor | None], bool]:
        """Dots with the stored directions, nothing kept; are the squared norms those of the whole gradient?"""
        table: list[Tensor | None] = [None] * len(self.parameters)
        work = self._work(job)
        once = True

        def consume(index: int, grad: Tensor, last: bool) -> None:
            nonlocal once
            dots = self._dots(index, grad)
            once &= table[index] is None
            table[index] = dots if table[index] is None else table[index] + dots

        self._backward(work, consume)
        return table, once and len(work) <= 1

    def _work(self, job: Job) -> list[Backward]:
        """Every forward and backward of a job."""
        return [
            Backward(factor, term, self.data.count(term), index, batch)
            for factor, term in job
            for index, batch in self.data.counted(term)
        ]

    def _backward(self, work: list[Backward], consume: Callable[[int, Tensor, bool], None]) -> None:
        """Run all work; the gradient of each parameter goes to `consume(index, gradient, in the last batch?)`."""
        position, losses = 0, []

        def hook(index: int) -> Callable[[Tensor], None]:
            def take(parameter: Tensor) -> None:
                grad, parameter.grad = parameter.grad, None
                grad = grad.to_dense() if grad.layout != torch.strided else grad
                consume(index, grad, position == len(work) - 1)

            return take

        handles = [p.register_post_accumulate_grad_hook(hook(index)) for index, p in enumerate(self.parameters)]
        try:
            for position, item in enumerate(work):  # noqa: B007 - read by the hooks
                batch = to_device(item.batch, self.device)
                loss = model_loss(self.model, batch, item.term.objective, normalizer=item.count).loss
                losses.append(loss.detach())
                if loss.requires_grad:  # a hidden-state objective below every trainable parameter has gradient zero
                    with torch.autocast(self.device.type, enabled=False):
                        (loss if item.factor == 1.0 else item.factor * loss).backward()
                del loss
                self.progress.update()
        finally:
            for handle in handles:
                handle.remove()
        # looked at once a pass: a look at every batch would wait for the device each time
        for item, value in zip(work, torch.stack(losses).tolist() if losses else [], strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"{item.term.objective} is {value} on batch {item.index} of the {item.term.source} data, so there "
                    f"is no gradient: check the model's weights and, in float16, its range"
                )

    def _dots(self, index: int, x: Tensor) -> Tensor:
        """[directions + 1] fp64 on the device: dots with the stored directions, then the squared norm."""
        present = [direction[index] for direction in self.stored]
        row = grad_dots([x], [[y] for y in present if y is not None], [0], 1)[0]
        if all(y is not None for y in present):
            return row
        full = row.new_zeros(len(present) + 1)
        full[[i for i, y in enumerate(present) if y is not None] + [len(present)]] = row
        return full

    def _by_group(self, table: list[Tensor | None], label: str) -> Tensor:
        """Group sums [G, columns] on the CPU, in the parameters' order whatever order the hooks ran in."""
        columns = len(self.stored) + 1
        zero = torch.zeros(columns, dtype=torch.float64, device=self.device)
        rows = torch.stack([zero if row is None else row.to(self.device) for row in table]).cpu()  # [P, columns]
        bad = (~torch.isfinite(rows)).any(-1).nonzero()
        if len(bad):
            raise ValueError(
                f"the gradient of {label} is not finite in {len(bad)} of {len(table)} parameters, first in "
                f"{self.names[int(bad[0])]!r}"
            )
        return torch.zeros(self.num_groups, columns, dtype=torch.float64).index_add_(0, self.group_of, rows)


def _combine(
    label: str,
    risk: str,
    groups: GroupMap,
    counts: dict[str, int],
    gram: Tensor,
    known: list[float],
    parts: list[tuple[float, Measured]],
) -> GEffect:
    """One objective's result from the directions' dot products and its measured parts, by linearity."""
    coefficients = torch.tensor(known, dtype=torch.float64)  # [2]
    dots = gram @ coefficients  # [G, 2]
    square: Tensor | None = torch.einsum("gij,i,j->g", gram, coefficients, coefficients)  # [G]
    for factor, part in parts:
        dots = dots + factor * part.dots
        if square is not None and part.square is not None and len(parts) == 1:
            square = square + factor**2 * part.square + 2 * factor * (part.dots @ coefficients)
        else:
            square = None

    def named(values: Tensor) -> dict[str, float]:
        return dict(zip(groups.names, values.tolist(), strict=True))

    norms = {"unlearn": named(gram[:, 0, 0].sqrt()), "retain": named(gram[:, 1, 1].sqrt())}
    if square is not None:
        norms["objective"] = named(square.clamp(min=0.0).sqrt())
    return GEffect(label, named(dots[:, 0]), named(dots[:, 1]), norms, risk, counts)


def _label(job: Job) -> str:
    return " + ".join(f"{term.objective} on the {term.source} data" for _, term in job)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _NoBar:
    def update(self) -> None: ...

    def close(self) -> None: ...


def _bar(progress: bool, passes: int) -> Any:
    if not progress:
        return _NoBar()
    from tqdm.auto import tqdm

    return tqdm(desc=f"g_effect, {passes} passes", unit="batch")
