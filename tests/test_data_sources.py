"""Data: where rows come from, and the bundled tokenizer."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import types

import pytest

from gfast.data import (
    bundled_authors,
    demo_tokenizer,
    iter_jsonl,
    load_jsonl,
    load_tofu,
    refusals,
)
from gfast.evaluation import sources


def test_bundled_authors_are_distinct_and_well_formed():
    forget, retain = bundled_authors()
    assert len(forget) == 40 and len(retain) == 160
    assert not {r["author"] for r in forget} & {r["author"] for r in retain}
    assert len({r["author"] for r in forget + retain}) == 20
    questions, answers = ([r[key] for r in forget + retain] for key in ("question", "answer"))
    assert len(set(questions)) == 200 and len(set(answers)) == 200
    for text in questions + answers:
        assert re.fullmatch(r"[A-Z].*[.?]|[A-Z].*\.", text), text
        assert "{" not in text and "  " not in text and "a a" not in text.split("'"), text
        assert not re.search(r"\ban? (?:the|an?)\b", text), text
        assert not re.search(r"\ba [aeiou](?!ni|se)", text) and not re.search(r"\ban [^aeiouAEIOU]", text), text
    openings = [" ".join(a.split()[:2]) for r in (forget, retain) for a in (x["answer"] for x in r)]
    assert max(openings.count(o) for o in openings) < 20, "answers must not all begin alike"
    assert bundled_authors() == (forget, retain)
    assert len(bundled_authors(1)[0]) == 10
    for bad in (0, 20):
        with pytest.raises(ValueError, match="between 1 and 19"):
            bundled_authors(bad)


def test_bundled_pronouns_agree():
    from gfast.data.bundled import AUTHORS

    other = {"she": r"\b(?:he|him|his)\b", "he": r"\b(?:she|her|hers)\b"}
    for author in AUTHORS:
        rows = [r for side in bundled_authors() for r in side if r["author"] == author["name"]]
        assert len(rows) == 10
        for row in rows:
            mine = row["answer"].replace(author["influence"], "")  # influences speak of other people too
            assert not re.search(other[author["pronoun"]], mine, re.I), mine
        assert author["debut"] <= author["awarded"] and 18 <= author["debut"] - int(author["born"][-4:]) <= 45


def test_refusals(tmp_path, shared):
    lines = refusals()
    assert len(lines) >= 30 and len(set(lines)) == len(lines)
    assert len(refusals(shared / "data/tofu/idontknow.jsonl")) == 100
    assert not set(lines) & set(refusals(shared / "data/tofu/idontknow.jsonl"))


def test_refusals_from_a_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("No idea.\n\n  Pas la moindre idée. \n", encoding="utf-8")
    assert refusals(file) == ["No idea.", "Pas la moindre idée."]
    file.write_text("\n\n")
    with pytest.raises(ValueError, match="no refusals"):
        refusals(file)
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        refusals(tmp_path / "absent.txt")


def test_jsonl_reads_unicode_and_extra_fields(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        "\ufeff".encode()
        + '{"question": "Où ?", "answer": "東京\u2028là", "extra": [1]}\r\n\n'.encode()
        + b'{"question": "a", "answer": "\\u00e9"}'
    )
    assert load_jsonl(file) == [
        {"question": "Où ?", "answer": "東京\u2028là", "extra": [1]},
        {"question": "a", "answer": "é"},
    ]
    assert load_jsonl(file, fields=("answer",)) == load_jsonl(file)


def test_jsonl_streams(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\nbroken')
    rows = iter_jsonl(file)
    assert next(rows)["answer"] == "b"
    with pytest.raises(ValueError, match="row 2"):
        next(rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{nope}", r"row 3: not valid JSON .* at column 2"),
        (
            b'{"question": "Who?", "answer": "a", "answer": "b"}',
            r'row 3: not readable JSON \("answer" is given twice\)',
        ),
        (b'[{"question": "a", "answer": "b"}]', r"row 3: expected a JSON object"),
        (b'[{"question": "a",', r"row 3: not valid JSON .*each line must be an object"),
        (b'{"question": "a", "reply": "b"}', r'row 3: field "answer" is missing \(the row has question, reply\)'),
        (b'{"question": "a", "answer": 7}', r'row 3: field "answer" must be text, got 7'),
        (b'{"question": null, "answer": "b"}', r'row 3: field "question" must be text, got null'),
        (b'{"question": " ", "answer": "b"}', r'row 3: field "question" is empty'),
        (b'{"question": "\xff", "answer": "b"}', r"row 3: not UTF-8 text .* byte 14"),
    ],
)
def test_jsonl_errors_name_file_row_and_field(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"question": "a", "answer": "b"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, " + message):
        load_jsonl(file)


def test_jsonl_empty_or_absent(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.jsonl has no rows"):
        load_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="absent.jsonl does not exist"):
        load_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_jsonl(tmp_path)


@pytest.mark.parametrize(("forget", "retain"), [("01", "99"), ("05", "95"), ("10", "90")])
def test_tofu_splits_are_a_partition(shared, forget, retain):
    folder = shared / "data/tofu"
    full, f, r = (load_tofu(c, path=folder) for c in ("full", f"forget{forget}", f"retain{retain}"))
    assert len(full) == 4000 and len(f) == 40 * int(forget)
    assert r + f == full


def test_tofu_every_local_configuration_loads(shared):
    folder = shared / "data/tofu"
    for file in sorted(folder.glob("*.json")):
        rows = load_tofu(file.stem, path=folder)
        assert len(rows) >= 40
        if file.stem.endswith("_perturbed"):
            assert all(isinstance(row["perturbed_answer"], list) for row in rows)


def test_tofu_local_errors(tmp_path):
    (tmp_path / "forget01.json").write_text('{"question": "a", "answer": "b"}\n')
    assert load_tofu("forget01", path=tmp_path) == [{"question": "a", "answer": "b"}]
    with pytest.raises(FileNotFoundError, match=r'no TOFU configuration "forget10" .* there are: forget01'):
        load_tofu("forget10", path=tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_tofu("forget10", path=tmp_path / "nowhere")


def test_tofu_from_the_hub(monkeypatch):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        if config == "full":
            raise ConnectionError("Couldn't reach the Hub\nmore")
        return [{"question": "a", "answer": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_tofu("forget05") == [{"question": "a", "answer": "b"}]
    assert calls == [("locuslab/TOFU", "forget05", "train")]
    with pytest.raises(RuntimeError, match=r"ConnectionError: Couldn't reach the Hub\).*path=.*full\.json"):
        load_tofu("full")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install datasets.*path="):
        load_tofu("forget05")
    with pytest.raises(ImportError, match=r"cais/wmdp .*pip install datasets.*--data_path"):
        sources.stored("cais/wmdp", "wmdp-bio", "test", None, ("question",))


def test_demo_tokenizer_round_trips_any_text():
    tokenizer = demo_tokenizer()
    assert len(tokenizer) == 1800 and demo_tokenizer() is tokenizer
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for text in ["Ottoline Brackwater writes.", " two  spaces\nand a line", "東京 ☂ é", "it 's , so ."]:
        ids = tokenizer(text).input_ids
        assert ids[0] == 1 and 1 not in ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_demo_tokenizer_is_the_same_everywhere_and_import_is_light():
    code = (
        "import sys, hashlib, gfast.data as d\n"
        "heavy = {'transformers', 'datasets', 'pandas', 'matplotlib', 'triton'} & set(sys.modules)\n"
        "assert not heavy or 'torch._inductor' in sys.modules, heavy\n"
        "print(hashlib.sha256(d.demo_tokenizer().backend_tokenizer.to_str().encode()).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    here = hashlib.sha256(demo_tokenizer().backend_tokenizer.to_str().encode()).hexdigest()
    assert done.stdout.strip() == here
