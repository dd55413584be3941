"""G-effects by the other engines: each term's gradient is dotted with the directions in the engine's own way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gfast.geffect.data import Term
from gfast.geffect.measurement import Measurement
from gfast.geffect.passes import Job
from gfast.geffect.results import GEffect
from gfast.geffect.stream import Measured, finished, jobs_of, plans
from gfast.objectives import Objective


def engine_effects(engine: str, measurement: Measurement, objectives: Sequence[Objective]) -> list[GEffect]:
    """G-effects by the engine "sample", "token" or "gram"; see `gfast.g_effect`."""
    if engine == "gram":
        return _gram_effects(measurement, objectives)
    wanted = plans(objectives, measurement.risk, norms=False)
    jobs = jobs_of(wanted)
    with measurement.directions() as directions:
        if engine == "sample":
            from gfast.geffect.sample import objective_dots
        else:
            from gfast.geffect.token import objective_dots

        found = objective_dots(measurement, directions, [_term(job) for job in jobs])
        measured = {job: Measured(dots, None) for job, dots in zip(jobs, found, strict=True)}
        return finished(wanted, measurement, directions.gram, measured, directions.risks)


def _gram_effects(measurement: Measurement, objectives: Sequence[Objective]) -> list[GEffect]:
    # Without directions nothing is known from them: GA and NLL are measured like every other term.
    from gfast.geffect import gram

    wanted = plans(objectives, None, norms=False)
    jobs = jobs_of(wanted)
    found = gram.gram_dots(measurement, [_term(job) for job in jobs])
    measured = {job: Measured(dots, None) for job, dots in zip(jobs, found, strict=True)}
    nothing = torch.zeros(len(measurement.groups.names), 2, 2, dtype=torch.float64, device="cpu")
    effects = finished(wanted, measurement, nothing, measured, {})
    for effect in effects:
        effect.norms = {}
    return effects


def _term(job: Job) -> Term:
    ((_, term),) = job  # without norms every job is one term
    return term
