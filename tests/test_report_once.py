"""The report of measurements of one state of a model, as `gfast geffect` makes them: no course and no end to judge."""

import pytest
from helpers.report_runs import GA_COURSE, GROUPS, write_run

from gfast.files import TEMPORARY_PREFIX
from gfast.report import build_report
from gfast.report.figures import drawings
from gfast.report.runs import load_runs
from gfast.report.style import LIGHT
from gfast.report.tables import cells, reading, summarize

ONCE = {0: (-4.0, -3.0, 0.1, 0.12)}


@pytest.mark.parametrize(
    "totals, verdict, text",
    [
        ((-4.0, -3.0), "would unlearn, heavy retain harm", "raises the retain NLL (retain G-effect −3, 0.75 of the"),
        ((-4.0, 3.0), "would unlearn, little retain harm", "does not raise the retain NLL (retain G-effect 3)"),
        ((0.5, -3.0), "would not unlearn", "does not raise the forget NLL (unlearn G-effect 0.5)"),
    ],
)
def test_a_model_as_it_stands_has_no_course_to_judge(tmp_path, totals, verdict, text):
    (run,) = load_runs([write_run(tmp_path / "ge", "NPO(beta=0.1)", {7: (*totals, 0.1, 0.12)})])
    summary = summarize(run)
    said = reading(summary)
    assert said["verdict"] == verdict and text in said["text"]
    assert "NLL is 0.1 on the forget set and 0.12 on the retain set." in said["text"]
    assert cells(summary)["forget_nll"] == "0.1"  # nothing came after it


def test_figures_of_a_model_as_it_stands(tmp_path):
    folders = [write_run(tmp_path / name, f"{name}()", ONCE) for name in ("GA", "NLL")]
    source = build_report(folders, tmp_path / "out").read_text()
    assert "2 measurements of a model as it stands, without training" in source and "did not unlearn" not in source
    assert sorted(path.stem for path in (tmp_path / "out" / "figures").iterdir()) == ["geffect-once", "training"]
    (drawing, _) = drawings(load_runs(folders))
    panels = drawing.draw(load_runs(folders), LIGHT).axes
    assert [ax.get_title() for ax in panels] == ["total", *GROUPS, "cosine of the total"]
    ends = [[line.get_xdata()[-1] for line in ax.lines if line.get_marker() in "os"] for ax in panels]
    assert ends == [[-4.0, -4.0, -3.0, -3.0], *[[-1.0, -1.0, -0.75, -0.75]] * 4, [-0.008, -0.008, -0.006, -0.006]]
    both = [*folders, write_run(tmp_path / "run", "WGA(alpha=1.0)", GA_COURSE)]
    assert [one.name for one in drawings(load_runs(both))][:2] == ["geffect", "geffect-groups"]


def test_what_a_killed_writer_left_is_no_record(tmp_path):
    folder = write_run(tmp_path / "GA", "GA()", ONCE)
    (folder / "records" / f"{TEMPORARY_PREFIX}here-1-{32 * 'a'}.parquet").write_bytes(b"")
    assert [path.name for path in load_runs([folder])[0].record_files] == ["step-00000000.parquet"]
    only = tmp_path / "only" / "records"
    only.mkdir(parents=True)
    (only / f"{TEMPORARY_PREFIX}here-1-{32 * 'a'}.parquet").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="holds no records"):
        load_runs([tmp_path / "only"])


def test_a_map_of_many_layers_as_they_stand(tmp_path):
    layers = [f"layer {i}" for i in range(12)]
    folder = write_run(tmp_path / "deep", "GA()", ONCE, groups=layers)
    assert [one.name for one in drawings(load_runs([folder]))][:2] == ["geffect-once", "geffect-groups"]
    build_report([folder], tmp_path / "out")
