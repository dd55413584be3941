"""The command line end to end on a tiny model: files, errors as one line, YAML under flags, resuming."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.cli import fails, flags
from helpers.training_tiny import FORGET_ROWS, TOKENIZER, tiny_model
from safetensors.torch import load_file, save_file

import gfast
from gfast import cli, metrics
from gfast.data import Collator, QADataset
from gfast.files import read_json
from gfast.training.config import UnlearnConfig
from gfast.training.records import read_records, read_run_info, recorded_steps


def test_help_is_fast_and_lists_the_commands():
    code = "import sys; from gfast.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)
    assert done.stdout.strip().endswith("False"), "help must not import torch"
    assert cli.main([]) == 0
    assert cli.main(["--version"]) == 0


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name not in cli.IN_SEVERAL])
def test_a_command_of_one_process_is_refused_in_several(command, monkeypatch, capsys, tmp_path):
    """Each of them would do it all, in one folder: a page written twice, an error that says another is writing."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "--out", "x"]) == 2
    said = capsys.readouterr().err
    assert f"gfast {command} is work for one process, and 2 were started" in said and "without a launcher" in said
    assert cli.main([command, "--help"]) == 0
    assert not list(tmp_path.iterdir())


def test_evaluations_along_a_run_and_what_they_say_at_equal_forgetting(original, tmp_path, capsys):
    along = dict(evaluate_every=2, evaluate_rows=3, nll_every=1, max_steps=3, learning_rate=0.05)
    runs = {name: tmp_path / name for name in ("GA", "WGA")}
    for objective, folder in runs.items():
        assert cli.main(["unlearn", *flags(original, folder, objective=objective, **along)]) == 0
    log = metrics.load_log(runs["GA"] / "evaluations" / "step-00000002.json")
    assert {name: len(one) for name, one in log.sets.items()} == {"retain": 3, "forget": 3}
    assert cli.main(["report", *map(str, runs.values()), "--out", str(tmp_path / "report")]) == 0
    matched = [run["matched"] for run in json.loads((tmp_path / "report" / "table.json").read_text())]
    assert all(0 <= one["retain_extraction"] <= 1 for one in matched)
    fails(capsys, "evaluate_rows is -1", "unlearn", *flags(original, tmp_path / "x", evaluate_rows=-1))
    fails(capsys, "give the steps between evaluations", "unlearn", *flags(original, tmp_path / "x", evaluate_rows=3))


@pytest.mark.parametrize("objective, given", [("SHRED", []), ("JensUn", ["target_ids=(3,4)"])])
def test_unlearn_to_a_target_over_the_vocabulary(objective, given, original, tmp_path):
    settings = {"objective": objective, "objective_args": given or None, "retain_term": "jsd", "geffect_every": 1}
    assert cli.main(["unlearn", *flags(original, tmp_path, **settings, geffect_samples=2)]) == 0
    frame = read_records(tmp_path)
    assert {"g_effect", "loss", "forget_loss", "retain_loss"} <= set(frame["quantity"])
    kept = frame[(frame["quantity"] == "retain_loss") & (frame["step"] == 1)]["value"]
    assert 0 <= kept.iloc[0] < math.log(2)


def test_the_weights_of_rows_reach_the_loss(original, tmp_path, capsys):
    """HardMask by a field "weight" of the rows: as GA over the rows that have 1, of all rows' tokens."""
    rows = [{**row, "weight": index % 2} for index, row in enumerate(FORGET_ROWS)]
    path = tmp_path / "masked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = dict(optim="sgd", max_grad_norm=0, max_steps=1, per_device_train_batch_size=6, learning_rate=1e-2)
    start, found = load_file(original / "model.safetensors"), tmp_path / "run"
    assert cli.main(["unlearn", *flags(original, found, objective="HardMask", forget=path, **options)]) == 0
    model = tiny_model()
    batch = Collator(TOKENIZER)([{**item, "weight": i % 2} for i, item in enumerate(QADataset(FORGET_ROWS, TOKENIZER))])
    logp = gfast.model_logp(model, batch)
    ((logp * batch["weight"]).sum() / (batch["labels"][:, 1:] != -100).sum()).backward()
    after = load_file(found / "model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(after[name] - start[name], -1e-2 * parameter.grad, rtol=1e-3, atol=1e-7)
    fails(
        capsys,
        "UNDIAL(beta=10.0) has no token weights",
        "unlearn",
        *flags(original, tmp_path / "no", objective="UNDIAL", forget=path),
    )


def test_unlearn_help_shows_our_flags_before_the_trainers(capsys):
    assert cli.main(["unlearn", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.index("--objective ") < text.index("--learning_rate ")
    assert "--push_to_hub" not in text and "--no_" not in text
    assert cli.main(["unlearn", "--help_all"]) == 0
    assert "--push_to_hub" in capsys.readouterr().out


def test_unlearn_writes_model_and_records(original, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    settings = {"objective_args": ["alpha=0.5"], "retain_term": "kl", "geffect_every": 1, "geffect_samples": 3}
    assert cli.main(["unlearn", *flags(original, out, **settings)]) == 0
    said = capsys.readouterr().err
    assert "gfast report" in said and "WGA(alpha=0.5) + KL(): 2 of 2 (step), 0:0" in said
    frame = read_records(out)
    assert recorded_steps(out) == [0, 1, 2]
    assert set(frame["objective"]) == {"WGA(alpha=0.5) + KL()"} and set(frame["run"]) == {"run"}
    wanted = {"g_effect", "risk", "loss", "forget_loss", "retain_loss", "mean_weight", "mean_inverse_confidence"}
    assert wanted <= set(frame["quantity"])
    info = read_run_info(out)
    assert info["samples"] == {"forget": 6, "retain": 6} and info["seed"] == 0 and info["versions"]["gfast"]
    before, after = load_file(original / "model.safetensors"), load_file(out / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert {path.name for path in (out / "reference").iterdir()} == {"retain-hidden.safetensors"}

    # Again: finished, nothing is trained or changed. With another setting: another run, refused.
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["unlearn", *flags(original, out, **settings)]) == 0
    assert "finished" in capsys.readouterr().err and (out / "model.safetensors").stat().st_mtime_ns == stamp
    fails(capsys, "holds another run: max_steps is 2 there and 3 here", "unlearn",
          *flags(original, out, **settings | {"max_steps": 3}))  # fmt: skip
    for other in (
        {"weights": "retain_conflict", "geffect_every": 0, "geffect_samples": 0},
        {"evaluate_every": 1},
        {"auto_find_batch_size": True},
        {"accelerator_config": '{"split_batches": true}'},
        {"optim_target_modules": "q_proj"},
    ):
        words = f" {next(iter(other))} is "  # there and here
        fails(capsys, words, "unlearn", *flags(original, out, **settings | other))
    with monkeypatch.context() as patch:
        patch.setattr(UnlearnConfig, "world_size", 2)
        fails(capsys, "holds another run: processes is None there and 2", "unlearn", *flags(original, out, **settings))

    assert cli.main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").is_file()


def test_yaml_under_flags(original, tmp_path, capsys):
    settings = flags(original, tmp_path / "run")
    pairs = dict(zip((word.removeprefix("--") for word in settings[::2]), settings[1::2], strict=True))
    lines = [f"{name}: {value}" for name, value in pairs.items() if name != "max_steps"]
    lines += ["objective_args: {alpha: 0.25}", "max_steps: 5", "weight_decay: 1e-3", "retain_term: nll"]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    assert (
        cli.main(["unlearn", "--config", str(tmp_path / "run.yaml"), "--max_steps", "1", "--retain-term", "none"]) == 0
    )
    assert "6 forget rows, the retain set has no part: no --retain_term" in capsys.readouterr().err
    info = read_run_info(tmp_path / "run")
    assert info["objective"] == "WGA(alpha=0.25)"
    assert info["config"]["max_steps"] == 1 and info["config"]["weight_decay"] == 1e-3

    for text, words in (
        ("learning_rat: 1", "there is no setting learning_rat; did you mean learning_rate?"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("- a list", "should map names to values"),
        ("a: [", "not valid YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        fails(capsys, words, "unlearn", "--config", str(tmp_path / "bad.yaml"))
    fails(capsys, "there is no configuration file", "unlearn", "--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("objective", ["NPO", "DPO", "PO"])
def test_objectives_with_data_of_their_own(original, tmp_path, objective):
    out = tmp_path / "run"
    settings = {"objective": objective, "geffect_every": 2, "max_steps": 1, "retain_term": "nll"}
    assert cli.main(["unlearn", *flags(original, out, **settings)]) == 0
    frame = read_records(out)
    assert set(frame[frame["quantity"] == "g_effect"]["step"]) == {0, 1}
    assert (out / "reference").exists() == (objective != "PO")


def test_lora(original, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "run"
    assert cli.main(["unlearn", *flags(original, out, lora_r=2, objective="TNPO", retain_term="kl", max_steps=1)]) == 0
    assert (out / "adapter_model.safetensors").is_file()
    assert {path.name for path in (out / "reference").iterdir()} == {"forget-logp.safetensors"}


@pytest.mark.parametrize("objective", ["GA", "PO"])
def test_the_data_seed_draws_all_that_is_drawn_among_the_data(original, tmp_path, objective):
    """Order, retain partners and refusals: nothing else of these runs is random."""
    weights = []
    for number, (seed, data_seed) in enumerate([(0, 5), (1, 5), (0, 6)]):
        out = tmp_path / str(number)
        given = dict(objective=objective, retain_term="nll", max_steps=1, seed=seed, data_seed=data_seed)
        assert cli.main(["unlearn", *flags(original, out, **given)]) == 0
        weights.append(torch.cat([one.flatten() for one in load_file(out / "model.safetensors").values()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_teaching_then_measuring(original, tmp_path, capsys):
    taught = tmp_path / "taught"
    teach = {"objective": "NLL", "retain_term": "nll", "max_steps": 20, "learning_rate": 1e-2}
    assert cli.main(["unlearn", *flags(original, taught, record_every=0, **teach)]) == 0
    assert recorded_steps(taught) == []
    data = ["--data", "jsonl", "--data_path", str(original), "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    objectives = ["--objectives", "GA", "WGA:alpha=0.5", "NPO", "DPO", "PO"]
    risks = []
    for name, model in (("before", original), ("after", taught)):
        capsys.readouterr()
        out = tmp_path / name
        command = ["geffect", "--model", str(model), *data, *objectives, "--output_dir", str(out), "--device", "cpu"]
        assert cli.main(command) == 0
        assert "G-effect of WGA(alpha=0.5)" in capsys.readouterr().out
        written = json.loads((out / "geffect.json").read_text())
        risks.append(written["risk"]["unlearn"])
        assert len(written["effects"]) == 5
        frame = read_records(out)
        totals = frame[(frame["quantity"] == "g_effect") & (frame["group"] == "total") & (frame["side"] == "unlearn")]
        ga = totals.set_index("objective")["value"]["GA()"]
        norm = frame[(frame["quantity"] == "risk_norm") & (frame["group"] == "total") & (frame["objective"] == "GA()")]
        assert ga == pytest.approx(-(norm.set_index("side")["value"]["unlearn"] ** 2), rel=1e-5)
    assert risks[1] < risks[0]
    # NPO against the original: a reference other than the model itself changes its weights.
    command = ["geffect", "--model", str(taught), "--reference_model", str(original), *data, "--objectives", "NPO"]
    assert cli.main([*command, "--output_dir", str(tmp_path / "third")]) == 0
    compared = json.loads((tmp_path / "third" / "geffect.json").read_text())["effects"][0]["unlearn"]
    assert compared != written["effects"][2]["unlearn"]
    again = ["geffect", "--model", str(taught), *data, "--output_dir", str(tmp_path / "third"), "--objectives"]
    fails(capsys, "holds measurements of step 0 with a different reference model", *again, "NPO")
    assert cli.main([*again, "GA"]) == 0
    refusals = tmp_path / "refusals.txt"
    for lines in ("I do not know.", "No idea."):
        refusals.write_text(lines)
        refused = ["geffect", "--model", str(taught), *data, "--refusals", str(refusals), "--objectives", "PO"]
        refused += ["--output_dir", str(tmp_path / "refused")]
        if lines == "No idea.":
            fails(capsys, "holds measurements of step 0 with a different set for PO", *refused)
            fails(capsys, "--refusals has no use with GA()", *refused[:-3], "GA", *refused[-2:])
        else:
            assert cli.main(refused) == 0
    # a step's measurements are of one model
    command = ["geffect", "--model", str(taught), *data, "--output_dir", str(tmp_path / "before")]
    fails(capsys, f"holds measurements of step 0 of another model ({original})", *command)
    assert cli.main([*command, "--step", "20"]) == 0 and cli.main([*command, "--step", "20"]) == 0
    # RR of a model that is its own original has no gradient; a cache holds one layer, and pairs have one of their own
    command = ["geffect", "--model", str(original), *data, "--reference_cache", str(tmp_path / "cache"), "--objectives"]
    fails(capsys, "RR of the layers 0, 1: give one layer at a time", *command, "RR:layer=1", "RR:layer=0")
    for _ in range(2):  # the second time from the files
        assert cli.main([*command, "NPO", "DPO"]) == 0


def test_effects_of_answers_and_tokens(original, tmp_path, capsys):
    from gfast.geffect import Effect, SampleEffect, TokenEffect
    from gfast.training.records import effect_file, token_texts_file

    data = ["--data", "jsonl", "--data_path", str(original), "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    out = tmp_path / "effects"
    command = ["geffect", "--model", str(original), *data, "--objectives", "NPO", "WGA", "--device", "cpu"]
    assert cli.main([*command, "--output_dir", str(out), "--norms", "true"]) == 0
    assert "cos ret." in capsys.readouterr().out
    whole = json.loads((out / "geffect.json").read_text())["effects"]
    for per, kind in (("sample", SampleEffect), ("token", TokenEffect)):
        assert cli.main([*command, "--per", per, "--step", "3", "--output_dir", str(out)]) == 0
        assert "10/50/90 %" in capsys.readouterr().out
        assert type(Effect.from_parquet(effect_file(out, per, 3))) is kind
    tokens = Effect.from_parquet(effect_file(out, "token", 3))
    for effect in json.loads((out / "geffect.json").read_text())["effects"]:  # of the tokens, by objective
        same = next(one for one in whole if one["objective"] == effect["objective"])
        assert effect["retain"] == pytest.approx(same["retain"], rel=1e-4, abs=1e-6)
    texts = read_json(token_texts_file(out))["samples"]
    assert [len(text["pieces"]) for text in texts] == [len(one) for one in tokens.logp]
    assert cli.main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Answers: weight and effect" in page and "spends its damage" in page
    own = ["geffect", "--model", str(original), *data, "--objectives", "DPO", "--per", "token"]
    fails(capsys, "DPO and PO have data of their own", *own)
    fails(capsys, "choose objective, sample or token", *command, "--per", "word")
    fails(capsys, "engine has no meaning with per sample", *command, "--per", "sample", "--engine", "gram")
    fails(capsys, "engine is 'grams'; choose auto, stream", "geffect", "--model", "none", "--engine", "grams")
    alone = tmp_path / "alone"  # the effects of answers alone make a report too
    assert cli.main([*command, "--per", "sample", "--output_dir", str(alone)]) == 0
    assert cli.main(["report", str(alone), "--out", str(tmp_path / "second")]) == 0
    assert "Answers: weight and effect" in (tmp_path / "second" / "report.html").read_text()


def test_errors_are_one_line_that_says_what_to_do(original, tmp_path, capsys):
    out = tmp_path / "run"
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "lacking.jsonl").write_text('{"question": "Who?"}\n')
    (tmp_path / "file").write_text("")
    for words, options in (
        ("no model given", {"model": None}),
        ("cannot load the model", {"model": tmp_path / "nowhere"}),
        ("no objective is called", {"objective": "GAA"}),
        ("has no parameter beta", {"objective_args": ["beta=1"]}),
        ("alpha is given twice", {"objective": "WGA:alpha=1", "objective_args": ["alpha=0.5"]}),
        ("should read name=number", {"objective": "WGA:alpha"}),
        ("RMU needs a value for layer", {"objective": "RMU"}),
        ("use RMU", {"retain_term": "rr"}),
        ("does not exist", {"forget": "none.jsonl"}),
        ('field "answer" is missing', {"data_path": tmp_path, "forget": "lacking.jsonl"}),
        ("is a file; give a folder", {"output_dir": tmp_path / "file"}),
        ("not a complete checkpoint", {"resume_from_checkpoint": tmp_path}),
        ("invalid choice", {"data": "csv"}),
        ("there is no flag --learning_rat; did you mean --learning_rate?", {"learning_rat": 1}),
    ):  # fmt: skip
        fails(capsys, words, "unlearn", *flags(original, out, **options))
        assert not (out / "run.json").exists(), words
    empty = {"data_path": None, "forget": tmp_path / "empty.jsonl", "retain": original / "retain.jsonl"}
    fails(capsys, "empty", "unlearn", *flags(original, out, **empty))
    fails(capsys, "holds no records", "report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "page"))
    assert cli.main(["dance"]) == 2


def test_a_folder_that_cannot_be_written(original, capsys):
    fails(capsys, "cannot write to the folder /proc/run", "unlearn", *flags(original, "/proc/run"))


def test_a_reference_of_another_model_is_refused(original, tmp_path, capsys):
    cache = tmp_path / "cache"
    settings = {"objective": "NPO", "reference_cache": cache, "max_steps": 1}
    assert cli.main(["unlearn", *flags(original, tmp_path / "first", **settings)]) == 0
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    TOKENIZER.save_pretrained(other)
    fails(capsys, "for another model", "unlearn", *flags(original, tmp_path / "b", **settings | {"model": other}))
    fails(capsys, "for other data", "unlearn", *flags(original, tmp_path / "c", **settings, max_forget=3))


SORTED = (
    {"train_sampling_strategy": "group_by_length"}
    if hasattr(UnlearnConfig, "train_sampling_strategy")
    else {"group_by_length": True}
)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SORTED, "group_by_length"),
        ({"joint_forward": True, "own_loss_terms": True}, "joint_forward has no use here"),
        ({"joint_forward": True, "geffect_live": True}, "joint_forward has no use here"),
        ({"weights": "retain_conflict", "weights_tau": -1.0}, "weights_tau -1"),
        ({"geffect_live": True, "alpha": 0.0}, "gamma or alpha is 0"),
        ({"geffect_live_unlearn": True, "objective": "DPO"}, "leave geffect_live_unlearn out"),
    ],
    ids=str,
)
def test_what_the_trainer_refuses_is_said_before_any_work(original, tmp_path, capsys, monkeypatch, options, words):
    """Before the model is loaded and the reference of all of the data is computed."""
    from gfast.commands import shards

    monkeypatch.setattr(shards, "load_model", lambda *_: pytest.fail("the model was loaded"))
    given = {"objective": "NPO", "retain_term": "nll", "max_steps": 1} | options
    fails(capsys, words, "unlearn", *flags(original, tmp_path / "run", **given))
    assert not (tmp_path / "run" / "run.json").exists()


def test_debug_shows_the_traceback(original, tmp_path):
    with pytest.raises(ValueError, match="no objective is called"):
        cli.main(["--debug", "unlearn", *flags(original, tmp_path / "run", objective="GAA")])


def test_bench_runs_or_says_where_the_benchmarks_are(tmp_path, capsys, monkeypatch):
    import gfast

    bench = tmp_path / "bench"
    bench.mkdir()
    (tmp_path / "gfast").mkdir()
    (bench / "run.py").write_text("import sys\nsys.exit(0 if sys.argv[1:] == ['--help'] else len(sys.argv) + 5)\n")
    monkeypatch.setattr(gfast, "__file__", str(tmp_path / "gfast" / "__init__.py"))
    assert cli.main(["bench"]) == 0
    assert cli.main(["bench", "losses", "--rows", "3"]) == 9
    monkeypatch.setattr(gfast, "__file__", str(tmp_path / "elsewhere" / "gfast" / "__init__.py"))
    fails(capsys, "source repository", "bench")


def test_one_of_several_processes_ends_at_once():
    """What was registered for the end runs and what was said is there, but threads see no Python taken down."""
    code = """
import atexit, sys
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from gfast import cli, metrics
torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
atexit.register(print, "registered")
sys.argv[1:] = ["no-such-command"]
cli.main()
print("taken down")
"""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.split() == ["registered"] and "no-such-command" in done.stderr


def test_a_run_that_diverged_says_so(original, tmp_path, capsys):
    """Without a measurement that would meet it; Trainer's log leaves losses of NaN out of its mean."""
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(original, model)
    values = load_file(model / "model.safetensors")
    values["model.norm.weight"][0] = math.nan
    save_file(values, model / "model.safetensors", {"format": "pt"})
    assert cli.main(["unlearn", *flags(original, out, objective="GA", model=model)]) == 0
    assert "WARNING: the loss of the last step is nan: the run has diverged" in capsys.readouterr().err
    assert read_json(out / "result.json")["train_loss"] is None
