"""The stream engine: risk gradients are stored as directions; an objective's gradient is dotted with them and freed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gfast.geffect.backward import Job, Passes, job_label
from gfast.geffect.combine import Measured, finished, jobs_of, planned
from gfast.geffect.data import Term
from gfast.geffect.directions import Dots, accumulate
from gfast.geffect.request import Request
from gfast.geffect.results import GEffect
from gfast.geffect.storage import Store, store_for
from gfast.model_state import measuring
from gfast.objectives import Objective
from gfast.progress import Bar
from gfast.sides import SETS


def stream_effects(request: Request, objectives: Sequence[Objective], norms: bool) -> list[GEffect]:
    """G-effects of several objectives against the same two risk gradients; see `gfast.g_effect`."""
    risk, given = request.risk, request.options.directions
    plans = planned(objectives, risk, norms, request.data.weighted)
    jobs = jobs_of(plans)
    alone = given is None and len(jobs) == 1 and not any(any(plan.multiples) for plan in plans)
    with Bar("g_effect", show=request.options.progress) as bar, measuring(request.model):
        passes = request.passes(bar)
        swapped = _swapped(passes, risk, jobs[0], request.options.dtype) if alone else None
        if swapped is not None:
            gram, measured = swapped
            risks = passes.risks(risk)
        elif given is None and not jobs:
            gram, measured = _gram_of_risks(passes, request), {}
            risks = passes.risks(risk)
        else:
            directions = given or request.collect(passes)
            gram, risks = directions.gram, directions.risks
            measured = _measure_jobs(passes, directions.stores, jobs, norms)
            if given is None:
                directions.close()
    return finished(plans, request, gram, measured, risks)


def _gram_of_risks(passes: Passes, request: Request) -> Tensor:
    """Dot products of the two risk gradients by group [G, 2, 2]; where one batch makes the second whole, it is not
    stored.
    """
    risk, dtype, storage = request.risk, request.options.dtype, request.options.storage
    second = ((1.0, Term(risk, "retain")),)
    if passes.batches(second) > 1 or passes.processes.replicated:
        with request.collect(passes) as directions:
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

    None where that is not possible. The dot product of the two risks stays 0: nothing here needs it. The objective's
    own backward is the first: what comes in parts (see `Passes`) is known when the risks' norms are taken.
    """
    risks = [((1.0, Term(risk, source)),) for source in SETS]
    if passes.batches(job) != 1 or max(map(passes.batches, risks)) > 1 or passes.processes.replicated:
        return None
    objective_work, risks_work = passes.work(job), [passes.work(risk_job) for risk_job in risks]
    stored = store_for("device", dtype, "forget", passes.names, passes.device)
    squares, gathered = Dots([], passes.parameters), Dots([stored], passes.parameters)
    tables: list[Tensor] = []

    def consume(index: int, grad: Tensor, position: int) -> None:
        if position < len(objective_work):
            squares.add(index, stored.add(index, grad, single=True))
        elif not gathered.add(index, grad):
            raise ValueError(
                f"gfast: the gradient of {passes.names[index]!r} came in parts on one batch and whole on another, so "
                f"its norm is unknown: checkpoint activations with use_reentrant=False"
            )

    def done() -> None:
        of_objective = len(tables) < len(objective_work)
        tables.append(passes.table((squares if of_objective else gathered).rows(), 1 if of_objective else 2))
        if len(tables) == len(objective_work):
            stored.finish()

    # in one go: the objective and the risk on the forget set's batch share its forward
    passes.backward([*objective_work, *risks_work[0], *risks_work[1]], consume, done)
    square = passes.by_group(tables.pop(0), job_label(job))[:, 0]
    gram = torch.zeros(passes.num_groups, 2, 2, dtype=torch.float64, device="cpu")
    sums_of_risks = torch.zeros(passes.num_groups, 2, dtype=torch.float64, device="cpu")
    for side, risk_work in enumerate(risks_work):
        if risk_work:
            sums = passes.by_group(tables.pop(0), job_label(risks[side]))  # [G, 2]
            sums_of_risks[:, side], gram[:, side, side] = sums.unbind(1)
    return gram, {job: Measured(sums_of_risks, square)}


def _measure_jobs(passes: Passes, stores: list[Store], jobs: Sequence[Job], norms: bool) -> dict[Job, Measured]:
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
            shares = torch.tensor(passes.shares(job[0][1]), dtype=torch.float64, device="cpu")
        measured[job] = Measured(total[:, :2], total[:, 2] if whole else None, parts, shares)
    return measured


def _stream(passes: Passes, stores: list[Store], jobs: Sequence[Job]) -> list[tuple[Tensor, bool]]:
    """Of each job: dots with the stored gradients by batch and group [batches, G, stores + 1], nothing kept; are the
    squared norms those of the whole gradient?

    What the jobs want of one batch follows each other, and shares its forward.
    """
    work = [(number, item) for number, job in enumerate(jobs) for item in passes.work(job)]
    if not passes.processes.sharded:  # whose processes run the same work at a time
        work.sort(key=lambda entry: (entry[1].term.source, entry[1].index, not entry[1].needs_forward_alone))  # stable
    gathered = Dots(stores, passes.parameters, adds=True)
    tables: list[list[Tensor]] = [[] for _ in jobs]
    left = iter([number for number, _ in work])
    once = [passes.batches(job) <= 1 for job in jobs]

    def consume(index: int, grad: Tensor, position: int) -> None:
        if not gathered.add(index, grad):  # re-entrant checkpointing of a shared parameter fires twice
            once[work[position][0]] = False

    def done() -> None:
        tables[next(left)].append(passes.table(gathered.rows(), len(stores) + 1))

    passes.backward([item for _, item in work], consume, done)
    nothing = torch.zeros(1, len(passes.parameters), len(stores) + 1, dtype=torch.float64, device=passes.device)
    stacked = [torch.stack(table) if table else nothing for table in tables]
    stacked = [passes.of_all(job, table) for job, table in zip(jobs, stacked, strict=True)]
    return [
        (passes.by_group(table, job_label(job)), whole) for table, job, whole in zip(stacked, jobs, once, strict=True)
    ]
