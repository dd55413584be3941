# SPDX-License-Identifier: Apache-2.0
"""Runs compared where they can be: what each keeps at equal forgetting. End points say who went further."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gfast.report.numbers import number

# A rise of less, in nats or as a share of the NLL, is rounding: at that level all runs would be as they began.
NOISE = 1e-3


def match(summaries: Sequence[dict[str, Any]], level: float | None = None) -> None:
    """Give each summary `matched`: retain NLL and step where the run's forget NLL first reaches `level`, interpolated
    linearly between recorded steps; None where it never does, where it began there (what it kept then is of before
    unlearning), or where fewer than two runs unlearned.

    What evaluations along the run say of how much it keeps (`retention`) is there too, at that step, interpolated
    linearly between the evaluated steps, where there are more than two and all runs were asked as many samples.

    Without a level it is the largest forget NLL of the run that forgot least; runs whose forget NLL never rose (by
    more than rounding) take no part, nor do those that diverged, whatever they were on their way. Runs that say that
    they were measured on different rows are not compared.

    >>> runs = [{"course": [[0, 0.0, 0.1], [10, 4.0, 2.1]]}, {"course": [[0, 0.0, 0.1], [10, 2.0, 0.3]]}]
    >>> match(runs)
    >>> runs[0]["matched"]
    {'forget_nll': 2.0, 'retain_nll': 1.1, 'step': 5.0}
    """
    reached = {
        at: max(forget for _, forget, _ in summary["course"])
        for at, summary in enumerate(summaries)
        if _rises(summary) and not summary.get("diverged")
    }
    if level is None and len({_training(summaries[at], at) for at in reached}) > 1:
        level = min(reached.values())
    asked = {str(summary["evaluated_on"]) for summary in summaries if summary.get("evaluated_on")}
    for at, summary in enumerate(summaries):
        reaches = level is not None and at in reached and summary["course"][0][1] < level <= reached[at]
        reaches = reaches and not on_other_rows(summaries)
        summary["matched"] = _at(summary["course"], level) if reaches else None
        if summary["matched"] and len(asked) < 2:
            summary["matched"] |= _kept(summary.get("retention", ()), summary["matched"]["step"])


def on_other_rows(summaries: Sequence[dict[str, Any]]) -> bool:
    """Whether runs say that their NLL are of different rows (another forget or retain set, or another part of it), and
    these differ where the runs begin: the same texts with other weights are the same rows.
    """
    starts = {
        str(summary["measured_on"]): summary["course"][0][1:]
        for summary in summaries
        if summary.get("measured_on") and summary["course"]
    }
    first = next(iter(starts.values()), None)
    return any(not np.allclose(start, first, rtol=NOISE, atol=NOISE) for start in starts.values())


def _training(summary: dict[str, Any], at: int) -> tuple[Any, str]:
    """One for all objectives that were measured along one training."""
    return summary.get("run", at), str(summary["course"])


def _once_each(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first summary of each training."""
    return list({_training(summary, at): summary for at, summary in reversed(list(enumerate(summaries)))}.values())[
        ::-1
    ]


def _rises(summary: dict[str, Any]) -> bool:
    course = summary["course"]
    if len(course) < 2:
        return False
    start = course[0][1]
    return max(forget for _, forget, _ in course) > start + NOISE * max(1.0, abs(start))


def _at(course: Sequence[Sequence[float]], level: float) -> dict[str, float]:
    first = next(at for at, (_, forget, _) in enumerate(course) if forget >= level)
    (step, forget, retain), (next_step, next_forget, next_retain) = course[first - 1], course[first]
    share = (level - forget) / (next_forget - forget)
    return {
        "forget_nll": level,
        "retain_nll": retain + share * (next_retain - retain),
        "step": step + share * (next_step - step),
    }


def _kept(retention: Sequence[tuple[int, dict[str, float]]], step: float) -> dict[str, float]:
    levels = {}
    for name in sorted({name for _, values in retention for name in values}):
        steps, retained = zip(*((at, values[name]) for at, values in retention if name in values), strict=True)
        # Between two alone, such as a run's ends, a line says nothing of the way.
        if len(steps) > 2 and steps[0] <= step <= steps[-1]:
            levels[name] = float(np.interp(step, steps, retained))
    return levels


def matched_sentence(summaries: Sequence[dict[str, Any]]) -> str:
    """One sentence: at equal forgetting, who keeps most and who least, or why that is not known; empty where there are
    not two to compare.
    """
    if on_other_rows(summaries):
        return (
            "These runs were measured on different rows (their settings say which), so that their NLL do not compare."
        )
    summaries = _once_each(summaries)
    nlls = {summary["label"]: summary["matched"]["retain_nll"] for summary in summaries if summary.get("matched")}
    if len(nlls) < 2:
        return ""
    level = next(summary["matched"]["forget_nll"] for summary in summaries if summary.get("matched"))
    runs = {summary.get("run", at) for at, summary in enumerate(summaries) if not summary.get("diverged")}
    them = "those that did not diverge" if any(summary.get("diverged") for summary in summaries) else "them"
    least, most = min(nlls, key=nlls.__getitem__), max(nlls, key=nlls.__getitem__)
    if nlls[least] == nlls[most]:
        return f"At a forget NLL of {number(level)} all have one retain NLL ({number(nlls[least])})."
    return (
        f"At a forget NLL of {number(level)}, which {'all' if len(nlls) == len(runs) else len(nlls)} of {them} "
        f"reach, {least} has the lowest retain NLL ({number(nlls[least])}) and {most} the highest "
        f"({number(nlls[most])}). Each is one run: how much of that is chance, only runs of several seeds can say."
    )


def difference_by_chance(deviations: Sequence[float | None]) -> float | None:
    """What seeds make of the difference of two runs: one standard deviation, from those of both over seeds; None where
    there is one seed.
    """
    return None if None in deviations else math.hypot(*deviations)


def lesson(summaries: Sequence[dict[str, Any]]) -> str:
    """What end points would have said of the run that ends with the lowest retain NLL, in a sentence to repeat; empty
    where they say the same as equal forgetting, there is nothing to compare, or the difference is not more than twice
    what seeds make of it (`deviation` over seeds, where there are several).
    """
    there = [summary for summary in _once_each(summaries) if summary.get("matched")]
    if len(there) < 2:
        return ""
    ends = {summary["label"]: (summary["course"][-1][1], summary["course"][-1][2]) for summary in there}
    nlls = {summary["label"]: summary["matched"]["retain_nll"] for summary in there}
    mild, best = min(ends, key=lambda label: ends[label][1]), min(nlls, key=nlls.__getitem__)
    if mild == best:
        return ""
    chance = difference_by_chance(
        [summary["matched"].get("deviation") for summary in there if summary["label"] in (mild, best)]
    )
    if chance is not None and nlls[mild] - nlls[best] <= 2 * chance:
        return ""
    why = (
        "because it forgot least" if ends[mild][0] == min(end for end, _ in ends.values()) else "at another forget NLL"
    )
    place = 1 + sum(value < nlls[mild] for value in nlls.values())
    return (
        f"Compare at equal forgetting: by its end point {mild} looks gentlest (retain NLL {number(ends[mild][1])}), "
        f"{why} ({number(ends[mild][0])}); where all forgot as much it is number {place} of {len(nlls)} "
        f"({number(nlls[mild])}, {best} {number(nlls[best])})."
    )
