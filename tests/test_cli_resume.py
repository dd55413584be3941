"""A command started again: it goes on with its own files, and only with those."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.cli import fails, flags
from safetensors.torch import load_file, save_file

from gfast import cli
from gfast.files import read_json
from gfast.training.records import read_records, recorded_steps


def test_a_run_goes_on_with_its_own_files_only(original, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(original, data)
    argv = ["unlearn", *flags(original, out, data_path=data, retain_term="nll", save_strategy="steps", save_steps=1)]
    assert cli.main(argv) == 0
    (out / "result.json").unlink()  # as if it had been killed
    path = data / "retain.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row | {"note": 1}) + "\n" for row in rows[:-1]), encoding="utf-8")
    fails(capsys, "samples is", *argv)  # a row less is another run
    rows[2]["answer"] += "!"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fails(capsys, "the rows of the retain set (retain.jsonl) are not those that it was begun with", *argv)
    rows[2]["answer"] = rows[2]["answer"][:-1]
    path.write_text("\n" + "".join(json.dumps(row, indent=None) + "\n" for row in rows), encoding="utf-8")
    assert cli.main(argv) == 0


def test_a_run_goes_on_with_the_model_and_the_refusals_it_was_begun_with(original, tmp_path, capsys):
    """Files whose names are what they were, and whose contents are not."""
    model, lines, out = tmp_path / "model", tmp_path / "refusals.txt", tmp_path / "run"
    shutil.copytree(original, model)
    lines.write_text("I do not know.\n", encoding="utf-8")
    settings = {"objective": "PO", "refusals": lines, "model": model, "max_steps": 1}
    argv = ["unlearn", *flags(original, out, **settings)]
    assert cli.main(argv) == 0
    (out / "result.json").unlink()  # as if it had been killed
    lines.write_text("Who asks?\n", encoding="utf-8")
    fails(capsys, "the token ids (tokenizer, template, refusals) of the forget set are not those", *argv)
    lines.write_text("\nI do not know.\n", encoding="utf-8")
    values = load_file(model / "model.safetensors")
    save_file({name: 2 * value for name, value in values.items()}, model / "model.safetensors", {"format": "pt"})
    fails(capsys, f"the weights of {model} are not those that it was begun with", *argv)
    save_file(values, model / "model.safetensors", {"format": "pt"})
    assert cli.main(argv) == 0


def test_a_damaged_model_of_a_run_is_not_taken(original, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["unlearn", *flags(original, out, save_strategy="steps", save_steps=1)]) == 0
    for folder in (out, out / "checkpoint-1"):
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 16
        path.write_bytes(bytes(content))
        words = f"{path} is damaged: its contents do not fit its checksum"
        fails(capsys, words, "geffect", "--model", str(folder), "--data", "bundled")
        content[-3] ^= 16
        path.write_bytes(bytes(content))
    (out / "checkpoint-1" / "optimizer.pt").write_bytes(b"")  # which is not loaded
    data = ["--data", "bundled", "--max_forget", "2", "--max_retain", "2"]
    assert cli.main(["geffect", "--model", str(out / "checkpoint-1"), *data]) == 0


def test_ctrl_c_says_what_is_saved_and_the_command_resumes(original, tmp_path, capsys, monkeypatch):
    from gfast.training.clock import Clock
    from gfast.training.terms import RecordTerms
    from gfast.training.trajectory import callbacks_of, calling_trainer

    out, record = tmp_path / "run", RecordTerms.on_step_end
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "geffect_every": 2, "retain_term": "nll"}
    words = flags(original, out, **settings)

    def interrupted(self, args, state, control, **kwargs):
        record(self, args, state, control, **kwargs)
        if state.global_step == 1:  # as if it had taken so long until then
            (clock,) = [one for one in callbacks_of(calling_trainer()) if isinstance(one, Clock)]
            clock.before, clock.measuring_before = 1000.0, 100.0
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecordTerms, "on_step_end", interrupted)
        assert cli.main(["unlearn", *words]) == 130
    text = capsys.readouterr().err
    assert "Interrupted after step 3" in text and "checkpoint-2" in text and "goes on from there" in text
    assert recorded_steps(out) == [0, 1, 2, 3]
    assert cli.main(["unlearn", *words]) == 0
    said = capsys.readouterr().err
    assert "Resuming from" in said and "4 of 4 (step)" in said
    whole = tmp_path / "whole" / "run"
    assert cli.main(["unlearn", *flags(original, whole, **settings)]) == 0
    found, expected = read_records(out), read_records(whole)
    assert recorded_steps(out) == [0, 1, 2, 3, 4] and len(found) == len(expected)
    assert found["value"].to_numpy() == pytest.approx(expected["value"].to_numpy(), rel=1e-4, abs=1e-6)
    loss, right = (read_json(run / "result.json")["train_loss"] for run in (out, whole))  # of all steps, not the last's
    steps = expected[expected["quantity"] == "loss"]["value"]
    assert loss == pytest.approx(right, rel=1e-4) and right == pytest.approx(steps.mean(), rel=1e-4)
    result, other = (read_json(run / "result.json") for run in (out, whole))
    assert 1000 < result["seconds"] < 1500 and 100 < result["measuring_seconds"] < 200  # of both starts
    assert 0 < other["measuring_seconds"] < other["seconds"] < 500


@pytest.mark.parametrize("name", ["model", "elsewhere"])
def test_no_model_is_written_over(name, original, tmp_path, capsys):
    """The original, or another one that lies in the output folder."""
    for folder in ("model", "elsewhere"):
        shutil.copytree(original, tmp_path / folder)
    before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    argv = ["unlearn", *flags(original, tmp_path / name, model=tmp_path / "model")]
    fails(capsys, "holds a model that no run of gfast has made there (config.json)", *argv)
    assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == before
