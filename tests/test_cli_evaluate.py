"""`gfast evaluate` end to end: files, retain logs, kills, refusals, and data of every source from local folders."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
import torch
from helpers.training_tiny import TOKENIZER, saved_tiny, tiny_model

from gfast import cli, metrics
from gfast.data import bundled_perturbed
from gfast.evaluation import sources
from gfast.files import files_like, read_json


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=256)


def flags(model, out, **options):
    chosen = {"model": model, "ds_size": 4, "max_new_tokens": 5, "device": "cpu", "output_dir": out, **options}
    words = ["evaluate"]
    for name, value in chosen.items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def fails(capsys, message, words):
    capsys.readouterr()
    assert cli.main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("gfast: error: ") and message in said, said


def test_bundled_data_and_a_log_as_the_retain_log_of_another(model, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(flags(model, first, extraction=["exact"], extraction_samples=2)) == 0
    out = capsys.readouterr().out
    assert "| forget | 4 |" in out and "Forget quality" not in out
    assert {path.name for path in first.iterdir()} >= {
        "log.json", "samples.parquet", "summary.json", "table.md", "evaluation.html", "run.json"
    }  # fmt: skip
    assert cli.main(flags(model, second, ds_size=None, retain_log=first)) == 0
    said = capsys.readouterr()
    assert "Forget quality against" in said.out and "first 4 rows" in said.err
    summary = read_json(second / "summary.json")
    assert summary["forget_quality"]["geometric"] == {"pvalue": 1, "statistic": 0, "log10_p": 0}
    log, summary = metrics.load_log(second), read_json(second / "summary.json")["sets"]["forget"]
    assert metrics.probability(log)["forget"] == summary["probability"]
    assert metrics.truth_ratio(log)["forget"] == summary["truth_ratio"]
    page = (second / "evaluation.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and page.count("data:image/svg") == 4
    assert re.search(r"max_new_tokens\W.*?forget.*?\b5\b", page, re.S) and "template" in page  # both decide ROUGE
    import pandas

    frame = pandas.read_parquet(second / "samples.parquet")
    assert len(frame) == 8 and frame["avg_gt_loss"].tolist() == [
        *log.sets["retain"].values["avg_gt_loss"], *log.sets["forget"].values["avg_gt_loss"]
    ]  # fmt: skip


def test_tofu_from_a_folder(model, tmp_path, capsys):
    folder = tmp_path / "tofu"
    folder.mkdir()
    forget, retain = bundled_perturbed()
    facts = [
        {"question": row["question"], "answer": "Paris", "perturbed_answer": ["Rome", "Bonn", "Oslo"]} for row in forget
    ]
    for name, rows in (("forget01_perturbed", forget), ("retain_perturbed", retain), ("holdout01", retain[-5:]),
                       ("real_authors_perturbed", facts[:3]), ("world_facts_perturbed", facts[:2])):  # fmt: skip
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = flags(model, tmp_path / "out", data="tofu", data_path=folder, forget="forget01", holdout="holdout01")
    assert cli.main(words) == 0
    assert "Model utility: " in capsys.readouterr().out
    log = metrics.load_log(tmp_path / "out")
    sizes = {"retain": 4, "forget": 4, "real_authors": 3, "world_facts": 2, "holdout": 5}
    assert {name: len(one) for name, one in log.sets.items()} == sizes
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["model_utility"]["geometric"] == metrics.model_utility(log)
    # the log says the same as the layout's other readers compute
    facts = log.sets["real_authors"].values
    assert (facts["avg_gt_loss"] == facts["avg_paraphrased_loss"]).all()
    p = metrics.option_probability(facts["avg_gt_loss"], facts["average_perturb_loss"], "tofu")
    assert facts["normalized_gt_loss"] == pytest.approx(-numpy.log(p))
    assert 0 <= summary["mia_auc"]["min_k"] <= 1
    assert summary["privleak"]["value"] == pytest.approx(metrics.privleak(summary["mia_auc"]["min_k"]))
    # with its log as the retain log every set has the rows that it has there, the larger and the smaller one
    words = flags(model, tmp_path / "all", data="tofu", data_path=folder, forget="forget01", ds_size=0)
    (folder / "forget01_perturbed.json").write_text("".join(json.dumps(row) + "\n" for row in forget[:3]))
    assert cli.main(words) == 0
    words = flags(model, tmp_path / "again", data="tofu", data_path=folder, forget="forget01", ds_size=None)
    assert cli.main([*words, "--retain_log", str(tmp_path / "all")]) == 0
    assert len(retain) > 3 and all(
        read_json(tmp_path / "again" / "summary.json")[key] == read_json(tmp_path / "all" / "summary.json")[key]
        for key in ("sets", "model_utility")
    )
    fails(
        capsys, "did you mean forget10", flags(model, tmp_path / "x", data="tofu", data_path=folder, forget="forget11")
    )
    fails(capsys, "forget10_perturbed", flags(model, tmp_path / "x", data="tofu", data_path=folder))


def test_ones_own_lines(model, tmp_path, capsys):
    forget, retain = bundled_perturbed()
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in forget[:3]))
    plain = [{"question": row["question"], "answer": row["answer"]} for row in retain[:3]]
    (tmp_path / "retain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    own = {"data": "jsonl", "data_path": tmp_path, "forget": "forget.jsonl", "retain": "retain.jsonl"}
    assert cli.main(flags(model, tmp_path / "out", **own)) == 0
    log = metrics.load_log(tmp_path / "out")
    assert "average_perturb_loss" not in log.sets["retain"].values and len(log.sets["forget"]) == 3
    with pytest.raises(ValueError, match="perturbed answers were not measured"):
        log.sets["retain"].column("average_perturb_loss", "the truth ratio")
    own |= {"forget": "retain.jsonl", "retain_log": tmp_path / "out"}
    fails(capsys, "the retain log has no use here", flags(model, tmp_path / "x", **own))
    assert not (tmp_path / "x" / "parts").exists()


def test_muse_from_a_folder(model, tmp_path, capsys):
    folder = tmp_path / "muse"
    qa = [{"question": row["question"], "answer": row["answer"]} for row in bundled_perturbed()[0][:4]]
    texts = [{"text": row["answer"]} for row in qa]
    parts = {
        "knowmem/forget_qa": qa, "knowmem/forget_qa_icl": qa[:1],
        "knowmem/retain_qa": qa, "knowmem/retain_qa_icl": qa[1:2],
        "verbmem/forget": [{"prompt": row["question"], "gt": row["answer"]} for row in qa],
        "privleak/forget": texts, "privleak/holdout": texts[::-1],
    }  # fmt: skip
    for name, rows in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(flags(model, tmp_path / "out", data="muse", data_path=folder)) == 0
    out = capsys.readouterr().out
    assert "PrivLeak: +0.00 %" in out and "| verbmem | 4 |" in out
    log = metrics.load_log(tmp_path / "out")
    f1 = [metrics.rouge_scores(t["ground_truth"], t["generation"])["rougeL_f1"] for t in log.sets["verbmem"].text]
    verbmem = read_json(tmp_path / "out" / "summary.json")["sets"]["verbmem"]
    assert verbmem["rougeL_f1"] == pytest.approx(sum(f1) / 4) and "| ROUGE-L F1 |" in out
    prompt = log.sets["knowmem_forget"].text[2]["prompt"]
    assert prompt.count("Question:") == 2 and prompt.endswith("Answer:") and qa[0]["answer"] in prompt
    # whole texts: every token but the first is scored
    count = len(TOKENIZER(texts[0]["text"]).input_ids) - 1
    assert log.sets["forget"].values["num_token_gt"][0] == count
    # its log is the retain log of another evaluation, for PrivLeak alone
    value = json.loads((tmp_path / "out" / "log.json").read_text())
    del value["gfast_checksum"]
    value["sets"]["holdout"]["min_k"] = [99.0, 99.0, 99.0, 0.0]
    (tmp_path / "retain.json").write_text(json.dumps(value))
    own = {"data": "muse", "data_path": folder, "retain_log": tmp_path / "retain.json"}
    assert cli.main(flags(model, tmp_path / "second", **own)) == 0
    reference = 0.75
    leak = {"value": pytest.approx(metrics.privleak(0.5, reference)), "auc_retain": reference}
    summary = read_json(tmp_path / "second" / "summary.json")
    assert summary["privleak"] == leak and "forget_quality" not in summary
    del value["sets"]["holdout"]["min_k"]
    (tmp_path / "retain.json").write_text(json.dumps(value))
    fails(capsys, "PrivLeak needs min_k of the set holdout", flags(model, tmp_path / "x", **own))
    fails(capsys, "cannot be compared: they are of 3 and 4 rows", flags(model, tmp_path / "x", **{**own, "ds_size": 3}))
    (folder / "knowmem/forget_qa_icl.jsonl").write_text(json.dumps(qa[3]) + "\n")
    fails(capsys, "the set knowmem_forget as token ids", flags(model, tmp_path / "out", data="muse", data_path=folder))
    (folder / "privleak.jsonl").write_text((folder / "privleak/forget.jsonl").read_text())  # no split of it
    (folder / "privleak/holdout.jsonl").unlink()
    fails(capsys, "privleak/holdout.jsonl", flags(model, tmp_path / "x", data="muse", data_path=folder))


def test_multiple_choice_from_a_folder(model, tmp_path, capsys):
    folder = tmp_path / "wmdp"
    folder.mkdir()
    rows = [
        {"question": f"Which is number {n}?", "choices": ["one", "two", "three", "four"], "answer": n} for n in range(4)
    ]
    (folder / "wmdp-bio_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = flags(model, tmp_path / "out", data="wmdp", data_path=folder, subsets=["wmdp-bio"])
    assert cli.main(words) == 0
    assert "| Accuracy |" in capsys.readouterr().out
    values = metrics.load_log(tmp_path / "out").sets["wmdp-bio"].values
    assert "extraction_strength" not in values  # of one token, which ends the answer
    # by hand: the letter after the prompt, from the model's own logits
    network = tiny_model(max_position_embeddings=256).eval()
    letters = [TOKENIZER(f" {letter}", add_special_tokens=False).input_ids for letter in "ABCD"]
    assert all(len(letter) == 1 for letter in letters)
    for number, row in enumerate(rows):
        lines = [f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True)]
        head = "The following are multiple choice questions (with answers) about biology.\n"
        prompt = "\n".join([head, row["question"], *lines, "Answer:"])
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([TOKENIZER(prompt).input_ids])).logits[0, -1]
        of_letters = logits[[letter[0] for letter in letters]]
        assert values["right_choice"][number] == int(of_letters.argmax() == row["answer"])
        assert values["gt_loss"][number] == pytest.approx(-float(logits.log_softmax(-1)[letters[number][0]]), rel=1e-4)
    rows[1]["answer"] = 4
    (folder / "wmdp-bio_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fails(
        capsys, "row 2: answer is 4", flags(model, tmp_path / "x", data="wmdp", data_path=folder, subsets=["wmdp-bio"])
    )


@pytest.mark.slow
def test_an_evaluation_that_is_killed_goes_on_to_the_same_log(model, tmp_path):
    command = [sys.executable, "-m", "gfast.cli", *flags(model, tmp_path / "killed", batch_size=1, ds_size=12)]
    assert cli.main(flags(model, tmp_path / "whole", batch_size=1, ds_size=12)) == 0
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    parts = tmp_path / "killed" / "parts"
    limit = time.monotonic() + 120
    while len(files_like(parts, "*.json")) < 3 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in files_like(parts, "*.json")}
    assert len(kept) >= 3 and not (tmp_path / "killed" / "log.json").exists()
    assert cli.main(command[3:]) == 0
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    for name in ("log.json", "samples.parquet", "table.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_folder_of_another_evaluation(model, tmp_path, capsys):
    assert cli.main(flags(model, tmp_path / "out", ds_size=1)) == 0
    fails(capsys, "ds_size is 1 there and 2 here", flags(model, tmp_path / "out", ds_size=2))
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    TOKENIZER.save_pretrained(other)
    fails(capsys, "weights is", flags(other, tmp_path / "out", ds_size=1))
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}" + (
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    words = flags(model, tmp_path / "out", ds_size=1, tokenizer=tmp_path / "chat")
    fails(capsys, "the set forget as token ids (tokenizer, template, questions in front) are not those", words)


def test_wrong_words(model, tmp_path, capsys, monkeypatch):
    log = Path(__file__).parent / "data" / "tofu_logs_excerpt.json"
    (tmp_path / "retain.json").write_text(json.dumps(json.loads(log.read_text())["retain90"]))
    for options, message in (
        ({"data": "tofoo"}, "data"),
        ({"extraction": ["perturb"]}, "choose from exact, similar, perturbed"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"retain": "retain.jsonl"}, "--retain has no use with the data bundled: it is for jsonl"),
        ({"forget": "forget05"}, "--forget has no use with the data bundled"),
        ({"relearn_learning_rate": 1e-3}, "--relearn_learning_rate says how to relearn"),
        ({"extraction_samples": 3}, "--extraction_samples says how many"),
        ({"relearn_rows": 3}, "--relearn STEPS"),
        ({"retain_log": tmp_path / "absent.json"}, "is no file; give the log"),
        ({"retain_log": log}, "no evaluation log"),
        ({"retain_log": tmp_path / "retain.json"}, "cannot be compared"),
        ({"retain_log": tmp_path / "retain.json", "ds_size": None}, "other rows than the first 6"),
        ({"max_length": 20}, "tokens, more than 20"),
        ({"data": "wmdp", "data_path": tmp_path}, "no file for wmdp-bio test"),
        ({"data": "muse", "template": "chat"}, "--template has no use with the data muse"),
        ({"data": "muse", "chat_kwargs": ["a=1"]}, "--chat_kwargs has no use with the data muse"),
        ({"device": "cuda:99"}, "cannot be used"),
    ):
        fails(capsys, message, flags(model, tmp_path / "x", **options))
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "rouge_score.rouge_scorer", None)
        fails(capsys, "pip install 'gfast[evaluate]'", flags(model, tmp_path / "x"))
    fails(capsys, "did you mean --retain_log", ["evaluate", "--retain_logs", "x"])
    short = tmp_path / "short"
    tiny_model(max_position_embeddings=16).save_pretrained(short)
    TOKENIZER.save_pretrained(short)
    fails(capsys, "the model takes 16", flags(short, tmp_path / "x"))
    assert not (tmp_path / "x" / "log.json").exists()


def test_parts_of_a_file_are_all_read(tmp_path):
    (tmp_path / "all").mkdir()
    for part in range(2):
        rows = [{"question": f"Which {part} {n}?", "choices": ["a", "b"], "answer": 0} for n in range(3)]
        path = tmp_path / "all" / f"test-0000{part}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    asked = sources.choices("mmlu", "cais/mmlu", "all", tmp_path, TOKENIZER).rows
    assert len(asked) == 6 and "Which 1 2?" in asked[5]["question"]
    path.unlink()
    with pytest.raises(FileNotFoundError, match="one of 00002 files of all test, and 1 of them"):
        sources.choices("mmlu", "cais/mmlu", "all", tmp_path, TOKENIZER)


@pytest.mark.slow  # a model is taught: half a minute
def test_without_a_model_a_small_one_is_taught(tmp_path, capsys):
    words = flags(None, tmp_path / "out", ds_size=6, max_new_tokens=None)
    assert cli.main(words) == 0
    taught = read_json(tmp_path / "out" / "summary.json")["sets"]
    assert all(one["probability"] > 0.6 and one["extraction_strength"] > 0.4 for one in taught.values())
    assert "is taught" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert "is taught" not in capsys.readouterr().err
