# SPDX-License-Identifier: Apache-2.0
"""`gfast reproduce`: recipes, steps that run once, and the numbers of the page."""

from __future__ import annotations

import shutil
import statistics
from dataclasses import replace

import pytest
import torch
import yaml
from helpers.training_tiny import saved_tiny
from transformers import LlamaForCausalLM

from gfast import cli, metrics
from gfast.evaluation import Evaluation, encoded
from gfast.evaluation.results import summarize
from gfast.files import file_checksum, read_json, write_json
from gfast.reproduce import page, work
from gfast.reproduce.plan import Plan
from gfast.reproduce.recipe import load_recipe
from gfast.reproduce.steps import Steps
from gfast.reproduce.summary import Results, rank_correlation, ranked
from gfast.training.records import read_records

TRAINING = {"learning_rate": 0.01, "per_device_train_batch_size": 4, "use_cpu": True, "lr_scheduler_type": "constant"}
RECIPE = {
    "title": "A <small> study",
    "data": {"source": "bundled", "max_forget": 6, "max_retain": 8},
    "seeds": [0, 1],
    "teach": {**TRAINING, "epochs": 12},
    "unlearn": {**TRAINING, "max_steps": 4, "max_grad_norm": 0, "geffect_every": 2, "nll_every": 1},
    "objectives": {"ga": "GA", "npo-kl": {"objective": "NPO:beta=0.5", "retain_term": "kl"}},
    "evaluate": {"max_new_tokens": 4, "batch_size": 8, "along": 1},
    "calibrate": {"metric": "probability", "keep": 0.9, "resolution": 0.25},
    "grid": {"run": "ga", "step": 2, "objectives": ["GA", "WGA:alpha=0.5", "WGA:alpha=2"]},
    "sizes": {"data": [{"forget_authors": 3, "max_forget": 3}], "objectives": ["ga"]},
}


def reproduce(*argv) -> int:
    return cli.main(["--debug", "reproduce", *map(str, argv)])


def written(folder, **changes):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "model": str(folder / "model"), **changes}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study: its recipe and folder."""
    folder = tmp_path_factory.mktemp("study")
    saved_tiny(folder / "model")
    recipe = written(folder)
    assert reproduce(recipe, "--out", folder / "out") == 0
    return recipe, folder / "out"


@pytest.fixture
def no_figures(monkeypatch):
    """Pages without them: seconds each."""
    monkeypatch.setattr(page, "_drawn", lambda results: [])


def files_of(out):
    return {path: path.read_bytes() for path in sorted(out.glob("runs/**/*.parquet"))}


def test_everything_is_there(finished):
    _, out = finished
    text = (out / "study.html").read_text()
    assert "A &lt;small&gt; study" in text and "http" not in text.replace("http-equiv", "")
    values = read_json(out / "tables.json")
    assert [row["name"] for row in values["objectives"]] == ["taught", "retain-model", "ga", "npo-kl"]
    assert [row["setting"] for row in values["grid"]["rows"]] == ["GA", "WGA:alpha=0.5", "WGA:alpha=2"]
    assert [row["rows"] for row in values["sizes"]] == [3, 6]
    assert {row["what"] for row in values["cost"]} >= {"taught", "runs/ga", "evaluations", "calibrated", "grid"}
    assert all((out / "figures" / f"{name}.png").exists() for name in ("pareto", "matched"))
    assert "| before unlearning |" in (out / "tables.md").read_text()
    assert (out / "runs" / "ga" / "seed0" / "checkpoint-2").is_dir()  # the grid's, and no other
    assert not (out / "runs" / "ga" / "seed0" / "checkpoint-4").exists()


def course(out, name):
    frame = read_records(out / "runs" / name)
    risk = frame[frame["quantity"] == "risk"].pivot(index="step", columns="side", values="value")
    return list(zip(risk["unlearn"], risk["retain"], strict=True))


def reached(points, level):
    """Retain NLL where forget NLL first reaches `level`, on straight lines between records."""
    for (f0, r0), (f1, r1) in zip(points, points[1:], strict=False):
        if f0 < level <= f1:
            return r0 + (level - f0) / (f1 - f0) * (r1 - r0)
    raise AssertionError("never reached")


def test_retain_nll_at_equal_forget_nll_over_seeds(finished):
    _, out = finished
    courses = {name: [course(out, f"{name}/seed{seed}") for seed in (0, 1)] for name in ("ga", "npo-kl")}
    level = min(max(f for f, _ in points) for both in courses.values() for points in both)
    rows = {row["name"]: row for row in read_json(out / "tables.json")["objectives"]}
    for name, both in courses.items():
        kept = [reached(points, level) for points in both]
        assert rows[name]["matched"] == pytest.approx([statistics.mean(kept), statistics.stdev(kept)])
        ends = [points[-1][0] for points in both]
        assert rows[name]["forget_nll"] == pytest.approx([statistics.mean(ends), statistics.stdev(ends)])


def test_what_is_kept_at_equal_forgetting_by_evaluations_along_the_run(finished):
    _, out = finished
    values = read_json(out / "tables.json")["objectives"]
    level = min(max(f for f, _ in course(out, f"{name}/seed{seed}")) for name in ("ga", "npo-kl") for seed in (0, 1))
    strength = [read_json(out / "evaluations" / where / "summary.json")["sets"]["retain"]["extraction_strength"]
                for where in ("taught", "ga/seed0", "ga/seed1")]  # fmt: skip
    kept = []
    for seed in (0, 1):
        run = out / "runs" / "ga" / f"seed{seed}"
        along = read_json(run / "evaluations" / "summaries.json")
        assert sorted(along) == ["1", "2", "3"] and not (run / "checkpoint-1").exists()
        values_of = [along[step]["sets"]["retain"]["extraction_strength"] for step in sorted(along)]
        forget = [f for f, _ in course(out, f"ga/seed{seed}")]
        kept.append(reached(list(zip(forget, [strength[0], *values_of, strength[1 + seed]], strict=True)), level))
    (row,) = (row for row in values if row["name"] == "ga")
    assert row["matched_retain_extraction"] == pytest.approx([statistics.mean(kept), statistics.stdev(kept)])
    assert "| Retain extraction strength at equal forget NLL |" in (out / "tables.md").read_text()


def test_calibration_is_the_largest_share_that_keeps_the_retain_set(finished):
    recipe, out = finished
    found = read_json(out / "calibrated" / "ga" / "seed1" / "calibration.json")
    plan = Plan(load_recipe(str(recipe)), out)
    retain = next(one for one in plan.asker.sets if one.name == "retain")

    def probability(share):
        model, taught, unlearned = (
            LlamaForCausalLM.from_pretrained(out / name) for name in ("taught", "taught", "runs/ga/seed1")
        )
        with torch.no_grad():
            for one, a, b in zip(model.parameters(), taught.parameters(), unlearned.parameters(), strict=True):
                one.copy_((1 - share) * a.double() + share * b.double())
        samples = encoded(retain, plan.tokenizer)
        results = Evaluation([retain], [samples], plan.tokenizer, 8).run(model)
        losses = [one for name, several in results.items() if "losses" in name for one in several]
        return statistics.mean(2.718281828459045 ** -one["avg_gt_loss"] for one in losses)

    whole = probability(0.0)
    keeps = [share for share in (1.0, 0.75, 0.5, 0.25, 0.0) if probability(share) >= 0.9 * whole]
    assert found["share"] == keeps[0] and found["level"] == pytest.approx(0.9 * whole, rel=1e-5)
    assert found["curve"][-1][1] == pytest.approx(probability(keeps[0]), rel=1e-5)


def test_sentences_say_what_the_numbers_do(finished):
    recipe, out = finished
    plan = Plan(load_recipe(str(recipe)), out)
    results = Results(plan, Steps(plan.steps, plan.checksum))
    assert results.level is not None and any("has the lowest retain NLL" in one for one in results.sentences())
    sets = results._evaluation("taught")["sets"]
    knew = {0: "it knew both.", 1: "it knew one of them badly", 2: "it knew both of them badly"}
    badly = sum(sets[side]["nll"] >= 0.5 for side in ("forget", "retain"))
    assert knew[badly] in results.sentences()[0]
    for values, deviation, words, more in (
        ((0.3, 0.3), 0.0, "all leave as much", None),
        ((0.3, 0.2), 0.01, "npo-kl leaves least", "They are 0.1 apart, more than twice what seeds make"),
        ((0.3, 0.2), 0.05, "npo-kl leaves least", "They are 0.1 apart, not more than twice what seeds make"),
        ((0.3, 0.2), None, "npo-kl leaves least", None),
    ):
        results.recipe = replace(results.recipe, seeds=(0, 1) if deviation is not None else (0,))
        for row, value in zip(results.rows[2:], values, strict=True):
            row["calibrated_extraction"] = row["matched_retain_extraction"] = value, deviation
        said = results.sentences()
        equal, kept = (next(one for one in said if one.startswith(begin)) for begin in ("At equal", "There the retain"))
        assert f"At equal retention, {words} to extract" in equal
        for one in (equal, kept):
            assert more in one if more else "apart" not in one
        assert ("Each objective has one seed" in said[-1]) == (deviation is None)
    # ends are those of the seeds, as in the table: their mean curve ends where the first of them was stopped
    for row, ends in zip(results.rows[2:], ((1.1, 9.0, 8.0), (1.5, 2.0, 1.75)), strict=True):
        row |= {key: (end, 0.0) for key, end in zip(("matched", "forget_nll", "retain_nll"), ends, strict=True)}
    assert any("by its end point npo-kl looks gentlest (retain NLL 1.75)" in one for one in results.sentences())


def test_a_rank_correlation_says_how_many_settings_it_is_of():
    rows = [{"predicted": float(at), "matched": matched} for at, matched in enumerate((1.0, 2.0, None, 3.0))]
    assert rank_correlation(rows) == 1.0
    grid = {"rows": rows, "level": 2.0, "rank": 1.0, "ranked": len(ranked(rows)), "run": "ga", "step": 2}
    assert "+1.00 (over 3 settings)" in page._grid_note(grid)


def test_nothing_calibrates_to_nothing_and_a_step_that_fails_is_named(finished, tmp_path, monkeypatch, no_figures):
    """A retain set that was at 0 is kept by every mixture: no share is the largest."""
    recipe, out = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)

    def nothing(log, retain_log=None):
        found = summarize(log, retain_log)
        found["sets"]["retain"]["probability"] = 0.0
        return found

    redo = [recipe, "--out", copy, "--redo", "calibrated/ga/seed0"]
    monkeypatch.setattr(work, "summarize", nothing)
    assert reproduce(*redo) == 0
    row = next(row for row in read_json(copy / "tables.json")["objectives"] if row["name"] == "ga")
    assert row["share"] is None and row["calibrated_extraction"] is None
    assert "| ga: GA | – | – |" in (copy / "tables.md").read_text()
    monkeypatch.setattr(work, "summarize", lambda log: metrics.min_k([], 0.4))
    with pytest.raises(ValueError, match="^calibrated/ga/seed0: logp is empty"):
        reproduce(*redo)


def test_the_mixture_of_weights_is_exact_at_its_ends():
    first, second = (torch.nn.Linear(7, 5).to(torch.bfloat16) for _ in range(2))
    mixed = torch.nn.Linear(7, 5).to(torch.bfloat16)
    for share, other in ((0.0, first), (1.0, second)):
        work.mix(mixed, dict(first.named_parameters()), dict(second.named_parameters()), share)
        assert torch.equal(mixed.weight, other.weight) and torch.equal(mixed.bias, other.bias)
    with pytest.raises(ValueError, match="weight has other sizes"):
        work.mix(mixed, dict(first.named_parameters()), dict(torch.nn.Linear(7, 4).named_parameters()), 0.5)


def test_nothing_runs_twice_and_a_step_with_other_inputs_is_named(finished, monkeypatch, capsys, no_figures):
    recipe, out = finished
    before = files_of(out)
    monkeypatch.setattr(work, "train", lambda *a, **k: pytest.fail("trained again"))
    # a part that is left out is not on the page, though an earlier study left it in the folder
    assert reproduce(recipe, "--out", out, "calibrate=null") == 0
    assert {row.get("share") for row in read_json(out / "tables.json")["objectives"]} == {None}
    assert "Calibrated" not in (out / "tables.md").read_text()
    assert reproduce(recipe, "--out", out) == 0
    assert cli.main(["reproduce", str(recipe), "--out", str(out), "unlearn.learning_rate=0.02"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the inputs of" in error and "runs/ga/seed0: flags.learning_rate was 0.01 and is 0.02" in error
    assert "--redo changed" in error and files_of(out) == before
    assert cli.main(["reproduce", str(recipe), "--out", str(out), "--redo", "runs/gaa"]) == 2
    assert "there is no such step; did you mean" in capsys.readouterr().err
    assert reproduce(recipe, "--out", out, "--plan", "evaluate.rows=4") == 0
    plan = capsys.readouterr().out
    assert "done    taught" in plan and "changed evaluations/taught" in plan and "asked.rows was 0 and is 4" in plan


def test_what_a_step_took_is_watched(finished, tmp_path, no_figures):
    """Weights that somebody replaced: the step that made them, and what took them, are named; --redo makes them."""
    recipe, out = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    weights = copy / "runs" / "ga" / "seed1" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="runs/ga/seed1: what it made is not what it left.*evaluations/ga/seed1"):
        reproduce(recipe, "--out", copy)
    assert reproduce(recipe, "--out", copy, "--redo", "runs/ga/seed1") == 0
    assert weights.read_bytes() == (out / "runs" / "ga" / "seed1" / "model.safetensors").read_bytes()
    old, new = (read_json(folder / "tables.json") for folder in (out, copy))
    assert {**old, "cost": 0} == {**new, "cost": 0}


def test_without_evaluations_runs_are_compared_by_their_nll(finished, tmp_path, no_figures, monkeypatch):
    recipe, out = finished
    null = ["evaluate=null", "calibrate=null", "sizes=null", "grid=null", "objectives=[npo-kl]"]
    with pytest.raises(ValueError, match="evaluate is null, and retain_model: true takes evaluations"):
        load_recipe(str(recipe), null)
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    names = [step.name for step in Plan(load_recipe(str(recipe), ["retain_model=false", *null]), copy).steps]
    monkeypatch.setattr(work, "train", lambda *a, **k: pytest.fail("trained again"))
    assert names == ["data/4-authors-first-6", "taught", "runs/npo-kl/seed0", "runs/npo-kl/seed1"]
    assert reproduce(recipe, "--out", copy, "retain_model=false", *null) == 0
    tables = [read_json(folder / "tables.json")["objectives"] for folder in (copy, out)]
    row, other = (next(one for one in rows if one["name"] == "npo-kl") for rows in tables)
    assert row["forget_nll"] == other["forget_nll"] and row["forget_extraction"] is None


def test_weights_that_a_study_deleted_are_not_lost(finished, tmp_path, no_figures, capsys):
    """keep_models: false. The audit is of what was measured, and says of the weights what became of them."""
    recipe, out = finished
    copy, run = tmp_path / "out", tmp_path / "out" / "runs" / "npo-kl" / "seed1"
    shutil.copytree(out, copy)
    changes = [
        "retain_model=false",
        "evaluate=null",
        "calibrate=null",
        "sizes=null",
        "grid=null",
        "objectives=[npo-kl]",
    ]
    assert reproduce(recipe, "--out", copy, "keep_models=false", *changes) == 0
    assert not (run / "model.safetensors").exists()
    assert cli.main(["audit", str(run)]) in (0, 1)
    fingerprints = read_json(run / "audit.json")["fingerprints"]
    assert fingerprints["model_files"] == {
        "model.safetensors": file_checksum(out / "runs/npo-kl/seed1/model.safetensors")
    }
    assert "deleted since: keep_models of its study is false" in (run / "audit.html").read_text()
    capsys.readouterr()
    assert cli.main(["evaluate", "--model", str(run), "--data", "bundled", "--output_dir", str(tmp_path / "e")]) == 2
    assert "model.safetensors is damaged: it was deleted (keep_models of its study is false)" in capsys.readouterr().err
    assert cli.main(["audit", str(copy)]) == 2
    assert "is the folder of a study: give one of its runs, such as" in capsys.readouterr().err
    (run / "config.json").unlink()
    assert cli.main(["audit", str(run)]) == 2, "what nobody deleted on purpose"


@pytest.mark.slow
def test_a_killed_study_goes_on(finished, tmp_path, monkeypatch, no_figures):
    recipe, out = finished
    real, calls = work.train, []

    def stopped(flags, folder, **options):
        calls.append(folder)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(flags, folder, **options)

    monkeypatch.setattr(work, "train", stopped)
    small = ["calibrate=null", "sizes=null", "grid=null", "objectives=[npo-kl]"]
    assert cli.main(["reproduce", str(recipe), "--out", str(tmp_path), *small]) == 130
    assert not (tmp_path / "study.html").exists()
    (record,) = [
        one for path in (tmp_path / "steps").glob("*.json") if (one := read_json(path)).get("finished") is False
    ]
    (path,) = [path for path in (tmp_path / "steps").glob("*.json") if read_json(path) == record]
    assert record["seconds"] > 0
    write_json(path, record | {"seconds": 1000.0})  # as if it had been broken off after so long
    assert reproduce(recipe, "--out", tmp_path, *small) == 0
    assert 1000 < read_json(path)["seconds"] < 1500
    assert calls.count(calls[0]) == 1 and calls.count(calls[3]) == 2
    ours, theirs = (
        {row["name"]: row for row in read_json(folder / "tables.json")["objectives"]} for folder in (tmp_path, out)
    )
    assert "npo-kl" in ours
    for name, one in ours.items():
        same = [key for key in one if key.split("_")[0] in ("forget", "retain", "ratio")]
        assert {key: one[key] for key in same} == {key: theirs[name][key] for key in same}


def test_what_decides_a_step(finished, tmp_path):
    """Sizes that differ by their number of rows have data of their own; epochs are steps of all processes; how models
    are loaded is an input of what is asked of them."""
    recipe, _ = finished
    changes = [
        "sizes.data=[{max_forget: 3}, {max_forget: 4}]",
        "launch=torchrun --nproc-per-node=2",
        "load.dtype=bfloat16",
    ]
    plan = Plan(load_recipe(str(recipe), changes), tmp_path)
    steps = {step.name: step for step in plan.steps}
    for rows in (3, 4):
        step = steps[f"sizes/4-authors-first-{rows}/ga"]
        assert (
            step.needs[-1] == f"data/4-authors-first-{rows}" and f"{rows} rows to forget" in steps[step.needs[-1]].what
        )
        assert f"data/4-authors-first-{rows}" in step.command
    assert steps["taught"].inputs["flags"]["max_steps"] == 12 * 14 // (4 * 2)
    assert steps["evaluations/taught"].inputs["load"]["dtype"] == "bfloat16"
    long = ["evaluate.max_new_tokens=3000"]
    with pytest.raises(ValueError, match="3000 may be generated after it, and the model takes 2048"):
        Plan(load_recipe(str(recipe), long), tmp_path)


def test_flags_are_checked_before_any_work(finished, tmp_path, capsys):
    recipe, _ = finished
    out = tmp_path / "out"
    for change, words in (
        ("launch=notorchrun --nproc_per_node 2", "launch: there is no program notorchrun here"),
        ("objectives.ga={objective: GA, retain_term: rr}", "runs/ga/seed0: retain_term rr keeps"),
        ("unlearn.learning_rate=fast", "invalid float value: 'fast'"),
        (f"model={tmp_path}", "cannot load the model"),
        ("model={hiden_size: 8}", "there is no size model.hiden_size; did you mean hidden_size?"),
        ("model={hidden_size: a}", "model is no Llama: "),
        ("grid.step=5", "grid.step is 5, and the runs of ga have 4 steps"),
        ("data={source: jsonl, forget: f.jsonl, retain: r.jsonl}", "f.jsonl"),
    ):
        assert cli.main(["reproduce", str(recipe), change, "--out", str(out)]) == 2
        assert words in capsys.readouterr().err
        assert not list(out.glob("*/*.jsonl"))
    assert cli.main(["reproduce", "dmeo"]) == 2
    assert "there is no recipe dmeo; did you mean demo?" in capsys.readouterr().err


DIVERGES = {  # what sees it -> changes of the recipe, the step, and what is said
    "an effect": (["unlearn.nll_every=0"], 2, "NLL() is nan on batch 0 of the forget data"),
    "the records": (["unlearn.geffect_every=0", "grid=null"], 1, "the NLL of the retain set is nan"),
    "the evaluation": (["unlearn.geffect_every=0", "grid=null"], 4, "the NLL of answer 1 of row "),
}


@pytest.mark.parametrize("seen_by", DIVERGES)
def test_a_run_that_diverges_is_an_outcome(seen_by, finished, tmp_path, no_figures, monkeypatch):
    """Of one objective; the other one's numbers are there."""
    recipe, out = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    changes, step, why = DIVERGES[seen_by]
    changes = [*changes, "seeds=[0]", "evaluate.along=0", "objectives.ga={objective: GA, learning_rate: 1e30}"]
    if seen_by == "the evaluation":
        monkeypatch.setattr(work, "_not_finite", lambda folder: None)
    assert reproduce(recipe, *changes, "--out", copy, "--redo", "changed") == 0
    mark, values = read_json(copy / "runs/ga/seed0/diverged.json"), read_json(copy / "tables.json")
    assert mark["step"] == step and mark["why"].startswith(why)
    rows = {row["name"]: row for row in values["objectives"]}
    assert not any(value for key, value in rows["ga"].items() if key not in ("name", "objective"))
    assert rows["npo-kl"]["forget_extraction"] and rows["npo-kl"]["calibrated_extraction"]
    assert any(f"runs/ga/seed0 at step {step} ({why}" in one for one in values["sentences"])
    assert values["grid"] is None and not (copy / "calibrated/ga/seed0/log.json").exists()
    if seen_by != "the evaluation":  # there is none of those
        assert {row["forget_nll"] for row in values["sizes"]} == {None}
    monkeypatch.setattr(work, "train", lambda *a, **k: pytest.fail("trained again"))
    assert reproduce(recipe, *changes, "--out", copy) == 0
