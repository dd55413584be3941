"""The stream engine: risk gradients are stored as directions; an objective's gradient is dotted with them and freed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gfast.geffect.data import SIDE_SOURCES, Term, identity_factor, terms
from gfast.geffect.directions import accumulate, collect, dots, risk_counts
from gfast.geffect.groups import GroupMap
from gfast.geffect.measurement import Measurement
from gfast.geffect.passes import Job, Passes, Progress, job_label
from gfast.geffect.results import SIDES, GEffect, standard_error
from gfast.geffect.state import measuring
from gfast.geffect.storage import Store, store_for
from gfast.objectives import Objective


@dataclass
class Measured:
    """Dots of a gradient with the two directions [G, 2] (forget, retain), its squared norm [G] if it is known, and the
    batches' parts of the dots [batches, G, 2] with their shares of the count [batches] if there are several.
    """

    dots: Tensor
    square: Tensor | None
    parts: Tensor | None = None
    shares: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """How an objective is measured: known[0] G_forget + known[1] G_retain + the jobs, each times its factor."""

    objective: Objective
    known: tuple[float, float]
    jobs: tuple[tuple[float, Job], ...]


def plans(objectives: Sequence[Objective], risk: Objective | None, norms: bool) -> list[Plan]:
    """What follows from the directions by construction, and what needs passes: all of it where there are none (risk
    None).
    """
    return [_plan(objective, risk, norms) for objective in objectives]


def jobs_of(some: Sequence[Plan]) -> list[Job]:
    """The distinct jobs of the plans, in order."""
    return list(dict.fromkeys(job for plan in some for _, job in plan.jobs))


def stream_effects(measurement: Measurement, objectives: Sequence[Objective], norms: bool) -> list[GEffect]:
    """G-effects of several objectives against the same two risk gradients; see `gfast.g_effect`."""
    model, risk, given = measurement.model, measurement.risk, measurement.given
    wanted = plans(objectives, risk, norms)
    jobs = jobs_of(wanted)
    alone = given is None and len(jobs) == 1 and not any(any(plan.known) for plan in wanted)
    with Progress(measurement.progress, "g_effect") as bar, measuring(model):
        passes = Passes(model, measurement.data, measurement.groups, bar, measurement.loss_scale)
        swapped = _swapped(passes, risk, jobs[0], measurement.dtype) if alone else None
        if swapped is not None:
            gram, measured = swapped
            risks = passes.risks(risk)
        elif given is None and not jobs:
            gram, measured = _gram_of_risks(passes, measurement), {}
            risks = passes.risks(risk)
        else:
            directions = given or collect(passes, risk, measurement.groups, measurement.dtype, measurement.storage)
            gram, risks = directions.gram, directions.risks
            measured = _measure(passes, directions.stores, jobs, norms)
            if given is None:
                directions.close()
    return finished(wanted, measurement, gram, measured, risks)


def finished(
    wanted: Sequence[Plan],
    measurement: Measurement,
    gram: Tensor,
    measured: dict[Job, Measured],
    risks: dict[str, float],
) -> list[GEffect]:
    """Results from the directions' dot products [G, 2, 2] and the measured jobs, by linearity."""
    data, risk, groups = measurement.data, measurement.risk, measurement.groups
    counts = risk_counts(data, risk)
    results = []
    for plan in wanted:
        parts = [(factor, measured[job]) for factor, job in plan.jobs]
        split = terms(plan.objective)
        own = {}
        if len(split) == 1:
            own = {"objective": data.count(split[0][1]), "objective_tokens": data.tokens(split[0][1])}
        effect = _combine(plan, str(risk), groups, counts | own, gram, parts)
        effect.risks = dict(risks)
        results.append(effect)
    return results


def _plan(objective: Objective, risk: Objective | None, norms: bool) -> Plan:
    known, rest = [0.0, 0.0], []
    for factor, term in terms(objective):
        identity = None if risk is None else identity_factor(term, risk)
        if identity is None:
            rest.append((factor, term))
        else:
            known[SIDE_SOURCES.index(term.source)] += factor * identity
    if norms and len(rest) > 1:  # the norm of a sum needs its terms accumulated into one gradient
        return Plan(objective, tuple(known), ((1.0, tuple(rest)),))
    return Plan(objective, tuple(known), tuple((factor, ((1.0, term),)) for factor, term in rest))


def _gram_of_risks(passes: Passes, measurement: Measurement) -> Tensor:
    """Dot products of the two risk gradients by group [G, 2, 2]; where one batch makes the second whole, it is not
    stored.
    """
    risk, dtype, storage = measurement.risk, measurement.dtype, measurement.storage
    second = ((1.0, Term(risk, "retain")),)
    if passes.batches(second) > 1:
        with collect(passes, risk, measurement.groups, dtype, storage) as directions:
            return directions.gram
    first = ((1.0, Term(risk, "forget")),)
    table, stored = accumulate(passes, first, [], store_for(storage, dtype, "forget", passes.names, passes.device))
    gram = torch.zeros(passes.num_groups, 2, 2, dtype=torch.float64, device="cpu")
    gram[:, 0, 0] = passes.by_group(table, job_label(first))[:, 0]
    ((sums, _),) = _stream(passes, [stored], [second])
    sums = sums.sum(0)  # [G, 2]
    gram[:, 0, 1] = gram[:, 1, 0] = sums[:, 0]
    gram[:, 1, 1] = sums[:, 1]
    return gram


def _swapped(
    passes: Passes, risk: Objective, job: Job, dtype: torch.dtype
) -> tuple[Tensor, dict[Job, Measured]] | None:
    """One objective on single batches: its gradient is the only one stored, and both risks are dotted with it.

    None where that is not possible. The dot product of the two risks stays 0: nothing here needs it.
    """
    risks = [((1.0, Term(risk, source)),) for source in SIDE_SOURCES]
    if max(map(passes.batches, (job, *risks))) > 1:
        return None
    own, of_risks = passes.work(job), [passes.work(one) for one in risks]
    stored = store_for("device", dtype, "forget", passes.names, passes.device)
    rows: list[Tensor | None] = [None] * len(passes.parameters)
    tables: list[Tensor] = []
    once = True

    def consume(index: int, grad: Tensor, position: int) -> None:
        nonlocal once
        if position < len(own):
            rows[index] = dots([], index, stored.add(index, grad, single=True))
            return
        row = dots([stored], index, grad)
        once &= rows[index] is None  # re-entrant checkpointing of a shared parameter fires twice
        rows[index] = row

    def done() -> None:
        tables.append(passes.table(rows, 1 if len(tables) < len(own) else 2))
        rows[:] = [None] * len(rows)
        if len(tables) == len(own):
            stored.finish()

    # in one go: the objective and the risk on the forget set's batch share its forward
    passes.backward([*own, *of_risks[0], *of_risks[1]], consume, done)
    if not once:
        return None
    square = torch.zeros(passes.num_groups, dtype=torch.float64, device="cpu")
    if own:
        square = passes.by_group(tables.pop(0), job_label(job))[:, 0]
    gram = torch.zeros(passes.num_groups, 2, 2, dtype=torch.float64, device="cpu")
    found = torch.zeros(passes.num_groups, 2, dtype=torch.float64, device="cpu")
    for side, some in enumerate(of_risks):
        if some:
            sums = passes.by_group(tables.pop(0), job_label(risks[side]))  # [G, 2]
            found[:, side], gram[:, side, side] = sums.unbind(1)
    return gram, {job: Measured(found, square)}


def _measure(passes: Passes, stores: list[Store], jobs: Sequence[Job], norms: bool) -> dict[Job, Measured]:
    """Dots of the gradients of combinations of terms with both directions, and their norms where they can be had."""
    measured = {}
    for job in jobs if norms else ():
        if passes.batches(job) > 1:
            # Accumulated on the device, one after the other: this gradient is needed for its norm alone.
            table, _ = accumulate(passes, job, stores, Store(len(passes.names), torch.float64, passes.device))
            sums = passes.by_group(table, job_label(job))  # [G, 3]
            measured[job] = Measured(sums[:, :2], sums[:, 2])
    rest = [job for job in jobs if job not in measured]
    for job, (sums, whole) in zip(rest, _stream(passes, stores, rest), strict=True):
        total = sums.sum(0)
        parts = shares = None
        if len(job) == 1 and len(sums) > 1:
            parts = sums[:, :, :2]
            shares = torch.tensor(passes.data.shares(job[0][1]), dtype=torch.float64, device="cpu")
        measured[job] = Measured(total[:, :2], total[:, 2] if whole else None, parts, shares)
    return measured


def _stream(passes: Passes, stores: list[Store], jobs: Sequence[Job]) -> list[tuple[Tensor, bool]]:
    """Of each job: dots with the stored gradients by batch and group [batches, G, stores + 1], nothing kept; are the
    squared norms those of the whole gradient?

    What the jobs want of one batch follows each other, and shares its forward.
    """
    work = [(number, item) for number, job in enumerate(jobs) for item in passes.work(job)]
    work.sort(key=lambda one: (one[1].term.source, one[1].index, not one[1].needs_forward_alone))  # stable
    rows: list[Tensor | None] = [None] * len(passes.parameters)
    tables: list[list[Tensor]] = [[] for _ in jobs]
    left = iter([number for number, _ in work])
    once = [passes.batches(job) <= 1 for job in jobs]

    def consume(index: int, grad: Tensor, position: int) -> None:
        row = dots(stores, index, grad)
        if rows[index] is not None:  # re-entrant checkpointing of a shared parameter fires twice
            once[work[position][0]] = False
            row = rows[index] + row
        rows[index] = row

    def done() -> None:
        tables[next(left)].append(passes.table(rows, len(stores) + 1))
        rows[:] = [None] * len(rows)

    passes.backward([item for _, item in work], consume, done)
    nothing = torch.zeros(1, len(passes.parameters), len(stores) + 1, dtype=torch.float64, device="cpu")
    found = [torch.stack(table) if table else nothing for table in tables]
    return [
        (passes.by_group(table, job_label(job)), whole) for table, job, whole in zip(found, jobs, once, strict=True)
    ]


def _combine(
    plan: Plan, risk: str, groups: GroupMap, counts: dict[str, int], gram: Tensor, parts: list[tuple[float, Measured]]
) -> GEffect:
    """One objective's result from the directions' dot products and its measured parts."""
    coefficients = torch.tensor(plan.known, dtype=torch.float64, device="cpu")  # [2]
    total = gram @ coefficients  # [G, 2]
    square: Tensor | None = torch.einsum("gij,i,j->g", gram, coefficients, coefficients)  # [G]
    for factor, part in parts:
        total = total + factor * part.dots
        if square is not None and part.square is not None and len(parts) == 1:
            square = square + factor**2 * part.square + 2 * factor * (part.dots @ coefficients)
        else:
            square = None

    def named(values: Tensor) -> dict[str, float]:
        return dict(zip(groups.names, values.tolist(), strict=True))

    norms = {side: named(gram[:, k, k].sqrt()) for k, side in enumerate(SIDES)}
    if square is not None:
        norms["objective"] = named(square.clamp(min=0.0).sqrt())
    errors = _errors(groups, *parts[0]) if len(parts) == 1 and not any(plan.known) else {}
    return GEffect(str(plan.objective), named(total[:, 0]), named(total[:, 1]), norms, risk, counts, errors)


def _errors(groups: GroupMap, factor: float, part: Measured) -> dict[str, dict[str, float]]:
    """Standard errors over the objective's batches, by side and group; empty where there is one batch."""
    if part.parts is None:
        return {}
    values = factor * torch.cat([part.parts, part.parts.sum(1, keepdim=True)], 1)  # [batches, G + 1, 2]
    found = {
        side: {g: standard_error(values[:, i, k], part.shares) for i, g in enumerate((*groups.names, "total"))}
        for k, side in enumerate(SIDES)
    }
    known = all(not math.isnan(value) for side in found.values() for value in side.values())
    return found if known else {}
