# SPDX-License-Identifier: Apache-2.0
"""The report, from records whose numbers are known."""

import base64
import dataclasses
import html
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.report_runs import GA_COURSE, MIX_COURSE, write_run

from gfast.metrics.log import EvaluationLog, LogSet
from gfast.report import build_report, evaluation, figures
from gfast.report.figures import drawings
from gfast.report.matched import match, matched_sentence
from gfast.report.numbers import number
from gfast.report.runs import load_runs
from gfast.report.style import DARK, LIGHT, linear_threshold, wrap
from gfast.report.tables import COLUMNS, cells, reading, summarize
from gfast.sides import SIDES
from gfast.training.records import write_diverged, write_record


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with two runs and their report."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        write_run(folder / "runs" / "ga", "GA()", GA_COURSE, device="cpu"),
        write_run(folder / "runs" / "mix", "NPO(beta=0.1) + KL()", MIX_COURSE, device="cpu"),
    ]
    assert build_report(runs, folder, title="Two objectives") == folder / "report.html"
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures, which take longer than all that is said."""
    monkeypatch.setattr("gfast.report.html.drawings", lambda runs: [])


class Page(HTMLParser):
    """Checks that tags close in order, and collects what the tests look at."""

    VOID = {"meta", "img", "source", "br", "link", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.urls, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.urls += [(tag, name, value) for name, value in attributes if name in ("src", "srcset", "href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def test_page_is_whole_and_self_contained(built):
    source = (built / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert {"title", "table", "figure", "img", "picture"} <= set(page.tags)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in source and "@import" not in source
    for tag, name, url in page.urls:
        if tag in ("img", "source"):
            assert name in ("src", "srcset") and url.startswith("data:image/svg+xml;base64,")
        else:
            assert tag == "a" and "://" not in url
            assert (built / url).is_file(), url
    records = [url for _, _, url in page.urls if url.endswith(".parquet")]
    assert records[0] == "runs/ga/records/step-00000000.parquet" and len(records) == 6
    text = " ".join("".join(page.text).split())
    assert "Two objectives" in text and "NPO(beta=0.1) + KL" in text and "model.hidden" in text
    assert not [name for name in os.listdir(built) if name.startswith(".")]


def test_figures_are_pictures_of_the_records(built):
    import matplotlib.image

    names = {path.name for path in (built / "figures").iterdir()}
    assert names == {"geffect.png", "geffect-groups.png", "training.png", "nll.png", "pareto.png"}
    pictures = {name: matplotlib.image.imread(built / "figures" / name) for name in names}
    gold = [int(LIGHT.unlearn[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    for name, pixels in pictures.items():
        assert pixels.shape[0] > 400 and pixels.shape[1] > 900, name
        ink = (pixels[..., :3].sum(-1) < 2.9).mean()
        assert 0.01 < ink < 0.6, name
    for name in ("geffect.png", "geffect-groups.png"):
        close = abs(pictures[name][..., :3] - gold).max(-1) < 0.02
        assert close.sum() > 300, name


def test_same_records_give_the_same_files(built):
    files = [built / "report.html", built / "table.json", built / "figures" / "geffect.png"]
    first = [path.read_bytes() for path in files]
    build_report([built / "runs" / "ga", built / "runs" / "mix"], built, title="Two objectives")
    assert [path.read_bytes() for path in files] == first


def test_dark_figures_have_the_colours_of_the_dark_page(built):
    source = (built / "report.html").read_text()
    dark, light = (base64.b64decode(uri).decode() for uri in re.findall(r"svg\+xml;base64,([\w+/=]+)", source)[:2])
    for theme, other, svg in ((DARK, LIGHT, dark), (LIGHT, DARK, light)):
        for name in ("paper", "ink", "unlearn", "retain"):
            assert getattr(theme, name) in svg and getattr(other, name) not in svg, (theme.name, name)


def test_many_layer_groups_become_a_map(tmp_path):
    groups = ("embed", *(f"layer {i}" for i in range(30)), "norm", "lm")
    folder = write_run(tmp_path / "ga", "GA()", GA_COURSE, groups=groups)
    (run,) = load_runs([folder])
    assert run.groups[:3] == ["embed", "norm", "layer 0"] or run.groups[1:3] == ["layer 0", "layer 1"]
    assert run.groups[-1] == "lm" and run.groups.index("layer 9") < run.groups.index("layer 10")
    build_report([folder], tmp_path / "out")
    assert (tmp_path / "out" / "figures" / "geffect-groups.png").stat().st_size > 10_000


def test_steps_are_read_off_one_axis(tmp_path):
    """Only the lowest panels have numbers at it."""
    courses = {"short": {0: GA_COURSE[0], 5: GA_COURSE[5]}, "long": {0: GA_COURSE[0], 400: GA_COURSE[10]}}
    runs = load_runs([write_run(tmp_path / name, f"{name}()", course) for name, course in courses.items()])
    for draw in (figures._draw_groups, figures._draw_totals):
        assert len({ax.get_xlim() for ax in draw(runs, LIGHT).axes}) == 1


def test_more_objectives_than_columns_without_norms(tmp_path):

    folders = [write_run(tmp_path / str(i), f"WGA(alpha={i}.0)", GA_COURSE) for i in range(7)]
    runs = load_runs(folders)
    runs = [dataclasses.replace(run, records=run.records[run.records["quantity"] != "cosine"]) for run in runs]
    figure = drawings(runs)[0].draw(runs, LIGHT)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(figure.axes) == 10 and len(shown) == 7
    assert [ax.get_title() for ax in shown] == [f"WGA(alpha={i}.0)" for i in range(7)]
    assert {ax.get_ylim() for ax in shown} == {shown[0].get_ylim()}
    drawn = [line.get_ydata() for line in shown[6].lines if len(line.get_xdata()) == 3]
    assert [list(y) for y in drawn] == [[-4, -400, -50], [1, -300, -60]]


def test_numbers_of_the_table(built):
    ga, mix = json.loads((built / "table.json").read_text())
    assert ga["objective"] == "GA()" and ga["label"] == "GA"
    assert ga["forget_nll"] == {"first_step": 0, "before": 0.1, "last_step": 10, "after": 9.0}
    assert ga["retain_nll"]["after"] == 7.0
    assert ga["unlearn_peak"] == {"value": -400.0, "step": 5}
    assert ga["retain_damage"] == {"value": -300.0, "step": 5}
    assert ga["retain_negative"] == {"steps": 2, "of": 3}
    assert ga["damage_ratio"] == pytest.approx(360 / 454)
    assert ga["unlearn_total"] == -454.0 and ga["retain_total"] == -359.0
    assert ga["peaks_by_group"]["deep"]["unlearn"] == {"value": -100.0, "step": 5}
    assert mix["retain_damage"] is None and mix["damage_ratio"] == 0.0
    table = (built / "table.md").read_text().splitlines()
    assert table[0].count("|") == table[2].count("|") == table[3].count("|")
    assert table[2].startswith("| GA | 0.1 → 9 | 0.12 → 7 | −400 (5) | −300 (5) | 2 of 3 | 0.793 |")
    assert "never below 0" in table[3]


def test_runs_are_compared_at_equal_forgetting(built, tmp_path, undrawn):
    ga, mix = json.loads((built / "table.json").read_text())
    # GA passes 2.1, the most that the other reaches, a seventieth of the way from step 5 to step 10
    assert ga["matched"] == pytest.approx({"forget_nll": 2.1, "retain_nll": 1 + 6 / 70, "step": 5 + 5 / 70})
    assert mix["matched"] == {"forget_nll": 2.1, "retain_nll": 0.13, "step": 10}
    assert ga["effect_ratio"] == pytest.approx(359 / 454) and mix["effect_ratio"] == pytest.approx(-2.5 / 64)
    lines = (built / "table.md").read_text().splitlines()
    assert lines[2].endswith("| 0.791 | 1.09 at 2.1 |") and lines[3].endswith("| −0.0391 | 0.13 at 2.1 |")
    said = "At a forget NLL of 2.1, which all of them reach, NPO(beta=0.1) + KL has the lowest retain NLL (0.13) and GA"
    page = html.unescape((built / "report.html").read_text())
    assert said in page and "Each is one run: how much of that is chance, only runs of several seeds can say." in page
    # one that never unlearned takes no part; one alone is compared with nobody
    away = write_run(tmp_path / "nll", "NLL()", {0: (1.0, 1.0, 0.5, 0.5), 1: (1.0, 1.0, 0.1, 0.1)})
    build_report([away, built / "runs" / "ga"], tmp_path / "two")
    assert [one["matched"] for one in json.loads((tmp_path / "two" / "table.json").read_text())] == [None, None]


def test_reading_follows_the_numbers(built):
    ga, mix = (reading(summarize(run)) for run in load_runs([built / "runs" / "ga", built / "runs" / "mix"]))
    assert ga["tone"] == "bad" and "heavy retain harm" in ga["verdict"]
    assert "negative at all of 3 recorded steps, strongest at step 5 (−400)" in ga["text"]
    assert "negative at 2 of 3 recorded steps; the damage peaked at step 5 (−300)" in ga["text"]
    assert mix["tone"] == "good" and "stayed non-negative at every recorded step" in mix["text"]


def test_reading_of_a_run_that_did_not_unlearn(tmp_path):
    course = {0: (3.0, 1.0, 0.5, 0.5), 1: (2.0, 1.0, 0.4, 0.4)}
    (run,) = load_runs([write_run(tmp_path / "nll", "NLL()", course)])
    said = reading(summarize(run))
    assert said["tone"] == "bad" and said["verdict"] == "did not unlearn" and "never negative" in said["text"]


def test_nll_rise_is_harm_even_where_the_first_order_effect_is_not(tmp_path):
    course = {0: (-3.0, 0.1, 0.5, 0.5), 1: (-2.0, 0.1, 2.5, 2.4)}
    (run,) = load_runs([write_run(tmp_path / "x", "GA()", course)])
    assert "heavy" in reading(summarize(run))["verdict"]


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path):
    course = dict(GA_COURSE) | {15: (float("-inf"), float("nan"), float("inf"), 8.0)}
    folder = write_run(tmp_path / "ga", "GA()", course)
    build_report([folder], tmp_path / "out")
    (summary,) = json.loads((tmp_path / "out" / "table.json").read_text(), parse_constant=pytest.fail)
    assert summary["unlearn_peak"] == {"value": -400.0, "step": 5} and summary["nonfinite"] == 3
    assert "3 recorded values were not finite" in (tmp_path / "out" / "report.html").read_text()
    assert summary["last_step"] == 15 and cells(summary)["forget_nll"].endswith(" (step 10)")  # not what came of it
    assert cells(summary)["retain_nll"].endswith("→ 8")


@pytest.mark.parametrize("end", ["nan", "retain", "effect", "said", "loss"])
def test_a_run_that_diverged_is_not_judged_by_what_it_was_on_its_way(tmp_path, end):
    last = {"nan": [math.nan] * 4, "retain": (-1.0, 0.1, 30.0, math.inf), "effect": (math.nan, 0.1, 3.0, 0.1)}
    run = write_run(tmp_path / "run", "GA()", {**MIX_COURSE, 20: last.get(end, (-1.0, 0.1, 3.0, 0.13))})
    if end == "said":
        write_diverged(run, 20, "the NLL of the forget set is nan")
    if end == "loss":  # and of no effect: steps whose gradients are not finite are dropped
        last_step = {"run": "run", "step": 20, "epoch": 4.0, "quantity": "loss", "value": math.nan}
        write_record(run, [last_step | {"objective": "GA()"}])
        for step in (0, 5):
            live = {"objective": "GA() (live)", "quantity": "g_effect", "group": "total", "value": -1.0, "step": step}
            write_record(run, [last_step | live | {"side": side} for side in SIDES])
        assert reading(summarize(load_runs([run])[1]))["verdict"] == "diverged"
    seen = {"loss": "loss is nan", "nan": "NLL on the forget set is nan", "retain": "NLL on the retain set is inf",
            "effect": "G-effect on the forget set is nan", "said": "NLL of the forget set is nan"}[end]  # fmt: skip
    said = reading(summarize(load_runs([run])[0]))
    assert (said["verdict"], said["tone"]) == ("diverged", "bad") and f"At step 20 the {seen}." in said["text"]
    # both sets at one step: forget 30 at step 20 is no price of retain 0.13 at step 10
    cut = "on the retain set, by step 10: 0.005 nats lost"
    assert (cut in said["text"]) == (end in ("nan", "retain"))
    others = [
        write_run(tmp_path / name, f"{name}()", GA_COURSE | change)
        for name, change in (("NLL", {}), ("PO", {10: (-1, 1, 8, 7)}))
    ]
    summaries = [summarize(run) for run in load_runs([run, *others]) if not run.of_batches]
    match(summaries)
    assert [bool(one["matched"]) for one in summaries] == [False, True, True]
    assert "which all of those that did not diverge reach, NLL has the lowest" in matched_sentence(summaries)
    nothing = write_run(tmp_path / "nothing", "GA()", dict.fromkeys((0, 1), [math.nan] * 4))
    assert "nll" not in {drawing.name for drawing in drawings(load_runs([nothing]))}
    (once,) = load_runs([write_run(tmp_path / "once", "GA()", {0: (math.nan, 1.0, 0.1, 0.1)})])
    assert reading(summarize(once))["verdict"] == "not finite"


def test_ratios_are_of_steps_that_have_both_sides(tmp_path):
    course = {0: (-4.0, -1.0, 0.1, 0.1), 5: (math.nan, -300.0, 1.0, 0.1), 9: (-4.0, 0.5, 2.0, 0.1)}
    run = write_run(tmp_path / "run", "GA()", course)
    row = {"run": "run", "objective": "GA()", "step": 10, "epoch": 0.0, "group": "total", "quantity": "g_effect"}
    write_record(run, [row | {"side": "retain", "value": -500.0}])  # as a step whose forget batch has no label
    summary = summarize(*load_runs([run]))
    assert summary["damage_ratio"] == 1 / 8 and summary["effect_ratio"] == 0.5 / 8
    assert summary["retain_damage"] == {"value": -500.0, "step": 10}
    # by all of its steps the forget NLL rose, by those of both sets nothing did
    both = [[0, 0.1, 0.1], [5, 0.1, 0.1]]
    assert reading(summary | {"course": both, "damage_ratio": 0.2})["verdict"] == "unlearned, some retain harm"
    worse = [[0, 0.1, 0.1], [5, 0.1, 0.5]]
    assert reading(summary | {"course": worse, "damage_ratio": 0.2})["verdict"] == "unlearned, heavy retain harm"
    apart = tmp_path / "apart"
    for step, side in ((1, "unlearn"), (2, "retain")):
        write_record(apart, [row | {"step": step, "side": side, "value": -1.0}])
    summary = summarize(*load_runs([apart]))
    assert summary["damage_ratio"] is None and reading(summary)["verdict"] == "no step with both sides"


def test_text_from_runs_and_data_is_escaped(tmp_path):
    evil = "<script>alert('x')</script> & $\\frac|1|$"
    folder = write_run(tmp_path / "ga", f"GA() {evil}", GA_COURSE, data=evil, config={evil: evil})
    samples = [{"set": "forget", "question": evil, "answer": evil, "replies": {evil: evil, "empty": ""}}]
    page_file = build_report([folder], tmp_path / "out", title=evil, samples=samples)
    page = Page(page_file.read_text())
    assert "script" not in page.tags
    assert "".join(page.text).count(evil) >= 10
    row = (tmp_path / "out" / "table.md").read_text().splitlines()[2]
    assert "<script" not in row and row.replace("\\|", "").count("|") == len(COLUMNS) + 1


def test_runs_of_one_objective_are_told_apart(tmp_path, undrawn):
    folders = [write_run(tmp_path / name, "GA()", GA_COURSE, lr=name) for name in ("seed0", "seed1")]
    assert [run.label for run in load_runs(folders)] == ["GA · seed0", "GA · seed1"]
    source = build_report(folders, tmp_path / "out").read_text()
    assert "../seed0/records/step-00000000.parquet" in source


def test_partial_runs_still_make_a_page(tmp_path):
    row = {"run": "a", "objective": "GA()", "step": 1, "epoch": 0.1, "quantity": "loss", "value": -1.0}
    write_record(tmp_path / "a", [row])
    source = build_report([tmp_path / "a"], tmp_path / "out").read_text()
    assert "no G-effect recorded" in source
    assert [path.name for path in (tmp_path / "out" / "figures").iterdir()] == ["training.png"]


def test_live_effects_of_one_side_beside_a_whole_run(tmp_path, undrawn):
    run = write_run(tmp_path / "run", "GA()", GA_COURSE)
    for step in (0, 1):
        common = {"run": "run", "objective": "GA() (live)", "step": step, "epoch": 0.0}
        rows = [{"quantity": "g_effect", "side": "retain", "group": "total", "value": -0.25}]
        write_record(run, [common | row for row in [*rows, {"quantity": "risk", "side": "retain", "value": 1.0}]])
    source = build_report([run], tmp_path / "out").read_text()
    assert "1 unlearning run followed" in source and "What is called (live) was measured by" in source
    assert "retain side alone" in source and "no G-effect recorded" not in source
    both = load_runs([run])
    legends = {}
    for drawing in drawings(both):
        for one in drawing.draw(both, LIGHT).legends:
            legends[drawing.name] = [text.get_text() for text in one.get_texts()]
    assert legends["training"] == legends["pareto"] == ["GA"]  # no line, no name
    assert legends["nll"] == ["GA", "GA (live)"]


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="at least one run folder"):
        build_report([], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no records"):
        build_report([tmp_path / "empty"], tmp_path)
    folder = write_run(tmp_path / "ga", "GA()", GA_COURSE)
    with pytest.raises(ValueError, match="given twice"):
        build_report([folder, tmp_path / "x" / ".." / "ga"], tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_helpers():
    assert number(-0.00001234) == "−1.23e−5" and number(None) == "–" and number(12345.6) == "12346"
    assert [number(value) for value in (999.4, 999.6, -999.6)] == ["999", "1000", "−1000"]
    assert linear_threshold(np.array([0.0, 1e-9, 1e4])) == 0.1
    assert wrap("NPO(beta=0.1) + KL") == "NPO(beta=0.1) + KL"
    assert wrap("SatImp(beta1=5.0, beta2=1.0) + 2 KL") == "SatImp(beta1=5.0,\nbeta2=1.0) + 2 KL"


def test_cells_show_a_dash_for_what_was_not_recorded(tmp_path):
    row = {"run": "a", "objective": "GA()", "step": 1, "epoch": 0.1, "quantity": "loss", "value": -1.0}
    write_record(tmp_path / "a", [row])
    (run,) = load_runs([tmp_path / "a"])
    assert set(cells(summarize(run)).values()) == {"GA", "–"}


def test_runs_without_such_effects_have_no_such_figures(built):
    runs = load_runs([built / "runs" / "ga"])
    assert not {"samples", "tokens"} & {drawing.name for drawing in drawings(runs)}


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3], [0.1, 0.7]])
def test_a_distribution_is_drawn_from_0_to_1(values):
    """A single sample's too: one point is no line."""
    losses = {"avg_gt_loss": -np.log(values)}
    log = EvaluationLog("run", {"forget": LogSet("forget", tuple(range(len(values))), losses)})
    (drawing,) = evaluation.drawings(log, None)
    (line,) = drawing.draw([log], LIGHT).axes[0].lines
    x, y = line.get_data()
    assert np.allclose(x, [values[0], *values]) and np.allclose(y, np.linspace(0, 1, len(values) + 1))


@pytest.mark.parametrize("spread", [0.4, 4.0])
def test_truth_ratios_have_numbers_at_their_axis(spread):
    losses = {"avg_gt_loss": [1.0, 1.0], "avg_paraphrased_loss": [1.0, 1.0]}
    losses |= {"average_perturb_loss": [[1.0 - spread], [1.0 + spread]]}
    log = EvaluationLog("run", {"forget": LogSet("forget", (0, 1), {k: np.array(v) for k, v in losses.items()})})
    ax = evaluation.drawings(log, None)[1].draw([log], LIGHT).axes[0]
    low, high = ax.get_xlim()
    assert len([tick for tick in ax.get_xticks() if low <= tick <= high]) >= 3
