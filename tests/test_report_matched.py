"""What reports say of runs at equal forgetting: which are compared, and what at which point."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from helpers.report_runs import GA_COURSE, MIX_COURSE, write_run

from gfast.evaluation.results import write_summaries
from gfast.report import build_report, figures
from gfast.report.matched import lesson, match, matched_sentence
from gfast.report.runs import averaged, load_runs
from gfast.report.style import LIGHT
from gfast.report.tables import reading, summarize
from gfast.training.records import read_step, step_file, write_record


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures, which take longer than all that is said."""
    monkeypatch.setattr("gfast.report.html.drawings", lambda runs: [])


def test_what_evaluations_say_at_equal_forgetting(tmp_path, undrawn):
    """Interpolated between the evaluated steps, which need not be those where the NLL was measured."""
    courses = {"a": ("GA()", GA_COURSE), "b": ("NPO(beta=0.1)", MIX_COURSE)}
    runs = [write_run(tmp_path / name, *course) for name, course in courses.items()]
    utility = {0: 0.6, 6: 0.5, 10: 0.1}
    ends = {0: 0.6, 10: 0.1}  # of the other: they alone say nothing of the way
    for run, values in zip(runs, (utility, ends), strict=True):
        write_summaries(run / "evaluations", {
            step: {"model_utility": {"geometric": value}, "sets": {"retain": {"extraction_strength": value / 2}}}
            for step, value in values.items()})  # fmt: skip
    build_report(runs, tmp_path / "page")
    one, other = (row["matched"] for row in json.loads((tmp_path / "page" / "table.json").read_text()))
    assert one["model_utility"] == pytest.approx(np.interp(one["step"], list(utility), list(utility.values())))
    assert one["retain_extraction"] == pytest.approx(one["model_utility"] / 2) and "model_utility" not in other
    table = (tmp_path / "page" / "table.md").read_text()
    fewer = {"sets": {"retain": {"extraction_strength": 0.1, "samples": 5}}}
    write_summaries(runs[1] / "evaluations", {step: fewer for step in utility})  # --evaluate_rows 5: other samples
    build_report(runs, tmp_path / "other")
    for row in json.loads((tmp_path / "other" / "table.json").read_text()):
        assert "retain_extraction" not in row["matched"]
    assert "Model utility at equal forget NLL | Retain extraction strength at equal forget NLL |" in table


@pytest.mark.parametrize(
    "other", [{"data_sha256": {"the forget set (b)": "2"}}, {"config": {"geffect_samples": 8}}], ids=str
)
def test_runs_measured_on_other_rows_are_not_compared(tmp_path, other, undrawn):
    same = {"data_sha256": {"the forget set (a)": "1"}, "config": {"geffect_samples": 0}}
    apart = MIX_COURSE | {0: (-4.0, 2.0, 0.2, 0.12)}
    kinds = {
        "file": ({**same, "data_sha256": {"the forget set (c)": "1"}}, apart),  # another model
        "weights": (same | other, MIX_COURSE),  # of the same texts
        "other": (same | other, apart),
    }
    for name, (info, course) in kinds.items():
        runs = [write_run(tmp_path / name / "a", "GA()", GA_COURSE, **same),
                write_run(tmp_path / name / "b", "NPO(beta=0.1)", course, **info)]  # fmt: skip
        build_report(runs, tmp_path / name / "page")
        matched = [row["matched"] for row in json.loads((tmp_path / name / "page" / "table.json").read_text())]
        assert all(matched) == any(matched) == (name != "other")
        page = (tmp_path / name / "page" / "report.html").read_text()
        assert ("measured on different rows" in page) == (name == "other") == ("has the lowest" not in page)


@pytest.mark.parametrize("known", [True, False])
def test_objectives_that_were_measured_along_one_training_are_one_run(tmp_path, undrawn, known):
    """Its NLL is what the objective did that was trained, where that is known."""
    one, other = write_run(tmp_path / "one", "GA()", GA_COURSE), write_run(tmp_path / "two", "NLL()", MIX_COURSE)
    for step in GA_COURSE:
        rows = read_step(one, step)
        write_record(one, [row | {"objective": "NPO(beta=1.0)"} for row in rows if row["quantity"] != "loss"])
    if not known:
        (one / "run.json").unlink()
        for step in GA_COURSE:
            rows = [row for row in read_step(one, step) if row["quantity"] != "loss"]
            step_file(one, step).unlink()
            write_record(one, rows)
    build_report([one], tmp_path / "page")
    ga, npo = json.loads((tmp_path / "page" / "table.json").read_text())
    assert (ga["matched"], npo["matched"]) == (None, None) and ga["damage_ratio"] == npo["damage_ratio"]
    assert (npo["forget_nll"], npo["along"]) == ((None, "GA()") if known else (ga["forget_nll"], None))
    said = reading(npo)
    if known:
        assert said["verdict"] == "would unlearn, heavy retain harm" and "along a training by GA()" in said["text"]
    summaries = [summarize(run) for run in load_runs([one, other])]
    match(summaries)
    assert "which all of them reach, NLL has the lowest" in matched_sentence(summaries)


def test_what_end_points_hide():
    """The run with the lowest retain NLL at its end had only forgotten less."""
    courses = {
        "a": [[0, 0, 0.1], [1, 2, 1.1], [2, 9, 8]],
        "b": [[0, 0, 0.1], [1, 2, 1.5]],
        "c": [[0, 0, 0.1], [1, 4, 4]],
    }
    there = [{"label": label, "course": course} for label, course in courses.items()]
    match(there)
    said = lesson(there)
    assert "by its end point b looks gentlest (retain NLL 1.5), because it forgot least (2)" in said
    assert "it is number 2 of 3 (1.5, a 1.1)" in said
    match(there, 3.0)  # b never gets there
    assert there[1]["matched"] is None and "2 of them reach, a has the lowest" in matched_sentence(there)
    # over seeds: only where it is more than chance
    for one in there:
        one["matched"] = {"retain_nll": {"a": 1.1, "b": 1.5, "c": 4.0}[one["label"]], "deviation": 0.1}
    assert "number 2 of 3" in lesson(there)
    there[1]["matched"]["deviation"] = 0.2
    assert lesson(there) == ""
    there[1]["matched"] = None
    assert lesson([there[0], {"label": "d", "course": [[0, 0, 0], [1, 3, 1]], "matched": {"retain_nll": 1}}]) == ""


def test_runs_that_began_there_or_are_alike_are_not_compared():
    began = {"label": "began", "course": [[0, 2.0, 0.3], [1, 1.0, 0.2], [2, 9, 8]]}
    there = [began, *({"label": label, "course": [[0, 0, 0.1], [1, 4, 2.1]]} for label in "ab")]
    match(there, 2.0)
    assert [one["matched"] and one["matched"]["retain_nll"] for one in there] == [None, 1.1, 1.1]
    assert matched_sentence(there) == "At a forget NLL of 2 all have one retain NLL (1.1)."
    match(there, 2.5)
    assert there[0]["matched"]["retain_nll"] == pytest.approx(0.2 + 1.5 / 8 * 7.8)
    # one that rose by rounding alone does not draw the level to where all began
    there = [{"label": "still", "course": [[0, 0.1, 0.1], [1, 0.1 + 1e-6, 0.1]]}, *there[1:]]
    match(there)
    assert [one["matched"] and one["matched"]["forget_nll"] for one in there] == [None, 4, 4]


def test_several_seeds_are_one_run_with_a_band(tmp_path):
    """Mean, least and largest over the steps that all seeds have; a value that one seed lacks is none."""
    courses = [
        {0: (-1.0, 0.0, 0.1, 0.1), 5: (-4.0, -2.0, 2.0, 1.0)},
        {0: (-3.0, 0.0, 0.3, 0.1), 5: (-8.0, 2.0, 4.0, 2.0)},
    ]
    courses[1][9] = (-9.0, 0.0, 5.0, 5.0)
    courses[0][5] = (-4.0, float("nan"), 2.0, 1.0)
    runs = load_runs([write_run(tmp_path / f"seed{i}", "GA()", course) for i, course in enumerate(courses)])
    run = averaged(runs, "ga")
    assert [list(one) for one in run.series("risk", "unlearn")] == [[0, 5], [pytest.approx(0.2), 3.0]]
    assert [list(one) for one in run.band("risk", "unlearn")] == [[0, 5], [0.1, 2.0], [0.3, 4.0]]
    assert math.isnan(run.series("g_effect", "retain", "total")[1][1])
    assert [len(one) for one in runs[0].band("risk", "unlearn")] == [0, 0, 0]
    ax = figures._draw_nll([run], LIGHT).axes[0]
    low, high = ax.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == (0.1, 4.0)
