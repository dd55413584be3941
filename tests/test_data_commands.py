"""Data on the command line: options of chat templates, dates that a resume keeps, and errors that name set and row."""

from __future__ import annotations

import copy
import datetime
import json
import shutil
import time
import types

import pytest

from gfast.data import demo_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from gfast import cli  # noqa: E402
from gfast.commands import common, geffect  # noqa: E402
from gfast.commands import unlearn as unlearning  # noqa: E402
from gfast.commands.arguments import DataArguments, parse_options  # noqa: E402
from gfast.commands.common import first_day  # noqa: E402
from gfast.training.records import read_run_info  # noqa: E402

TODAY = (
    "{% if day is not defined %}{% set day = strftime_now('%d %B %Y') %}{% endif %}Today: {{ day }}\n"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROWS = [{"question": f"Who is {name}?", "answer": f"{name} is nobody."} for name in ("Ana", "Ben", "Cem")]


@pytest.fixture
def folder(tmp_path):
    """A model with a template that writes the date, and two files of rows."""
    tokenizer = copy.deepcopy(demo_tokenizer())
    tokenizer.chat_template = TODAY
    save(tmp_path / "model", tokenizer, len(tokenizer))
    for name in ("f", "r"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


def save(path, tokenizer, rows: int) -> None:
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=rows, **size)).save_pretrained(path)
    tokenizer.save_pretrained(path)


def unlearn(folder, *more: str, out: str = "run") -> int:
    data = ["--data", "jsonl", "--data_path", str(folder), "--forget", "f.jsonl", "--retain", "r.jsonl"]
    training = ["--objective", "NPO", "--max_steps", "1", "--use_cpu", "true", "--output_dir", str(folder / out)]
    return cli.main(["unlearn", "--model", str(folder / "model"), *data, *training, *more])


def on(monkeypatch, day: str) -> None:
    """The commands' own clock: the whole process's would reach the libraries' too."""
    clock = types.SimpleNamespace(
        perf_counter=time.perf_counter, strftime=datetime.datetime.fromisoformat(day).strftime
    )
    for module in (common, geffect, unlearning):
        monkeypatch.setattr(module, "time", clock, raising=module is common)


def test_a_run_keeps_the_date_of_its_first_start(folder, monkeypatch, capsys):
    on(monkeypatch, "2026-03-01T23:59")
    assert unlearn(folder) == 0
    assert "a date: it is 2026-03-01. --chat_kwargs strftime_now=2026-03-01" in capsys.readouterr().err
    (folder / "run" / "result.json").unlink()  # as if it had been killed
    shutil.rmtree(folder / "run" / "checkpoint-1", ignore_errors=True)
    on(monkeypatch, "2026-03-02T00:01")
    assert unlearn(folder) == 0, "its original values, of the day before, are those of the same data"
    assert "it is 2026-03-01." in capsys.readouterr().err
    assert unlearn(folder, out="other") == 0
    assert "it is 2026-03-02." in capsys.readouterr().err
    (folder / "run" / "result.json").unlink()
    assert unlearn(folder, "--chat_kwargs", "strftime_now=2026-03-02") == 2
    assert "chat_kwargs is None there and {'strftime_now': '2026-03-02'} here" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["strftime_now=2026-03-01", '{"day": "26 Jul 2024"}', "day=26 Jul 2024"])
def test_a_given_date_is_the_same_on_every_day(option, folder, monkeypatch, capsys):
    for day in ("2026-03-01", "2026-03-02"):
        on(monkeypatch, day)
        cache = ["--reference_cache", str(folder / "cache")]
        assert unlearn(folder, "--chat_kwargs", option, *cache, out=day) == 0
    config = json.loads((folder / "2026-03-02" / "run.json").read_text())["config"]
    assert config["chat_kwargs"] == parse_options([option])


def test_a_series_of_measurements_keeps_its_date(folder, monkeypatch, capsys):
    data = ["--data", "jsonl", "--data_path", str(folder), "--forget", "f.jsonl", "--retain", "r.jsonl"]
    command = ["geffect", "--model", str(folder / "model"), *data, "--device", "cpu"]
    found = []
    for day, out in (("2026-03-01", "series"), ("2026-03-02", "series"), ("2026-03-02", "new")):
        on(monkeypatch, day)
        assert cli.main([*command, "--output_dir", str(folder / out)]) == 0
        found.append(capsys.readouterr())
    assert [
        f"it is {day}." in one.err for one, day in zip(found, ("2026-03-01", "2026-03-01", "2026-03-02"), strict=True)
    ] == [True] * 3
    assert found[0].out == found[1].out != found[2].out
    assert "forget rows are in the retain set too, the first as its row 1: 'Who is Ana?'" in found[0].err


def test_first_day(tmp_path):
    info = {"created": "2026-03-02T00:01:00+0100"}
    assert first_day(None, info) == first_day(tmp_path, info) == "2026-03-02"
    (tmp_path / "run.json").write_text('{"created": "2026-03-01T00:01:00+0100"}')
    assert first_day(tmp_path, info) == "2026-03-01"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, {}),
        ([], {}),
        (["a=1", "b=x=y", "c="], {"a": 1, "b": "x=y", "c": ""}),
        (["a=True", "b=false", "c=None", "d=null"], {"a": True, "b": False, "c": None, "d": None}),
        (["a=1.10", "b=1e5", "c=007", "d=26 Jul 2024", "e=2026-03-01"],
         {"a": "1.10", "b": "1e5", "c": "007", "d": "26 Jul 2024", "e": "2026-03-01"}),
        (['a="1"', "b=[1, 2]", 'c={"d": 1}'], {"a": "1", "b": [1, 2], "c": {"d": 1}}),
        (['{"a": true, "b": "x"}', "c=2"], {"a": True, "b": "x", "c": 2}),
        ('{"a": 1}', {"a": 1}),
        ("a=1", {"a": 1}),
        ({"a": datetime.date(2026, 3, 1), "b": False}, {"a": "2026-03-01", "b": False}),
    ],
)  # fmt: skip
def test_options_in_words_in_json_and_as_a_mapping(given, found):
    assert parse_options(given) == found
    assert DataArguments(chat_kwargs=given).chat_kwargs == found
    assert DataArguments(chat_kwargs=given).settings().get("chat_kwargs", {}) == found


@pytest.mark.parametrize("given", [["thinking"], ["=1"], ["a-b=1"], ["{nope}"], ["[1]"]])
def test_options_that_cannot_be_read(given):
    with pytest.raises(ValueError, match="chat_kwargs .*(name=value|not valid JSON)"):
        parse_options(given)


def test_options_from_yaml(folder, capsys):
    (folder / "run.yaml").write_text("chat_kwargs:\n  strftime_now: 2026-03-01\n")
    assert unlearn(folder, "--config", str(folder / "run.yaml")) == 0
    config = json.loads((folder / "run" / "run.json").read_text())["config"]
    assert config["chat_kwargs"] == {"strftime_now": "2026-03-01"}
    assert unlearn(folder, "--template", "plain", "--chat_kwargs", "day=1", out="plain") == 2
    assert "are options of a chat template" in capsys.readouterr().err


def test_examples_of_options_run():
    import doctest

    from gfast.commands import arguments

    result = doctest.testmod(arguments)
    assert result.attempted > 0 and result.failed == 0


def test_sides_keep_no_model(folder):
    import gc
    import weakref

    from gfast.commands.common import Rows, Sides

    sides = Sides(Rows(ROWS, ROWS), demo_tokenizer(), DataArguments(data="bundled"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    sides.fit(model)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None, "the original model and the measured one are never in memory together"


def test_settings_without_options_are_those_of_older_runs():
    assert "chat_kwargs" not in DataArguments().settings() and "template" in DataArguments().settings()


def test_the_retain_set_is_what_is_left_without_the_forget_set():
    """TOFU's forget10 beside retain99, whatever is forgotten, had 360 of its 400 rows retained."""
    for forget, retain in (("forget01", "retain99"), ("forget05", "retain95"), ("forget10", "retain90")):
        assert DataArguments(forget=forget).retain == DataArguments(forget=f"{forget}_perturbed").retain == retain
    assert DataArguments().retain == "retain99" and DataArguments(forget="forget10", retain="mine").retain == "mine"


def test_a_run_names_the_sets_that_it_has(folder, capsys):
    """Runs of bundled data, and of lines without a retain set, said that theirs were TOFU's."""
    forget = ["--data", "jsonl", "--data_path", str(folder), "--forget", "f.jsonl"]
    few = ["--max_forget", "1", "--max_retain", "1"]
    for data, named in ((["--data", "bundled", *few], "bundled"), (forget, "jsonl: f.jsonl")):
        out = folder / named[0]
        words = ["--model", str(folder / "model"), *data, "--output_dir", str(out), "--objective", "GA"]
        assert cli.main(["unlearn", *words, "--max_steps", "1", "--use_cpu", "--save_strategy", "no"]) == 0
        assert read_run_info(out)["data"] == named
    capsys.readouterr()
    for command in (["geffect"], ["unlearn", "--retain_term", "nll", "--output_dir", str(folder / "none")]):
        assert cli.main([*command, "--model", str(folder / "model"), *forget]) == 2
        assert "no retain set given" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [("forget", "forget10"), ("retain", "retain90"), ("data_path", "tofu")])
def test_what_bundled_data_have_no_use_for(name, value):
    with pytest.raises(ValueError, match=f"--{name} has no use with the data bundled"):
        DataArguments(data="bundled", **{name: value})


def test_errors_name_set_file_and_row(folder, capsys):
    for name, rows, message in (
        (
            "f",
            [ROWS[0], {"question": "word " * 600, "answer": "a"}],
            r"the forget set (f.jsonl): row 2: the prompt alone",
        ),
        (
            "r",
            [ROWS[0], {"question": "a", "answer": "b <eos>"}],
            "the retain set (r.jsonl): the answer contains '<eos>'",
        ),
        ("f", [{"question": "a", "answer": "\ud800"}], "f.jsonl, row 1: field"),
    ):
        file = folder / f"{name}.jsonl"
        before = file.read_text()
        file.write_text("\n".join(map(json.dumps, rows)))
        assert unlearn(folder, "--retain_term", "nll") == 2
        assert message in capsys.readouterr().err
        file.write_text(before)


@pytest.mark.parametrize("objective", ["NPO", "DPO"])
def test_ids_beyond_the_model_stop_the_commands_before_a_pass(objective, folder, capsys):
    tokenizer = copy.deepcopy(demo_tokenizer())
    tokenizer.add_tokens(["<author>"])
    (folder / "no.txt").write_text("I do not know <author>.")
    for side, text in (("forget", "f.jsonl"), ("retain", "r.jsonl")):
        marked = [ROWS[0], {"question": "Is <author> real?", "answer": "No."}]
        (folder / "marked.jsonl").write_text("\n".join(map(json.dumps, marked)))
        for rows, code in ((len(tokenizer) - 1, 2), (len(tokenizer) + 7, 0)):
            save(folder / "model", tokenizer, rows)
            more = ["--objective", objective, "--retain_term", "nll", f"--{side}", "marked.jsonl"]
            assert unlearn(folder, *more, out=f"{side}{rows}") == code, text
            if code:
                err = capsys.readouterr().err
                assert f"the {side} set, row 2: the token '<author>'" in err and "resize_token_embeddings" in err
    save(folder / "model", tokenizer, len(tokenizer) - 1)
    assert unlearn(folder, "--objective", "PO", "--refusals", str(folder / "no.txt"), out="po") == 2
    assert "the forget set with refusals, row 1: the token '<author>'" in capsys.readouterr().err
