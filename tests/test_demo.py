# SPDX-License-Identifier: Apache-2.0
"""`gfast demo`, for real but small."""

import json
import math

import pytest

from gfast import demo
from gfast.commands.demo import main
from gfast.files import MANIFEST, read_json
from gfast.training import read_records


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A finished quick demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["--quick", "--cpu", "--out", str(out)]) == 0
    return out


def totals(records, quantity, side, group="total"):
    rows = records[(records["quantity"] == quantity) & (records["side"] == side) & (records["group"] == group)]
    return rows.set_index("step")["value"]


def test_everything_is_there(quick):
    assert (quick / "report.html").stat().st_size > 100_000
    assert {path.name for path in (quick / "figures").iterdir()} == {
        "geffect.png", "geffect-groups.png", "training.png", "nll.png", "pareto.png",
    }  # fmt: skip
    rows = json.loads((quick / "table.json").read_text())
    assert [row["objective"] for row in rows] == [str(objective) for objective in demo.OBJECTIVES.values()]
    assert not (quick / "learning").exists() and (quick / "model" / "config.json").exists()
    assert "tokenizer.json" in read_json(quick / "model" / MANIFEST)["files"]  # of a model that is whole, or not there
    page = (quick / "report.html").read_text()
    for name in demo.OBJECTIVES:
        assert f'href="runs/{name}/records/step-00000006.parquet"' in page


@pytest.mark.parametrize("name", demo.OBJECTIVES)
def test_records_of_a_run(quick, name):
    records = read_records(quick / "runs" / name)
    assert list(records.columns) == ["run", "objective", "step", "epoch", "quantity", "side", "group", "value"]
    assert set(records["objective"]) == {str(demo.OBJECTIVES[name])} and set(records["run"]) == {name}
    assert records["value"].map(math.isfinite).all()
    for side in ("unlearn", "retain"):
        effect = totals(records, "g_effect", side)
        assert list(effect.index) == [0, 3, 6]
        groups = records[(records["quantity"] == "g_effect") & (records["side"] == side)]
        parts = groups[groups["group"] != "total"]
        assert set(parts["group"]) == {"embed", "shallow", "middle", "deep", "lm"}
        for step, total in effect.items():
            assert parts[parts["step"] == step]["value"].sum() == pytest.approx(total, rel=1e-9, abs=1e-15)
    assert {"loss", "mean_weight", "learning_rate"} <= set(records["quantity"])


def test_the_model_knew_and_then_forgot(quick):
    for name in demo.OBJECTIVES:
        forget = totals(read_records(quick / "runs" / name), "risk", "unlearn", "")
        assert forget[0] < 0.3, name
        assert forget[6] > 2 * forget[0], name


def test_gradient_ascent_has_minus_the_squared_norm(quick):
    records = read_records(quick / "runs" / "ga")
    for group in ("embed", "shallow", "middle", "deep", "lm", "total"):
        effect, norm = totals(records, "g_effect", "unlearn", group), totals(records, "risk_norm", "unlearn", group)
        assert (effect < 0).all()
        assert effect.to_list() == pytest.approx([-(value**2) for value in norm], rel=1e-6)
    assert totals(records, "cosine", "unlearn").to_list() == pytest.approx([-1.0] * 3)


def test_objectives_agree_where_theory_says_so(quick):
    """On the original model all weights of TNPO are 1: its effects are those of GA, step for step at step 0."""
    ga, tnpo = (read_records(quick / "runs" / name) for name in ("ga", "tnpo"))
    for side in ("unlearn", "retain"):
        first = totals(ga, "g_effect", side)[0]
        assert totals(tnpo, "g_effect", side)[0] == pytest.approx(first, rel=1e-3)


def test_a_second_call_keeps_finished_runs_and_redoes_the_others(quick, capsys):
    files = {path: path.read_bytes() for path in sorted(quick.glob("runs/*/records/*.parquet"))}
    finished = {path: path.stat().st_mtime_ns for path in files if "wga" not in str(path)}
    # As after Ctrl-C in the second run: records up to some step, no result.
    (quick / "runs" / "wga" / "result.json").unlink()
    (quick / "runs" / "wga" / "records" / "step-00000006.parquet").unlink()
    assert main(["--quick", "--cpu", "--out", str(quick)]) == 0
    assert capsys.readouterr().out.count("finished in an earlier call") == len(demo.OBJECTIVES) - 1
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    # The run that was stopped comes out as it did the first time.
    assert {path: path.read_bytes() for path in sorted(quick.glob("runs/*/records/*.parquet"))} == files


def test_folders_of_something_else_are_refused(quick, tmp_path):
    with pytest.raises(ValueError, match="other settings: seed is 0 there and 1 here"):
        main(["--quick", "--seed", "1", "--out", str(quick)])
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="something else"):
        main(["--quick", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(OSError, match="is a file"):
        main(["--quick", "--out", str(tmp_path / "thesis.tex")])
    with pytest.raises(ValueError, match="must be positive"):
        main(["--steps", "0", "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.Study, "learn", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        main(["--quick", "--cpu", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "demo.json").exists()
