"""The audit of a run: which updates pass, what the page and the JSON say, and what cannot be judged."""

from __future__ import annotations

import errno
import hashlib
import html
import json
import math
import shutil

import pytest
from helpers.report_runs import GA_COURSE, MIX_COURSE, write_run
from helpers.training_tiny import saved_tiny, tiny_model
from test_report import Page

from gfast import cli
from gfast.files import read_json, write_json
from gfast.report.audit import Criteria, audit
from gfast.training.fingerprints import model_fingerprint
from gfast.training.records import read_records, read_run_info, write_record, write_run_info


@pytest.mark.parametrize(
    ("unlearn", "retain", "options", "words"),
    [
        ((-4.0, -0.5), (1.0, 0.1), {}, []),
        ((-4.0, None), (0.0, None), {}, []),
        ((4.0, 0.5), (0.0, 0.0), {}, ["did not remove: unlearn effect not negative"]),
        ((0.0, None), (0.0, 0.0), {}, ["did not remove: unlearn effect not negative"]),
        ((-4.0, -9e-4), (0.0, 0.0), {}, ["did not remove: unlearn effect flat (cosine within 0.001)"]),
        ((-4.0, -9e-4), (0.0, 0.0), {"flat": 1e-4}, []),
        ((-4.0, -0.5), (-0.1, None), {}, ["did not spare: retain effect negative"]),
        ((-4.0, -0.5), (-0.1, -9e-4), {}, []),
        ((-4.0, -0.5), (-0.1, -0.1), {"harm": 0.03}, []),
        ((-4.0, -0.5), (-0.1, -0.1), {"harm": 0.02}, ["did not spare: retain effect negative"]),
        ((4.0, 0.5), (-1.0, -0.1), {}, ["did not remove: unlearn effect not negative",
                                       "did not spare: retain effect negative"]),
        ((math.nan, math.nan), (math.inf, math.nan), {}, ["unlearn effect is nan", "retain effect is inf"]),
        ((None, None), (-1.0, -0.1), {}, ["unlearn effect not recorded", "did not spare: retain effect negative"]),
    ],
)  # fmt: skip
def test_what_an_update_must_do(unlearn, retain, options, words):
    values = dict(zip(("unlearn", "unlearn_cosine", "retain", "retain_cosine"), (*unlearn, *retain), strict=True))
    assert Criteria(**options).faults(values) == words


def test_criteria_that_are_none():
    for name, value in (("flat", 1.0), ("flat", math.nan), ("harm", -1.0), ("rise", 0.9), ("rise", math.inf)):
        with pytest.raises(ValueError, match=f"{name} is {value:g}; give"):
            Criteria(**{name: value})


def test_a_run_that_passes_and_one_that_does_not(tmp_path, capsys):
    good = write_run(tmp_path / "mix", "NPO(beta=0.1) + KL()", MIX_COURSE, note="<b>&")
    bad = write_run(tmp_path / "ga", "GA()", GA_COURSE)
    assert cli.main(["audit", str(good), "--beside", str(bad)]) == 0
    assert "Passed: each of the 2 measured of 10 updates removed what it should" in capsys.readouterr().out
    found = json.loads((good / "audit.json").read_text())
    assert found["passed"] and [one["step"] for one in found["updates"]] == [0, 5] and found["of_updates"] == 10
    assert [one["run"] for one in found["matched"]] == ["NPO(beta=0.1) + KL", "GA"]

    assert cli.main(["audit", str(bad), "--out", str(tmp_path / "page")]) == 1
    said = capsys.readouterr().out
    assert "Not passed: of the 2 measured of 10 updates, 1 did not do" in said and "(1 did not spare the rest)" in said
    assert "the first of them update 6; and the retain NLL rose from 0.12 to 7, more than 1.1 times its start" in said
    assert cli.main(["audit", str(bad), "--harm", "0.8", "--rise", "100"]) == 0
    assert cli.main(["audit", str(bad), "--harm", "0.8"]) == 1
    assert (
        "Not passed: the retain NLL rose from 0.12 to 7, more than 1.1 times its start, although"
        in (capsys.readouterr().out.splitlines()[-2])
    )

    for folder, words in ((good, ["None of the 2 measured", "<b>&", "at equal forget NLL"]), (tmp_path / "page", [
        "did not spare: retain effect negative", "Signature", "No other run was given", "embed+lm"])):  # fmt: skip
        source = (folder / "audit.html").read_text()
        page = Page(source)
        assert not {"script", "link", "iframe"} & set(page.tags) and "built-in" not in source
        assert all(url.startswith("data:image/svg+xml;base64,") for _, _, url in page.urls)
        text = html.unescape(" ".join("".join(page.text).split()))
        assert [word for word in words if word not in text] == []


def test_a_folder_that_cannot_be_written_is_said_first(tmp_path, capsys, monkeypatch):
    def refused(folder):
        raise OSError(errno.EROFS, f"cannot write to the folder {folder}: Read-only; choose another one")

    monkeypatch.setattr("gfast.files.require_writable", refused)
    monkeypatch.setattr("gfast.report.audit.audit", pytest.fail)
    for argv, folder in (([tmp_path], tmp_path), (["run", "--out", tmp_path / "out"], tmp_path / "out")):
        assert cli.main(["audit", *map(str, argv)]) == 2
        assert f"cannot write to the folder {folder}: Read-only" in capsys.readouterr().err


def test_what_cannot_be_judged(tmp_path, capsys):
    def fails(words, *argv):
        capsys.readouterr()
        assert cli.main(["audit", *map(str, argv)]) == 2
        assert words in capsys.readouterr().err

    run = write_run(tmp_path / "run", "GA()", {0: (math.nan, 1.0, 0.1, 0.1), 5: (-1.0, 1.0, 0.2, 0.1)})
    assert cli.main(["audit", str(run)]) == 1
    assert "(1 cannot be judged)" in capsys.readouterr().out
    assert json.loads((run / "audit.json").read_text(), parse_constant=pytest.fail)["updates"][0]["unlearn"] == "nan"
    common = {"run": "run", "step": 0, "epoch": 0.0, "quantity": "g_effect", "side": "unlearn", "group": "total"}
    write_record(run, [common | {"objective": "WGA(alpha=1.0)", "value": 1.0}])
    assert cli.main(["audit", str(run)]) == 1  # the run's own objective
    assert cli.main(["audit", str(run), "--objective", "WGA(alpha=1.0)"]) == 1
    fails("say with --objective which of the recorded ones is meant: GA(), WGA", run, "--objective", "NPO()")
    last = write_run(tmp_path / "last", "GA()", {5: (-1.0, 1.0, 0.2, 0.1)})
    fails("after its last update only", last)
    plain = tmp_path / "plain"
    write_record(plain, [common | {"objective": "GA()", "quantity": "loss", "side": "", "group": "", "value": 1.0}])
    fails("no recorded G-effect to judge updates by", plain)
    fails("holds no records", tmp_path / "nowhere")
    shutil.copytree(run, tmp_path / "damaged")
    next((tmp_path / "damaged" / "records").iterdir()).write_bytes(b"PAR1")
    fails("is damaged", tmp_path / "damaged")


@pytest.mark.parametrize("end", ["killed", "nan", "late"])
def test_the_nll_in_the_end_is_that_after_the_last_update(tmp_path, capsys, end):
    steps = {"killed": (0, 4), "nan": (0, 4, 8), "late": (2, 4, 8)}[end]
    course = {step: (-1.0, 1.0, 0.1 + step, math.nan if end == "nan" and step == 8 else 0.1) for step in steps}
    run = write_run(tmp_path / "run", "GA()", course)
    row = {"run": "run", "objective": "GA()", "step": 8, "epoch": 0.0, "quantity": "loss", "side": "", "group": ""}
    write_record(run, [row | {"value": 1.0}])
    assert cli.main(["audit", str(run)]) == 1
    first, last = (2, 8) if end == "late" else (0, 4)
    assert (
        f"the NLL was measured from step {first} to {last}, and the run is one of 8 updates" in capsys.readouterr().out
    )


def test_no_run_passes_whose_nll_was_not_measured(tmp_path):
    for step in range(2):
        common = {"run": "run", "objective": "GA() (live)", "step": step, "epoch": 0.0, "group": "total"}
        sides = {"unlearn": -1.0, "retain": 1.0}
        rows = [{"quantity": "g_effect", "side": side, "value": value} for side, value in sides.items()]
        write_record(tmp_path, [common | row for row in rows])
    write_json(tmp_path / "result.json", {"steps": 2})
    _, found = audit(tmp_path)
    assert not found["passed"] and [one["faults"] for one in found["updates"]] == [[], []]
    assert found["verdict"].startswith("Not passed: the NLL of both sets was not measured (--nll_every), although each")


@pytest.mark.parametrize("info", [None, {}, {"objective": "GA()", "config": {"surgery": "gru"}}])
def test_a_run_of_python_that_recorded_no_model(tmp_path, info):
    made = write_run(tmp_path / "made", "GA()", {0: (-1.0, 1.0, 0.1, 0.1), 5: (-1.0, 1.0, 0.2, 0.1)})
    run = tmp_path / "run"
    if info is not None:
        write_run_info(run, info)
    shutil.copytree(made / "records", run / "records")
    page, found = audit(run)
    assert found["passed"] and "not recorded" in page.read_text()


def test_effects_that_steps_measured(tmp_path):
    run = write_run(tmp_path / "run", "GA() + NLL()", {0: (-1.0, 1.0, 0.1, 0.1), 4: (-1.0, 1.0, 0.2, 0.1)})
    for step in range(4):
        common = {"run": "run", "objective": "GA() + NLL() (live)", "step": step, "epoch": 0.0, "group": "total"}
        rows = [{"quantity": "g_effect", "side": "unlearn", "value": -1.0}]
        rows += [{"quantity": "g_effect", "side": "retain", "value": -1.0}] if step else []
        rows += [{"quantity": "risk", "side": "retain", "group": "", "value": 9.0**step}]  # of a batch: no rise
        rows += [{"quantity": "step_effect", "side": "retain", "value": 0.5}] if step > 1 else []
        write_record(run, [common | row for row in rows])
    stop = {"quantity": "stop", "group": "retain_effect<0 for 2", "objective": "GA() + NLL() (live)", "step": 3}
    write_record(run, [common | stop | {"value": 2.0}])  # by what step 4 measured, at the weights before it
    assert audit(run)[1]["stopped"] == "rule 'retain_effect<0 for 2' at step 3"
    assert [one["update"] for one in audit(run)[1]["updates"]] == [1]  # those of the whole sets
    page, found = audit(run, objective="GA() + NLL() (live)")
    assert [one["faults"] for one in found["updates"]] == [
        ["retain effect not recorded"], ["did not spare: retain effect negative"], [], []]  # fmt: skip
    assert "on each step's own batches" in page.read_text() and found["outcome_faults"] == []
    assert found["nll"]["forget"]["after"] == 0.2 and found["nll"]["retain"]["after"] == 0.1


def test_from_the_command_that_stops_to_the_page_that_is_signed(tmp_path, capsys):
    original = saved_tiny(tmp_path / "original")
    run = tmp_path / "run"
    command = [
        "unlearn", "--model", str(original), "--data", "bundled", "--max_forget", "4", "--max_retain", "4",
        "--output_dir", str(run), "--max_steps", "5", "--objective", "GA", "--use_cpu", "true",
        "--save_strategy", "no", "--disable_tqdm", "true", "--geffect_every", "2", "--nll_every", "1",
        "--stop", "retain_nll>100x", "unlearn_effect < 0 for 2",
    ]  # fmt: skip
    assert cli.main(command) == 0
    why = read_json(run / "result.json")["stopped"]
    assert why.startswith("rule 'unlearn_effect < 0 for 2' at step 2: ") and f"training ends: {why}" in (
        capsys.readouterr().err
    )
    assert (run / "checkpoint-2" / "trainer_state.json").exists()
    frame = read_records(run)
    assert frame[frame["quantity"] == "risk"].groupby("step").size().tolist() == [2, 2, 2]
    assert read_run_info(run)["model_fingerprint"] == model_fingerprint(tiny_model())
    assert cli.main(command) == 0
    assert "it was ended by its rule 'unlearn_effect < 0 for 2'" in capsys.readouterr().err

    assert cli.main(["audit", str(run), "--rise", "1000"]) in (0, 1)
    found = read_json(run / "audit.json")
    assert found["of_updates"] == 2 and [one["update"] for one in found["updates"]] == [1] and found["stopped"] == why
    assert (
        list(found["fingerprints"]["model_files"]) == ["model.safetensors"] and len(found["fingerprints"]["data"]) == 2
    )
    (run / "result.json").unlink()
    assert cli.main(["audit", str(run), "--rise", "1000"]) == 1
    assert "the run did not finish (it left no result.json)" in capsys.readouterr().out
    assert read_json(run / "audit.json")["stopped"] == "rule 'unlearn_effect < 0 for 2' at step 2"
    # a log that goes on being written, as `gfast unlearn ... | tee run/log.txt` makes one, is nothing of the model
    manifest = read_json(run / "gfast-manifest.json")
    manifest["files"]["log.txt"] = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    write_json(run / "gfast-manifest.json", manifest)
    (run / "log.txt").write_text("Finished 2 steps.")
    assert cli.main(["audit", str(run), "--rise", "1000"]) in (0, 1)
    with open(run / "model.safetensors", "ab") as file:
        file.write(b"!")
    assert cli.main(["audit", str(run)]) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
