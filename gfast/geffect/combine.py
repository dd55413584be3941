"""An objective is a linear combination of terms, and so is its G-effect: what has to be measured for it, and its result
from what was."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gfast.geffect.backward import Job
from gfast.geffect.data import identity_factor, terms
from gfast.geffect.directions import risk_counts
from gfast.geffect.groups import GroupMap
from gfast.geffect.request import Request
from gfast.geffect.results import GEffect, standard_error
from gfast.objectives import Objective
from gfast.sides import SETS, SIDES


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
    """How an objective is measured: multiples[0] G_forget + multiples[1] G_retain + the jobs, each times its factor."""

    objective: Objective
    multiples: tuple[float, float]
    jobs: tuple[tuple[float, Job], ...]


def planned(
    objectives: Sequence[Objective], risk: Objective | None, norms: bool, weighted: Collection[str] = ()
) -> list[Plan]:
    """What follows from the directions by construction, and what needs passes: all of it where there are none (risk
    None). weighted: as for `terms`.
    """
    return [_plan(objective, risk, norms, weighted) for objective in objectives]


def jobs_of(plans: Sequence[Plan]) -> list[Job]:
    """The distinct jobs of the plans, in order."""
    return list(dict.fromkeys(job for plan in plans for _, job in plan.jobs))


def finished(
    plans: Sequence[Plan], request: Request, gram: Tensor, measured: dict[Job, Measured], risks: dict[str, float]
) -> list[GEffect]:
    """Results from the directions' dot products [G, 2, 2] and the measured jobs, by linearity."""
    data, risk, groups = request.data, request.risk, request.groups
    counts = risk_counts(data, risk)
    results = []
    for plan in plans:
        parts = [(factor, measured[job]) for factor, job in plan.jobs]
        split = terms(plan.objective, data.weighted)
        own = {}
        if len(split) == 1:
            own = {"objective": data.count(split[0][1]), "objective_tokens": data.tokens(split[0][1])}
        effect = _combine(plan, str(risk), groups, counts | own, gram, parts)
        effect.risks = dict(risks)
        results.append(effect)
    return results


def _plan(objective: Objective, risk: Objective | None, norms: bool, weighted: Collection[str]) -> Plan:
    multiples, rest = [0.0, 0.0], []
    for factor, term in terms(objective, weighted):
        identity = None if risk is None else identity_factor(term, risk)
        if identity is None:
            rest.append((factor, term))
        else:
            multiples[SETS.index(term.source)] += factor * identity
    if norms and len(rest) > 1:  # the norm of a sum needs its terms accumulated into one gradient
        return Plan(objective, tuple(multiples), ((1.0, tuple(rest)),))
    return Plan(objective, tuple(multiples), tuple((factor, ((1.0, term),)) for factor, term in rest))


def _combine(
    plan: Plan, risk: str, groups: GroupMap, counts: dict[str, int], gram: Tensor, parts: list[tuple[float, Measured]]
) -> GEffect:
    """One objective's result from the directions' dot products and its measured parts."""
    coefficients = torch.tensor(plan.multiples, dtype=torch.float64, device="cpu")  # [2]
    total = gram @ coefficients  # [G, 2]
    square: Tensor | None = torch.einsum("gij,i,j->g", gram, coefficients, coefficients)  # [G]
    for factor, part in parts:
        total = total + factor * part.dots
        if square is not None and part.square is not None and len(parts) == 1:
            square = square + factor**2 * part.square + 2 * factor * (part.dots @ coefficients)
        else:
            square = None

    norms = {side: groups.named(gram[:, k, k].sqrt()) for k, side in enumerate(SIDES)}
    if square is not None:
        norms["objective"] = groups.named(square.clamp(min=0.0).sqrt())
    errors = _errors(groups, *parts[0]) if len(parts) == 1 and not any(plan.multiples) else {}
    return GEffect(str(plan.objective), *map(groups.named, total.unbind(1)), norms, risk, counts, errors)


def _errors(groups: GroupMap, factor: float, part: Measured) -> dict[str, dict[str, float]]:
    """Standard errors over the objective's batches, by side and group; empty where there is one batch."""
    if part.parts is None:
        return {}
    values = factor * torch.cat([part.parts, part.parts.sum(1, keepdim=True)], 1)  # [batches, G + 1, 2]
    errors = {
        side: {g: standard_error(values[:, i, k], part.shares) for i, g in enumerate((*groups.names, "total"))}
        for k, side in enumerate(SIDES)
    }
    known = all(not math.isnan(value) for side in errors.values() for value in side.values())
    return errors if known else {}
