"""Logs that are none, are damaged, or cannot be compared: each refused by a message that says where."""

from __future__ import annotations

import copy
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from gfast import metrics
from gfast.files import write_json

RAW = json.loads((Path(__file__).parent / "data" / "tofu_logs_excerpt.json").read_text())


def changed(action) -> dict:
    value = copy.deepcopy(RAW["full"])
    action(value["sets"])
    return value


DAMAGE = {
    "a NaN": (
        lambda sets: sets["forget"]["avg_gt_loss"].__setitem__(2, float("nan")),
        "forget: avg_gt_loss of index 17",
    ),
    "an infinite loss": (
        lambda sets: sets["retain"]["average_perturb_loss"][0].__setitem__(1, float("inf")),
        "retain: average_perturb_loss of index 0 is inf",
    ),
    "a missing value": (
        lambda sets: sets["forget"]["rougeL_recall"].__setitem__(0, None),
        "is None, which is no number",
    ),
    "a text": (lambda sets: sets["forget"]["rougeL_recall"].__setitem__(0, "1.0"), "no number"),
    "a truth": (lambda sets: sets["forget"]["rougeL_recall"].__setitem__(0, True), "no number"),
    "a negative loss": (lambda sets: sets["forget"]["avg_gt_loss"].__setitem__(0, -1.0), "cannot be below 0"),
    "an integer that no float holds": (
        lambda sets: sets["forget"]["perturb_loss"][0].__setitem__(0, 10**400),
        "perturb_loss of index 0 is 1000",
    ),
    "a recall in percent": (lambda sets: sets["retain"]["rougeL_recall"].__setitem__(1, 98.5), "at most 1"),
    "a short list": (lambda sets: sets["forget"]["avg_gt_loss"].pop(), "has 5 values for 6 rows"),
    "a row twice": (lambda sets: sets["forget"]["index"].__setitem__(1, 0), "index 0 is there twice"),
    "a row by name": (lambda sets: sets["forget"]["index"].__setitem__(1, "3"), "integer"),
    "no rows": (lambda sets: sets["forget"].__setitem__("index", []), "index should list"),
    "no index": (lambda sets: sets["forget"].pop("index"), "index should list"),
    "a perturbed answer less": (
        lambda sets: sets["forget"]["average_perturb_loss"][3].pop(),
        "index 54 has 4 perturbed",
    ),
    "no perturbed answers of a row": (
        lambda sets: sets["forget"]["average_perturb_loss"].__setitem__(3, []),
        "index 54 has no perturbed answers",
    ),
    "no perturbed answers": (
        lambda sets: sets["forget"].pop("average_perturb_loss"),
        r"no average_perturb_loss \(the perturbed answers\)",
    ),
    "no ROUGE": (lambda sets: sets["world_facts"].pop("rougeL_recall"), "world_facts: there is no rougeL_recall"),
    "losses of other answers": (
        lambda sets: sets["forget"]["avg_gt_loss"].reverse(),
        "avg_gt_loss is .* but gt_loss / num_token_gt is",
    ),
    "no tokens": (lambda sets: sets["forget"]["num_token_gt"].__setitem__(0, 0), "at least one token"),
    "a set that is a list": (lambda sets: sets.__setitem__("forget", [1, 2]), "should map fields to lists"),
    "text of another row": (lambda sets: sets["forget"]["text"][0].__setitem__("index", 9999), "no index of a row"),
    "text of no row": (lambda sets: sets["forget"]["text"][0].__setitem__("index", [0]), "no index of a row"),
    "text that is a list": (lambda sets: sets["forget"]["text"].__setitem__(0, []), "no index of a row"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_logs(tmp_path, what):
    action, message = DAMAGE[what]
    (tmp_path / "log.json").write_text(json.dumps(changed(action)))
    with pytest.raises(ValueError, match=message) as found:
        metrics.load_log(tmp_path / "log.json")
    assert str(tmp_path) in str(found.value)


@pytest.mark.parametrize("content, message", [
    (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"[1, 2]", "holds a list"), (b"null", "NoneType"),
    (b"{}", "it has nothing"), (b'{"loss": [1.0]}', "it has 'loss'"), (b'{"sets": {}}', "it has 'sets'"),
    (b'{"eval_log_forget.json": {"avg_gt_loss": [1]}}', "map fields to"),
    (b'{"eval_log_forget.json": {"avg_gt_loss": {"0": 1.0}, "gt_loss": {"1": 1.0}}}', "differ in index"),
    (b'{"eval_log_forget.json": {"avg_gt_loss": {"first": 1.0}}}', "no row number"),
    (b"\x1f\x8b\x08 but no gzip", "gzipped JSON"), (gzip.compress(b"{", mtime=0), "gzipped JSON"),
    (b"PAR1\x80\x81", "not valid JSON"),
], ids=lambda value: value[:24].hex() if isinstance(value, bytes) else None)  # fmt: skip
def test_files_that_are_no_logs(tmp_path, content, message):
    path = tmp_path / "log.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        metrics.load_log(path)


def test_no_file(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(FileNotFoundError, match="give the log"):
            metrics.load_log(path)


def test_a_log_that_was_edited(tmp_path):
    write_json(tmp_path / "log.json", RAW["full"])
    assert metrics.load_log(tmp_path).run == RAW["full"]["run"]
    text = (tmp_path / "log.json").read_text()
    (tmp_path / "log.json").write_text(text.replace('"num_token_gt": [', '"num_token_gt": [ 9, ', 1))
    with pytest.raises(ValueError, match="checksum"):
        metrics.load_log(tmp_path)


def loaded(tmp_path, name, value):
    (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return metrics.load_log(tmp_path / f"{name}.json")


def fewer_rows(sets):
    for key, column in sets["forget"].items():
        sets["forget"][key] = column[:1] if key == "text" else column[:5]


def fewer_answers(sets):
    for key in ("average_perturb_loss", "perturb_loss", "num_token_perturb"):
        sets["forget"][key] = [row[:4] for row in sets["forget"][key]]


def other_rows(sets):
    sets["forget"]["index"] = [row + 1 for row in sets["forget"]["index"]]
    sets["forget"]["text"] = []


def other_truth(sets):
    sets["forget"]["text"][0]["ground_truth"] = "The author's full name is somebody else's."


def other_tokenizer(sets):
    for key, total in (("num_token_paraphrased", "paraphrased_loss"), ("num_token_gt", "gt_loss")):
        for at in (1, 4):
            sets["forget"][total][at] *= (sets["forget"][key][at] + 2) / sets["forget"][key][at]
            sets["forget"][key][at] += 2


@pytest.mark.parametrize("action, message", [
    (fewer_rows, "5 rows of the forget set .index 299.*same ds_size"),
    (other_rows, "index 0 is in one of them"),
    (other_truth, "other splits, and their p-values do not compare"),
    (fewer_answers, "5 and 4 perturbed answers"),
    (other_tokenizer, "num_token_gt of index 3 is .* different tokenizers"),
])  # fmt: skip
def test_logs_that_cannot_be_compared(tmp_path, action, message):
    log, other = loaded(tmp_path, "log", RAW["full"]), loaded(tmp_path, "retain", changed(action))
    with pytest.raises(ValueError, match=message):
        metrics.forget_quality(log, other)


def test_the_order_of_rows_is_no_matter(tmp_path):
    def turned(sets):
        for key, column in sets["forget"].items():
            sets["forget"][key] = column[::-1]
        del sets["forget"]["text"][0]["ground_truth"]  # nor what one of them does not say

    log, other = loaded(tmp_path, "log", RAW["full"]), loaded(tmp_path, "turned", changed(turned))
    retain = loaded(tmp_path, "retain", RAW["retain90"])
    assert metrics.forget_quality(other, retain) == metrics.forget_quality(log, retain)
    assert metrics.forget_quality(log, other).pvalue == 1


def test_a_prompt_that_ends_elsewhere_is_said(tmp_path, caplog):
    def longer(sets):
        for average, total, count in (("avg_gt_loss", "gt_loss", "num_token_gt"),):
            counts = [number + 3 for number in sets["forget"][count]]
            sets["forget"][count] = counts
            sets["forget"][total] = [a * n for a, n in zip(sets["forget"][average], counts, strict=True)]

    log, other = loaded(tmp_path, "log", RAW["full"]), loaded(tmp_path, "longer", changed(longer))
    assert metrics.forget_quality(log, other).pvalue == 1
    assert "differ by -3 everywhere" in caplog.text


def test_rows_that_were_asked_otherwise_are_said_once(tmp_path, caplog):
    """Of the same length, so that nothing else shows it."""
    log = loaded(tmp_path, "log", RAW["full"])
    asked = [replace(log, source={"sets": {"forget": {"tokens_sha256": tokens}}}) for tokens in ("here", "there")]
    for other in (log, asked[0]):
        assert metrics.forget_quality(asked[0], other).pvalue == 1
    assert not caplog.text
    for _ in range(2):
        assert metrics.forget_quality(*asked).pvalue == 1
    assert caplog.text.count("as other token ids (another template") == 1


def test_splits_that_logs_name(tmp_path):
    values = {name: copy.deepcopy(RAW["full"]) for name in ("forget10", "forget05")}
    for name, value in values.items():
        value["source"]["sets"] = {"forget": {"config": f"{name}_perturbed"}}
    logs = [loaded(tmp_path, name, value) for name, value in values.items()]
    with pytest.raises(ValueError, match="forget10_perturbed.*forget05_perturbed"):
        metrics.forget_quality(*logs)
