# SPDX-License-Identifier: Apache-2.0
"""The numbers of a report: one summary per run, as data, as Markdown, and read aloud in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gfast.evaluation.results import retention
from gfast.report.matched import lesson, matched_sentence, on_other_rows
from gfast.report.numbers import number
from gfast.report.runs import Run
from gfast.sides import SIDES

# A first-order effect under this share of the two gradient norms is called flat: rounding noise, not direction.
FLAT_COSINE = 1e-3

# Verdicts by retain harm per unlearning; the page prints these limits.
HARM = ((0.1, "little", "good"), (0.5, "some", "fair"), (math.inf, "heavy", "bad"))

COLUMNS = (
    ("objective", "Objective"),
    ("forget_nll", "Forget NLL, before → after"),
    ("retain_nll", "Retain NLL, before → after"),
    ("unlearn_peak", "Strongest unlearn G-effect (step)"),
    ("retain_damage", "Worst retain G-effect (step)"),
    ("retain_negative", "Recorded steps with retain < 0"),
    ("damage_ratio", "Retain harm per unlearning"),
    ("effect_ratio", "Retain over unlearn G-effect"),
    ("matched", "Retain NLL at equal forget NLL"),
)
# Of runs that were evaluated along the way; a table without such runs leaves them out.
RETENTION = (
    ("model_utility", "Model utility at equal forget NLL"),
    ("retain_extraction", "Retain extraction strength at equal forget NLL"),
)


def summarize(run: Run) -> dict[str, Any]:
    """The summary of one run, JSON-ready; None stands for what was not recorded.

    `unlearn_peak` and `retain_damage` are the lowest totals with their steps (`retain_damage` is None where the retain
    G-effect was never below zero). `damage_ratio` is the sum of the negative retain totals over the sum of the negative
    unlearn totals, `effect_ratio` the quotient of both sums, over the steps that have both. `nonfinite` counts recorded
    values that are not finite: they are left out. `diverged` says how it is seen that there are only such in the end.
    Live effects have no NLL and no course here: theirs are of batches, those of other runs of whole sets. Nor has an
    objective that was only measured along the training of another (`along`): they are what the other one did.
    """
    unlearn_steps, unlearn, bad_unlearn = _clean(run, "g_effect", "unlearn", "total")
    retain_steps, retain, bad_retain = _clean(run, "g_effect", "retain", "total")
    _, cosine, _ = _clean(run, "cosine", "retain", "total")
    spent, gained = retain[np.isin(retain_steps, unlearn_steps)], unlearn[np.isin(unlearn_steps, retain_steps)]
    harm = np.abs(spent[spent < 0]).sum()
    gain = np.abs(gained[gained < 0]).sum()
    return {
        "run": run.name,
        "label": run.label,
        "objective": run.objective,
        "recorded_steps": len(run.steps),
        "last_step": int(run.steps[-1]) if len(run.steps) else None,
        "once": run.once,
        "diverged": run.diverged,
        "of_answers": bool(run.effect_files("sample")),
        "along": run.along,
        "forget_nll": None if run.of_batches or run.along else _ends(run, "unlearn"),
        "retain_nll": None if run.of_batches or run.along else _ends(run, "retain"),
        "unlearn_peak": _lowest(unlearn_steps, unlearn),
        "unlearn_negative": {"steps": int((unlearn < 0).sum()), "of": len(unlearn)} if len(unlearn) else None,
        "retain_damage": _lowest(retain_steps, retain),
        "retain_negative": {"steps": int((retain < 0).sum()), "of": len(retain)} if len(retain) else None,
        "retain_lowest_cosine": float(cosine.min()) if len(cosine) else None,
        "damage_ratio": float(harm / gain) if gain > 0 else None,
        "unlearn_total": float(unlearn.sum()) if len(unlearn) else None,
        "retain_total": float(retain.sum()) if len(retain) else None,
        "effect_ratio": float(spent.sum() / gained.sum()) if gained.sum() else None,
        "course": [] if run.of_batches or run.along else _course(run),
        "retention": [[step, retention(values)] for step, values in sorted(run.evaluations.items())],
        "measured_on": run.measured_on,
        "evaluated_on": next(({name: values.get("samples") for name, values in evaluation["sets"].items()}
                              for _, evaluation in sorted(run.evaluations.items())), None),
        "peaks_by_group": {
            group: {
                side: _lowest(*_clean(run, "g_effect", side, group)[:2]) for side in SIDES
            }
            for group in run.groups
        },
        "nonfinite": bad_unlearn + bad_retain + sum(_clean(run, "risk", side, "")[2] for side in SIDES),
    }  # fmt: skip


def _clean(run: Run, quantity: str, side: str, group: str) -> tuple[np.ndarray, np.ndarray, int]:
    steps, values = run.series(quantity, side, group)
    keep = np.isfinite(values)
    return steps[keep], values[keep], int((~keep).sum())


def _ends(run: Run, side: str) -> dict[str, float | int] | None:
    steps, values, _ = _clean(run, "risk", side, "")
    if not len(values):
        return None
    return {
        "first_step": int(steps[0]),
        "before": float(values[0]),
        "last_step": int(steps[-1]),
        "after": float(values[-1]),
    }


def _course(run: Run) -> list[list[float]]:
    """[step, forget NLL, retain NLL] of every step that has both."""
    forget, retain = (
        {int(s): float(v) for s, v in zip(*_clean(run, "risk", side, "")[:2], strict=True)} for side in SIDES
    )
    return [[step, forget[step], retain[step]] for step in sorted(forget.keys() & retain.keys())]


def _lowest(steps: np.ndarray, values: np.ndarray) -> dict[str, float | int] | None:
    """The lowest value below zero and the first step that has it; None where nothing is below zero."""
    if not len(values) or values.min() >= 0:
        return None
    i = int(values.argmin())
    return {"value": float(values[i]), "step": int(steps[i])}


def cells(summary: dict[str, Any]) -> dict[str, str]:
    """The summary as the texts of one table row, keyed as in `COLUMNS` and `RETENTION`."""
    row = {"objective": summary["label"]}
    for key in ("forget_nll", "retain_nll"):
        ends = summary[key]
        row[key] = f"{number(ends['before'])} → {number(ends['after'])}" if ends else "–"
        if ends and summary["once"]:
            row[key] = number(ends["before"])
        if ends and ends["last_step"] < summary["last_step"]:  # killed or diverged: it is not that of the end
            row[key] += f" (step {ends['last_step']})"
    for key, count in (("unlearn_peak", "unlearn_negative"), ("retain_damage", "retain_negative")):
        lowest = summary[key]
        none = "never below 0" if summary[count] else "–"
        row[key] = f"{number(lowest['value'])} ({lowest['step']})" if lowest else none
    counted = summary["retain_negative"]
    row["retain_negative"] = f"{counted['steps']} of {counted['of']}" if counted else "–"
    row["damage_ratio"] = number(summary["damage_ratio"])
    row["effect_ratio"] = number(summary["effect_ratio"])
    matched = summary.get("matched")
    row["matched"] = f"{number(matched['retain_nll'])} at {number(matched['forget_nll'])}" if matched else "–"
    for key, _ in RETENTION:
        row[key] = number((matched or {}).get(key))
    return row


def columns_of(summaries: Sequence[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Key and heading of the table's columns."""
    there = {key for summary in summaries for key in summary.get("matched") or {}}
    return *COLUMNS, *(column for column in RETENTION if column[0] in there)


def markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown; pipes, markup and line breaks in names are escaped."""
    columns = columns_of(summaries)
    lines = ["| " + " | ".join(title for _, title in columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for summary in summaries:
        row = cells(summary)
        lines.append("| " + " | ".join(_escape(row[key]) for key, _ in columns) + " |")
    note = (
        "Retain harm per unlearning is the sum of the negative retain G-effects divided by the sum of the negative "
        "unlearn G-effects over the steps that have both: 0 is no harm, 1 is as much harm as unlearning. Retain over "
        "unlearn G-effect is the quotient of both sums. Retain NLL at equal forget NLL is interpolated along each run "
        "where its forget NLL first reaches what all runs reach: end points compare who went further, not who is "
        "better."
    )
    if len(columns) > len(COLUMNS):
        note += " What evaluations along the run say is interpolated to the same step."
    return "\n".join(lines) + f"\n\n{note}\n"


def _escape(text: str) -> str:
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + c if c in "\\|`*_[]" else c for c in text)


def reading(summary: dict[str, Any]) -> dict[str, str]:
    """An honest reading of one run, from its numbers alone: `verdict` (a few words), `tone` and `text` (sentences)."""
    unlearn, retain = summary["unlearn_negative"], summary["retain_negative"]
    left_out = (
        f"{summary['nonfinite']} recorded values were not finite and are left out." if summary["nonfinite"] else ""
    )
    if summary["diverged"]:
        said = [f"{summary['diverged'][0].upper()}{summary['diverged'][1:]}."]
        if not summary["once"]:
            said += [_unlearn_sentence(summary) if unlearn else "", _retain_sentence(summary) if retain else ""]
            said += [_nll_sentence(summary), left_out]
        verdict = "not finite" if summary["once"] else "diverged"
        return {"verdict": verdict, "tone": "bad", "text": " ".join(filter(None, said))}
    if not unlearn or not retain:
        if summary["of_answers"]:
            said = (
                "Measured answer by answer, which takes no objective: the figure of answers shows both effects of each."
            )
            return {"verdict": "effects of answers", "tone": "plain", "text": said}
        if not unlearn and not retain:
            return {"verdict": "no G-effect recorded", "tone": "plain", "text": "No total G-effect of it was recorded."}
        side, missing = ("retain", "unlearn") if retain else ("unlearn", "retain")
        said = _retain_sentence(summary) if retain else _unlearn_sentence(summary)
        return {
            "verdict": f"{side} side alone",
            "tone": "plain",
            "text": f"{said} No {missing} G-effect was recorded, so nothing is said of the two together.",
        }
    forget, retain_nll = summary["forget_nll"], summary["retain_nll"]
    if summary["once"]:
        parts = [_once_sentence(summary)]
        if forget and retain_nll:
            parts.append(
                f"NLL is {number(forget['before'])} on the forget set and {number(retain_nll['before'])} on the retain "
                "set."
            )
    else:
        parts = [_unlearn_sentence(summary), _retain_sentence(summary)]
    if summary["along"]:
        parts.insert(0, f"Measured along a training by {summary['along']}, which is what became of the NLL.")
    verdict, tone = _verdict(summary)
    parts += ["" if summary["once"] else _nll_sentence(summary), left_out]
    return {"verdict": verdict, "tone": tone, "text": " ".join(filter(None, parts))}


def _nll_sentence(summary: dict[str, Any]) -> str:
    """How both NLL went, between the first and the last step that have both; empty where there are not two."""
    course = summary["course"]
    if len(course) < 2:
        return ""
    (_, *before), (step, *after) = course[0], course[-1]
    gained, lost = (end - start for start, end in zip(before, after, strict=True))
    until = f", by step {step}" if step < summary["last_step"] else ""
    sentence = (
        f"NLL went from {number(before[0])} to {number(after[0])} on the forget set and from {number(before[1])} to "
        f"{number(after[1])} on the retain set{until}"
    )
    if gained > 0 and lost > 0:
        sentence += f": {number(lost / gained)} nats lost on retain for each nat forgotten"
    return sentence + "."


def comparison(summaries: Sequence[dict[str, Any]]) -> str:
    """What the page says of all runs together: at equal forgetting, or why they do not compare; may be empty."""
    said = [matched_sentence(summaries), "" if on_other_rows(summaries) else lesson(summaries)]
    return " ".join(filter(None, said))


def _once_sentence(summary: dict[str, Any]) -> str:
    """What a step would do, of a model that was measured as it stands."""
    raises = {side: summary[f"{side}_total"] < 0 for side in SIDES}
    said = {side: "raises" if raises[side] else "does not raise" for side in SIDES}
    ratio = f", {number(summary['damage_ratio'])} of the unlearning" if all(raises.values()) else ""
    return (
        f"To first order a step on it {said['unlearn']} the forget NLL (unlearn G-effect "
        f"{number(summary['unlearn_total'])}) and {said['retain']} the retain NLL (retain G-effect "
        f"{number(summary['retain_total'])}{ratio})."
    )


def _unlearn_sentence(summary: dict[str, Any]) -> str:
    counted, peak = summary["unlearn_negative"], summary["unlearn_peak"]
    if not peak:
        return (
            f"The unlearn G-effect was never negative ({counted['of']} recorded steps): this objective did not unlearn."
        )
    share = "all" if counted["steps"] == counted["of"] else str(counted["steps"])
    return (
        f"The unlearn G-effect was negative at {share} of {counted['of']} recorded steps, strongest at step "
        f"{peak['step']} ({number(peak['value'])})."
    )


def _retain_sentence(summary: dict[str, Any]) -> str:
    counted, damage = summary["retain_negative"], summary["retain_damage"]
    if not damage:
        return "The retain G-effect stayed non-negative at every recorded step."
    share = "all" if counted["steps"] == counted["of"] else str(counted["steps"])
    sentence = (
        f"The retain G-effect was negative at {share} of {counted['of']} recorded steps; the damage peaked at step "
        f"{damage['step']} ({number(damage['value'])})"
    )
    ratio, cosine = summary["damage_ratio"], summary["retain_lowest_cosine"]
    if ratio is not None:
        sentence += f", and over the run came to {number(ratio)} times the unlearning"
    if cosine is not None and cosine > -FLAT_COSINE:
        sentence += f" (its cosine never went below {number(-FLAT_COSINE)}: flat to first order)"
    return sentence + "."


def _verdict(summary: dict[str, Any]) -> tuple[str, str]:
    """The worse of two ratios decides: retain harm per unlearning, to first order (G-effect) and in NLL."""
    once, course = summary["once"] or summary["along"], summary["course"]
    forget = None if once else summary["forget_nll"]
    if not summary["unlearn_peak"] or (forget and forget["after"] <= forget["before"]):
        return "would not unlearn" if once else "did not unlearn", "bad"
    ratios = [summary["damage_ratio"]]
    if len(course) > 1:
        gained, lost = (end - start for start, end in zip(course[0][1:], course[-1][1:], strict=True))
        ratios.append(lost / gained if gained > 0 else math.inf if lost > 0 else None)
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return "no step with both sides", "plain"
    ratio = max(known)
    for limit, words, tone in HARM:
        if ratio < limit or limit == math.inf:
            return f"{'would unlearn' if once else 'unlearned'}, {words} retain harm", tone
    raise AssertionError("the last limit of HARM is infinite")
