# SPDX-License-Identifier: Apache-2.0
"""What came out of a study: numbers by objective over seeds, ablations, cost; as data, Markdown and sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gfast.evaluation.results import retention
from gfast.files import read_json
from gfast.geffect import GEffect
from gfast.objectives.registry import parse_objective
from gfast.report.matched import difference_by_chance, lesson, match
from gfast.report.numbers import number
from gfast.report.runs import Run, averaged, measured_runs
from gfast.report.tables import RETENTION, summarize
from gfast.reproduce.plan import RUNS, Plan
from gfast.reproduce.steps import Steps
from gfast.training.records import read_diverged

Spread = tuple[float, float | None] | None  # mean, and standard deviation over seeds where there are two

# Key, heading, and whether a table without it leaves the column out.
COLUMNS = (
    ("objective", "Objective"),
    ("matched", "Retain NLL at equal forget NLL"),
    *((f"matched_{key}", heading) for key, heading in RETENTION),
    ("ratio", "Retain over unlearn G-effect"),
    ("forget_nll", "Forget NLL, end"),
    ("retain_nll", "Retain NLL, end"),
    ("forget_quality", "Forget quality, log10 p"),
    ("model_utility", "Model utility"),
    ("forget_extraction", "Extraction strength, forget"),
    ("retain_extraction", "Extraction strength, retain"),
)
CALIBRATED_COLUMNS = (
    ("objective", "Objective"),
    ("share", "Share of the unlearned weights"),
    ("calibrated_extraction", "Extraction strength, forget"),
)
NOTE = (
    "Mean ± standard deviation over {seeds} seeds. Retain NLL at equal forget NLL is interpolated along a run where "
    "its forget NLL first reaches {level}, and so is what evaluations along the run say, at that step; a dash: it "
    "never does, or began there. Retain over unlearn G-effect is the quotient of both sums over the steps that have "
    "both. Forget quality compares truth ratios with those of the retain model: 0 is alike."
)
CALIBRATED = (
    "Unlearned weights are mixed with those before unlearning, with the largest share that keeps {keep}; what "
    "is then left to extract of the forget set compares objectives at equal retention; a dash: it was 0 before."
)


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and standard deviation (over n - 1) of what is there; None where a value is missing.

    >>> spread([1.0, 3.0]), spread([2.0]), spread([0.1, 0.1, 0.1])[1], spread([1.0, None])
    ((2.0, 1.4142135623730951), (2.0, None), 0.0, None)
    """
    if not values or any(value is None for value in values):
        return None
    if len(values) == 1:
        return float(values[0]), None
    alike = len(set(values)) == 1  # their mean is rounded, and so would the deviation be
    return float(np.mean(values)), 0.0 if alike else float(np.std(values, ddof=1))


def cell(value: Any) -> str:
    """A spread as the text of a table."""
    if value is None or isinstance(value, str):
        return value or "–"
    mean, deviation = value
    return number(mean) + ("" if deviation is None else f" ± {number(float(f'{deviation:.1e}'))}")


class Results:
    """runs: the mean of each objective's seeds. rows: of the table, by objective and for the models before."""

    def __init__(self, plan: Plan, steps: Steps) -> None:
        self.plan, self.steps, self.recipe = plan, steps, plan.recipe
        places = [step.name for step in steps.steps if step.name.startswith(RUNS)]
        self.diverged = {place: mark for place in places if (mark := read_diverged(plan.out / place)) is not None}
        self.by_seed = {name: self._runs(name) for name in self.recipe.objectives}
        self.summaries = {
            name: list(map(self._summary, runs, self.recipe.seeds)) for name, runs in self.by_seed.items()
        }
        every = [summary for summaries in self.summaries.values() for summary in summaries]
        match(every, self.recipe.match_at)
        self.level = next(
            (summary["matched"]["forget_nll"] for summary in every if summary["matched"]), self.recipe.match_at
        )
        # The mean of those that did not diverge, where there are any.
        converged = {name: [run for run in runs if self._place(run) not in self.diverged]
                for name, runs in self.by_seed.items()}  # fmt: skip
        self.runs = {
            name: averaged(runs, name) if len(runs) > 1 else runs[0] for name, runs in converged.items() if runs
        }
        self.rows = [self._before(name) for name in ("taught", "retain-model") if self._evaluation(name)]
        self.rows += [self._row(name) for name in self.recipe.objectives]

    def _runs(self, name: str) -> list[Run]:
        runs = measured_runs([self.plan.out / f"runs/{name}/seed{seed}" for seed in self.recipe.seeds])
        return [replace(run, name=name, label=name) for run in runs]

    def _place(self, run: Run) -> str:
        return run.folder.relative_to(self.plan.out).as_posix()

    def _summarized(self, run: Run) -> dict[str, Any]:
        """Of a run; of one that diverged nothing is known, whatever it was on its way there."""
        gone = {"course": [], "retention": [], "effect_ratio": None, "forget_nll": None, "retain_nll": None}
        return summarize(run) | (gone if self._place(run) in self.diverged else {})

    def _summary(self, run: Run, seed: int) -> dict[str, Any]:
        """Of a run, with its own evaluations between those of before and after it."""
        summary = self._summarized(run)
        if self._place(run) in self.diverged:
            return summary
        ends = ((0, self._evaluation("taught")), (summary["last_step"], self._evaluation(f"{run.name}/seed{seed}")))
        retained = dict(summary["retention"]) | {step: retention(evaluation) for step, evaluation in ends if evaluation}
        return summary | {"retention": sorted(retained.items())}

    def _evaluation(self, name: str) -> dict[str, Any]:
        return self._of(f"evaluations/{name}", "summary.json")

    def _of(self, step: str, file: str) -> dict[str, Any]:
        """What a step of this study left; {} where it has no such step, whatever an earlier one left in the folder."""
        return read_json(self.plan.out / step / file) if step in self.steps.by_name else {}

    def _of_seeds(self, kind: str, name: str, file: str) -> list[dict[str, Any]]:
        """What was made of the runs of an objective; {} of one that diverged."""
        places = [f"{name}/seed{seed}" for seed in self.recipe.seeds]
        return [{} if f"runs/{place}" in self.diverged else self._of(f"{kind}/{place}", file) for place in places]

    def _asked(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
        """What evaluations say, over seeds."""
        sets = [result.get("sets", {}) for result in results]
        quality = [result.get("forget_quality", {}).get("geometric", {}).get("log10_p") for result in results]
        return {
            "forget_quality": spread(quality),
            "model_utility": spread([result.get("model_utility", {}).get("geometric") for result in results]),
            **{
                f"{side}_extraction": spread([result.get(side, {}).get("extraction_strength") for result in sets])
                for side in ("forget", "retain")
            },
        }

    def _before(self, name: str) -> dict[str, Any]:
        evaluated = self._evaluation(name)
        label = {"taught": "before unlearning", "retain-model": "retain model"}[name]
        ends = {f"{side}_nll": (evaluated["sets"][side]["nll"], None) for side in ("forget", "retain")}
        return {"name": name, "objective": label, **ends, **self._asked([evaluated])}

    def _row(self, name: str) -> dict[str, Any]:
        summaries = self.summaries[name]
        matched = [summary["matched"] or {} for summary in summaries]
        objective = self.by_seed[name][0].objective.replace("()", "")
        calibrated = self._of_seeds("calibrated", name, "calibration.json")
        left = [summary.get("sets", {}).get("forget", {}).get("extraction_strength") for summary in calibrated]
        return {
            "name": name,
            "objective": f"{name}: {objective}",
            "matched": spread([summary.get("retain_nll") for summary in matched]),
            **{f"matched_{key}": spread([summary.get(key) for summary in matched]) for key, _ in RETENTION},
            "ratio": spread([summary["effect_ratio"] for summary in summaries]),
            **{f"{side}_nll": spread([_end(summary, side) for summary in summaries]) for side in ("forget", "retain")},
            **self._asked(self._of_seeds("evaluations", name, "summary.json")),
            "share": spread([summary.get("share") for summary in calibrated]),
            "calibrated_extraction": spread(left),
        }  # fmt: skip

    def note(self) -> str:
        """What the columns mean."""
        note = NOTE.format(seeds=len(self.recipe.seeds), level=number(self.level))
        return note if len(self.recipe.seeds) > 1 else note.partition(". ")[2]

    def calibrated_note(self) -> str:
        """What those of the calibrated mixtures mean."""
        plan = self.recipe.calibrate
        return CALIBRATED.format(keep=f"{plan.keep:.0%} of {plan.metric.replace('_', ' ')} of retain")

    def sentences(self) -> list[str]:
        """What the numbers say: whether the model knew, who keeps most at equal forgetting, and whether that is more
        than chance.
        """
        sentences = []
        taught = self._evaluation("taught").get("sets", {})
        if {"forget", "retain"} <= taught.keys():
            nlls = {side: taught[side]["nll"] for side in ("forget", "retain")}
            badly = sum(nll >= 0.5 for nll in nlls.values())
            knew = "both of them" if badly == 2 else "one of them"
            knew = f"{knew} badly, so there is little to forget or to damage: teach longer" if badly else "both"
            sentences.append(
                f"Before unlearning the model had an NLL of {number(nlls['forget'])} per answer token on the forget "
                f"set and of {number(nlls['retain'])} on the retain set: it knew {knew}."
            )
        if self.diverged:
            each = [f"{place} at step {mark['step']} ({mark['why']})" for place, mark in self.diverged.items()]
            sentences.append(f"Diverged, and a dash where it counts: {'; '.join(each)}.")
        matched = {row["name"]: row["matched"] for row in self.rows if row.get("matched")}
        if len(matched) > 1:
            best, worst = min(matched, key=lambda n: matched[n][0]), max(matched, key=lambda n: matched[n][0])
            sentences.append(
                f"At a forget NLL of {number(self.level)}, {best} has the lowest retain NLL ({cell(matched[best])}) "
                f"and {worst} the highest ({cell(matched[worst])})."
                if best != worst
                else f"At a forget NLL of {number(self.level)} all have one retain NLL ({cell(matched[best])})."
            )
            sentences[-1] += _by_chance(matched[best], matched[worst])
        for key, heading in RETENTION:
            retained = {row["name"]: row[f"matched_{key}"] for row in self.rows if row.get(f"matched_{key}")}
            if len(retained) > 1:
                most, least = max(retained, key=lambda n: retained[n][0]), min(retained, key=lambda n: retained[n][0])
                what = heading[0].lower() + heading[1:].partition(" at ")[0]
                sentences.append(
                    f"There the {what} is highest with {most} ({cell(retained[most])}) and lowest with {least} "
                    f"({cell(retained[least])})." + _by_chance(retained[most], retained[least])
                    if retained[most][0] != retained[least][0]
                    else f"There the {what} is that of all alike ({cell(retained[most])})."
                )
        ends = [
            {"label": row["name"], "course": [[0, row["forget_nll"][0], row["retain_nll"][0]]],  # its seeds' ends
             "matched": dict(zip(("retain_nll", "deviation"), row["matched"], strict=True))}
            for row in self.rows if row.get("matched")
        ]  # fmt: skip
        sentences += filter(None, [lesson(ends)])
        extracted = {row["name"]: row["calibrated_extraction"] for row in self.rows if row.get("calibrated_extraction")}
        if len(extracted) > 1:
            best, most = (pick(extracted, key=lambda n: extracted[n][0]) for pick in (min, max))
            alike, before = extracted[best][0] == extracted[most][0], cell(self.rows[0]["forget_extraction"])
            who = (
                f"all leave as much to extract of the forget set ({cell(extracted[best])}"
                if alike
                else f"{best} leaves least to extract of the forget set ({cell(extracted[best])}, {most} most, "
                f"{cell(extracted[most])}"
            )
            sentences.append(
                f"At equal retention, {who}; before unlearning {before}).{_by_chance(extracted[best], extracted[most])}"
            )
        if len(self.recipe.seeds) == 1 and max(len(matched), len(extracted)) > 1:
            sentences.append(
                "Each objective has one seed: how much of such differences is chance, only several seeds can say "
                "(seeds=[0,1,2])."
            )
        return sentences

    def grid(self) -> dict[str, Any] | None:
        """Parameters by one measurement of token effects, beside real runs, and how the two rank them."""
        grid, out = self.recipe.grid, self.plan.out
        if grid is None:
            return None
        if f"runs/{grid.run}/seed{self.recipe.seeds[0]}" in self.diverged:
            return None  # the run whose model was to be measured
        effects = read_json(out / "grid" / "effects" / "geffect.json")["effects"]
        predicted = {each.objective: each for each in map(GEffect.from_dict, effects)}
        runs = {text: measured_runs([out / folder])[0] for text, folder in self.plan.grid_runs().items()}
        summaries = {text: self._summarized(run) for text, run in runs.items()}
        match(list(summaries.values()), self.recipe.match_at)
        rows = []
        for text, summary in summaries.items():
            effect, matched = predicted[str(parse_objective(text))], summary["matched"]
            unlearn, retain = effect.total("unlearn"), effect.total("retain")
            rows.append({
                "setting": text, "unlearn": unlearn, "retain": retain,
                "predicted": retain / unlearn if unlearn else None,
                "measured": summary["effect_ratio"],
                "matched": matched["retain_nll"] if matched else None,
                "forget_nll": _end(summary, "forget"),
            })  # fmt: skip
        level = next((each["matched"]["forget_nll"] for each in summaries.values() if each["matched"]), None)
        return {
            "rows": rows,
            "level": level,
            "rank": rank_correlation(rows),
            "ranked": len(ranked(rows)),
            "run": grid.run,
            "step": grid.step,
        }

    def sizes(self) -> list[dict[str, Any]]:
        """Forget sets of other sizes, with the recipe's own, compared by objective."""
        rows, recipe = [], self.recipe
        first = recipe.seeds[0]
        for name in recipe.sizes.objectives if recipe.sizes else ():
            places = {recipe.data.name: f"runs/{name}/seed{first}"}
            places |= {data.name: f"sizes/{data.name}/{name}" for data in map(recipe.with_size, recipe.sizes.data)}
            summaries = [self._summarized(measured_runs([self.plan.out / place])[0]) for place in places.values()]
            summaries = [summary | {"measured_on": None} for summary in summaries]  # other rows are what is asked about
            match(summaries, recipe.match_at)
            for data, summary in zip(places, summaries, strict=True):
                rows.append({
                    "objective": name, "data": data, "rows": self.plan.sizes[data][0],
                    "matched": (summary["matched"] or {}).get("retain_nll"),
                    "level": (summary["matched"] or {}).get("forget_nll"),
                    "ratio": summary["effect_ratio"],
                    "forget_nll": _end(summary, "forget"), "retain_nll": _end(summary, "retain"),
                })  # fmt: skip
        return sorted(rows, key=lambda row: (row["objective"], row["rows"]))

    def cost(self) -> list[dict[str, Any]]:
        """Seconds by kind of step, and of trainings what measuring took of them."""
        by_kind: dict[str, list[tuple[float, float | None]]] = {}
        for step in self.steps.steps:
            kind = step.name.partition("/")[0]
            key = step.name.rpartition("/")[0] if kind == "runs" else kind
            result = self.plan.out / step.name / "result.json"
            measuring = read_json(result).get("measuring_seconds") if result.exists() else None
            by_kind.setdefault(key, []).append((self.steps.record(step.name).get("seconds", 0.0), measuring))
        rows = []
        for key, times in by_kind.items():
            seconds, measuring = sum(time for time, _ in times), [time for _, time in times if time is not None]
            rows.append({
                "what": key, "steps": len(times), "seconds": seconds, "each": seconds / len(times),
                "measuring": sum(measuring) / len(measuring) if measuring else None,
            })  # fmt: skip
        return rows


def _by_chance(one: tuple[float, float | None], other: tuple[float, float | None]) -> str:
    """A sentence on the difference of two means over seeds; empty where there is none, or one seed alone."""
    apart, chance = abs(one[0] - other[0]), difference_by_chance([one[1], other[1]])
    if not apart or chance is None:
        return ""
    return (
        f" They are {number(apart)} apart, {'more' if apart > 2 * chance else 'not more'} than twice what seeds make "
        f"of such a difference ({number(chance)})."
    )


def _end(summary: Mapping[str, Any], side: str) -> float | None:
    """The NLL of a set after a run."""
    ends = summary[f"{side}_nll"]
    return ends["after"] if ends else None


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Predicted ratio and retain NLL of the settings that have both."""
    return [(row["predicted"], row["matched"]) for row in rows if None not in (row["predicted"], row["matched"])]


def rank_correlation(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Spearman's, between the predicted ratio and the retain NLL of real runs; None for fewer than three."""
    pairs = ranked(rows)
    if len(pairs) < 3:
        return None
    from scipy.stats import spearmanr

    value = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return value if math.isfinite(value) else None


def shown(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str]] = COLUMNS, empty: bool = False
) -> tuple[list[tuple[str, str]], list[dict[str, str]]]:
    """Columns that have a value, or all of them (`empty`), and the rows as texts."""
    columns = [(key, name) for key, name in columns if empty or any(row.get(key) is not None for row in rows)]
    return columns, [{key: cell(row.get(key)) for key, _ in columns} for row in rows]


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(name for _, name in columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row[key] for key, _ in columns) + " |" for row in rows)]) + "\n"
