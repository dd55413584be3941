"""The command line on poor terminals and for people who mistype: no text that cannot be printed, one line an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers.cli import fails, flags
from helpers.training_tiny import FORGET_ROWS, RETAIN_ROWS, TOKENIZER, tiny_model

from gfast import cli
from gfast.files import read_json, readable, write_json
from gfast.report.runs import load_runs
from gfast.training.records import read_records
from gfast.words import did_you_mean

# Several commands in one process, which is slow to start. Its output is read as bytes, as a terminal would.
CALL = "import sys, json; from gfast.cli import main; codes = [main(a) for a in json.loads(sys.argv[1])]; print(codes)"
POOR = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model, and rows whose files, questions and answers are not ASCII."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    for name, rows in (("vergiß", FORGET_ROWS), ("behalte", RETAIN_ROWS)):
        rows = [
            {"question": row["question"] + " – ¿où? 誰", "answer": row["answer"] + " …naïve 東京 😀"} for row in rows
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "läuft.yaml").write_text("# Größe\nweight_decay: 1e-3\nrun_name: größe\n", encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(POOR))
def test_any_text_can_be_shown_on_any_terminal(wide, tmp_path, kind):
    # With an ASCII file system the Rust libraries that write a model take no other path.
    name = "lauf" if kind == "C" else "lauf-ü"
    run, effects = tmp_path / "a" / name, tmp_path / "b" / name
    own = {"data_path": wide, "forget": "vergiß.jsonl", "retain": "behalte.jsonl"}
    measure = ["geffect", "--model", str(wide), "--data", "jsonl", "--device", "cpu", "--objectives", "GA"]
    for flag, value in own.items():
        measure += [f"--{flag}", str(value)]
    settings = {**own, "geffect_every": 1, "max_steps": 1, "disable_tqdm": None, "config": wide / "läuft.yaml"}
    calls = [
        ["unlearn", *flags(wide, run, **settings)],
        [*measure, "--output_dir", str(effects), "--per", "token"],
        ["report", str(run), str(effects), "--out", str(tmp_path / "bericht-ß"), "--title", "Größe 大"],
        ["doctor"],
    ]
    calls.append(["unlearn", *flags(wide, run, **settings | {"forget": "niemand-é.jsonl"})])
    terminal = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    terminal |= {"PYTHONPATH": os.environ.get("PYTHONPATH", "")} | POOR[kind]

    def closed():
        os.close(0)

    call = [sys.executable, "-c", CALL, json.dumps(calls, ensure_ascii=False)]
    done = subprocess.run(call, env=terminal, capture_output=True, preexec_fn=closed, check=False)
    said = done.stdout + done.stderr
    assert done.stdout.endswith(b"[0, 0, 0, 0, 2]\n"), said.decode("utf-8", "replace")[-2000:]
    assert b"UnicodeEncodeError" not in said and b"UnicodeDecodeError" not in said and b"Traceback" not in said
    if kind == "ascii":
        said.decode("ascii")
    assert set(read_records(run)["run"]) == {name}
    assert read_json(run / "run.json")["config"]["weight_decay"] == 1e-3
    page = (tmp_path / "bericht-ß" / "report.html").read_text(encoding="utf-8")
    assert "Größe 大" in page and f"a/{name}" in page and f"b/{name}" in page


def test_closed_streams_are_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["--version"]) == 0
    assert cli.main(["dance"]) == 2


def test_text_that_no_file_can_hold_becomes_escapes(tmp_path):
    value = {"argv": ["--output_dir", os.fsdecode(b"gr\xc3\xb6n-\xff"), "\ud800"]}
    assert read_json(write_json(tmp_path / "a.json", value)) == value
    assert readable("gr\udcc3\udcb6n-\udcff") == "grön-\\xff"
    readable("\ud800").encode()


MISTYPED = (
    (["unlaern"], "there is no command 'unlaern'; did you mean unlearn?"),
    (["xyz"], "The commands are demo, unlearn"),
    (["--verson"], "did you mean --version?"),
    (["report", "--ot", "page", "run"], "did you mean --out?"),
    (["report"], "required: RUN"),
    (["demo", "--step", "3"], "there is no flag --step; did you mean --steps?"),
    (["demo", "--steps", "many"], "invalid int value: 'many'"),
    (["bench", "--nam"], "there is no flag --nam"),
    (["doctor", "now"], "'now' belongs to no flag"),
    (["unlearn", "--modle", "x"], "there is no flag --modle; did you mean --model?"),
    (["unlearn", "--model", "x", "--per-device-train-batchsize=4"], "did you mean --per_device_train_batch_size?"),
    (["unlearn", "--model", "x", "--zzz"], "there is no flag --zzz ("),
    (["unlearn", "--model", "x", "stray"], "'stray' belongs to no flag"),
    (["unlearn", "--model"], "--model: expected one argument"),
    (["unlearn", "--config"], "--config: expected one argument"),
    (["unlearn", "--model", "x", "--bf16", "maybe"], "--bf16: Truthy value expected"),
    (["unlearn", "--model", "x", "--max_steps", "1.5"], "invalid int value: '1.5'"),
    (["unlearn", "--model", "x", "--objective", "SimNOP"], "did you mean SimNPO?"),
    (["unlearn", "--model", "x", "--objective", "wnga"], "did you mean WGA?"),
    (["unlearn", "--model", "x", "--groups", "block"], "choose paper or layer"),
    (["unlearn", "--model", "x", "--accelerator_config", '{"a":'], "--accelerator_config: '{\"a\":' is not valid JSON"),
    (["unlearn", "--model", "x", "--torch_compile", "yes"], "torch_compile=True cannot be used"),
    (["unlearn", "--model", "x", "--lora_alpha", "32"], "give their rank with --lora_r"),
    (["unlearn", "--model", "x", "--lora_targets", "q_proj"], "give their rank with --lora_r"),
    (["unlearn", "--model", "x", "--lora_r", "2", "--lora_alpha", "0"], "with which adapters change nothing"),
    (["unlearn", "--model", "x", "--stop", "a", "--stop=b"], "--stop is given 2 times, and only the last would count"),
    (["geffect", "--model", "x", "--objectives", "GA", "--objectives", "WGA"], "--objectives is given 2 times"),
    (["audit", "run", "--beside", "a", "--beside", "b"], "give all of it behind one flag: --beside FIRST SECOND"),
    (["evaluate", "--model", "x", "--lora_r", "2"], "--lora_r has no use here"),
    (
        ["evaluate", "--data", "wmdp", "--hub_name", "a/b", "--data_path", "."],
        "--hub_name has no use beside --data_path",
    ),
    (["reproduce", "demo", "seeds=[0]", "seeds=[1]", "--plan"], "seeds is changed twice"),
    (["geffect", "--model", "x", "--objectives", "NP0"], "did you mean NPO?"),
    (["geffect", "--model", "x", "--objectives"], "expected at least one argument"),
    (["geffect", "--model", "x", "--step", "-1"], "give 0 or more"),
    (["geffect", "--model", "x", "--device", "cudaa"], "the device 'cudaa' cannot be used here"),
    (["geffect", "--model", "x", "--objective", "GA"], "did you mean --objectives?"),
)


@pytest.mark.parametrize("argv, words", MISTYPED, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_was_mistyped_is_said(capsys, argv, words):
    fails(capsys, words, *argv)
    cli.main(argv)
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and captured.out == ""


def test_a_name_that_a_file_gives_twice_is_said(tmp_path, capsys):
    once, twice = tmp_path / "once.yaml", tmp_path / "twice.yaml"
    once.write_text("model: x\nmax_steps: 2\n")
    twice.write_text("model: x\nlearning_rate: 1e-5\nlearning_rate: 2e-5\n")
    fails(capsys, "learning_rate is given twice (line 3): leave one out", "unlearn", "--config", str(twice))
    fails(capsys, "--config is given 2 times", "unlearn", "--config", str(once), "--config", str(once))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seeds: [0]\ndata:\n  source: tofu\n  source: bundled\n")
    fails(capsys, "source is given twice (line 4)", "reproduce", str(recipe), "--plan")


@pytest.mark.parametrize(
    "option", ["eval_steps=3", "eval_strategy=steps", "do_eval=true", "do_predict=true", "eval_on_start=true"]
)
def test_evaluation_flags_have_no_use(original, tmp_path, capsys, option):
    name, _, value = option.partition("=")
    fails(capsys, f"--{name} has no use here", "unlearn", *flags(original, tmp_path / "run", **{name: value}))
    assert not (tmp_path / "run").exists()


YAML = (
    ("learning-rate: 1e-5", "there is no setting learning-rate; did you mean learning_rate?"),
    ("objectve: GA", "did you mean objective?"),
    ("1: 2", "there is no setting 1"),
    ("learning_rate: [1e-5]", "learning_rate takes one value, and not the list ['1e-5']"),
    ("objective: {a: 1}", "objective takes one value, and not the mapping"),
    ("lora_targets: {a: 1}", "lora_targets takes a list, and not the mapping"),
    ("max_steps:", "max_steps has no value"),
    ("use_cpu: perhaps", "Truthy value expected"),
    ("retain_term: kll", "choose one of none, nll, kl, jsd, rr"),
)


@pytest.mark.parametrize("text, words", YAML, ids=lambda value: value.partition(":")[0])
def test_a_wrong_line_of_yaml_is_named(tmp_path, capsys, text, words):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    fails(capsys, words, "unlearn", "--config", str(tmp_path / "run.yaml"), "--model", "x")


def test_yaml_lists_mappings_and_byte_order_marks(tmp_path):
    from gfast.commands.arguments import CommandParser, DataArguments, ModelArguments
    from gfast.commands.geffect import GEffectArguments
    from gfast.training.config import UnlearnConfig

    def parsed(kind, text):
        path = tmp_path / "settings.yaml"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        return CommandParser([ModelArguments, DataArguments, kind], "gfast", "")._from_yaml(path)

    assert parsed(GEffectArguments, "objectives: GA WGA:alpha=0.5") == {"objectives": ["GA", "WGA:alpha=0.5"]}
    assert parsed(GEffectArguments, "objectives: [GA, NPO]\ntokenizer:") == {
        "objectives": ["GA", "NPO"],
        "tokenizer": None,
    }
    assert parsed(UnlearnConfig, "lr_scheduler_kwargs: {a: 1}") == {"lr_scheduler_kwargs": {"a": 1}}
    assert parsed(UnlearnConfig, "objective_args: {alpha: 1}") == {"objective_args": {"alpha": 1}}


def test_the_nearest_name_is_proposed():
    assert did_you_mean("--Learning-Rat", ["--learning_rate", "--seed"]) == "; did you mean --learning_rate?"
    assert did_you_mean("qqq", ["learning_rate"]) == "" and did_you_mean("", []) == ""


def test_runs_of_one_folder_name_are_named_apart(tmp_path, monkeypatch):
    from helpers.report_runs import GA_COURSE, MIX_COURSE, write_run

    from gfast.report import build_report

    monkeypatch.setattr("gfast.report.html.drawings", lambda runs: [])  # what is asked stands in the text
    names = ["seed0/out/run", "seed1/out/run", "seed1/npo", "other/seed1/out/run"]
    courses = [GA_COURSE, MIX_COURSE, MIX_COURSE, GA_COURSE]
    folders = [write_run(tmp_path / name, "GA()", course) for name, course in zip(names, courses, strict=True)]
    labels = [run.label for run in load_runs(folders)]
    top = tmp_path.name
    expected = ["seed0/out/run", f"{top}/seed1/out/run", "npo", "other/seed1/out/run"]
    assert labels == [f"GA · {name}" for name in expected]
    page = build_report(folders, tmp_path / "page").read_text(encoding="utf-8")
    table = json.loads((tmp_path / "page" / "table.json").read_text(encoding="utf-8"))
    assert [row["label"] for row in table] == labels and [row["run"] for row in table] == expected
    assert all(page.count(label) >= 3 for label in labels)
    alone = [
        write_run(tmp_path / "x" / "run", "GA()", GA_COURSE),
        write_run(tmp_path / "y" / "run", "NLL()", GA_COURSE),
    ]
    assert [run.label for run in load_runs(alone)] == ["GA", "NLL"]
    assert [run.name for run in load_runs(alone)] == ["x/run", "y/run"]
