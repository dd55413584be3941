"""Data: what people hand over as rows and as files gives the same items, or an error that says what is needed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pathlib

import pytest
from helpers.data_chat import ROWS

from gfast.data import PreferenceDataset, QADataset, RefusalDataset, demo_tokenizer, fingerprint, load_jsonl, load_tofu
from gfast.data.rows import as_rows

BASE = fingerprint(QADataset(ROWS, demo_tokenizer()))


class Indexed:
    """As torch's map-style data sets: a length and items, nothing else."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        if index >= len(ROWS):
            raise IndexError(index)
        return ROWS[index]


def hub_dataset():
    return pytest.importorskip("datasets", exc_type=ImportError).Dataset.from_list(ROWS)


def frame():
    return pytest.importorskip("pandas").DataFrame(ROWS)


CONTAINERS = {
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "map": lambda: map(dict, ROWS),
    "indexed": Indexed,
    "hub data set": hub_dataset,
    "hub data set, torch": lambda: hub_dataset().with_format("torch"),
    "hub data set, numpy": lambda: hub_dataset().with_format("numpy"),
    "hub data set, pandas": lambda: hub_dataset().with_format("pandas"),
    "hub stream": lambda: hub_dataset().to_iterable_dataset(),
    "hub stream, formatted": lambda: hub_dataset().to_iterable_dataset().with_format("torch"),
    "hub subset": lambda: hub_dataset().select(range(3)).filter(lambda row: True),
    "frame": frame,
    "frame with an index of its own": lambda: frame().set_index([[7, 3, 5]]),
    "frame's records": lambda: frame().to_dict("records"),
    "arrow": lambda: pytest.importorskip("pyarrow").Table.from_pylist(ROWS),
    "numpy texts": lambda: [{k: pytest.importorskip("numpy").str_(v) for k, v in row.items()} for row in ROWS],
    "other fields": lambda: [{**row, "extra": [1], "n": None} for row in ROWS],
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_items(name):
    assert fingerprint(QADataset(CONTAINERS[name](), demo_tokenizer())) == BASE


@pytest.mark.parametrize("kind", [RefusalDataset, PreferenceDataset])
def test_rows_that_can_be_read_once_do_for_pairs_and_refusals(kind):
    assert fingerprint(kind(iter(ROWS), demo_tokenizer())) == fingerprint(kind(ROWS, demo_tokenizer()))
    with pytest.raises(TypeError, match="gfast: .*load_jsonl"):
        kind("forget.jsonl", demo_tokenizer())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("forget.jsonl", r"got the text 'forget\.jsonl'; read a file with gfast\.data\.load_jsonl"),
        (pathlib.Path("forget.jsonl"), "load_jsonl"),
        (b"Who?", "load_jsonl"),
        (ROWS[0], r"one dict \(question, answer\); put it into a list"),
        ({"question": ["Who?"], "answer": ["Nobody."]}, r"a dict of columns \(question, answer\)"),
        (None, "got NoneType"),
        (7, "got int"),
        (["Who?"], "row 1 should be a dict with a question and an answer, got str 'Who"),
        ([ROWS[0], ("Who?", "Nobody.")], "row 2 should be a dict .* got tuple"),
        ([ROWS[0], None], "row 2 should be a dict .* got NoneType"),
    ],
)
def test_what_holds_no_rows_is_refused(value, message):
    with pytest.raises(TypeError, match="^gfast: .*" + message):
        QADataset(value, demo_tokenizer())


def test_splits_and_columns_of_hub_data_sets_are_refused():
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    whole, stream = hub_dataset(), hub_dataset().to_iterable_dataset()
    for splits in (
        datasets.DatasetDict(train=whole, test=whole),
        datasets.IterableDatasetDict(train=stream, test=stream),
    ):
        with pytest.raises(TypeError, match=r'gfast: .*the splits train, test; choose one, as in data\["train"\]'):
            as_rows(splits)
    with pytest.raises(TypeError, match="a dict of columns"):
        as_rows(hub_dataset()[:2])
    with pytest.raises(TypeError, match="gfast: row 1 should be a dict"):
        as_rows(frame()["question"])


def test_no_rows_and_a_generator_that_was_read():
    used = iter(ROWS)
    list(used)
    for empty in ([], used, frame().iloc[:0]):
        with pytest.raises(ValueError, match="gfast: no rows .* empty"):
            QADataset(empty, demo_tokenizer())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must be text, got null"),
        (1951, "must be text, got 1951"),
        (True, "must be text, got true"),
        (float("nan"), "must be text, got NaN"),
        (["a", "b"], r'must be text, got \["a", "b"\]'),
        (b"a", "must be text, got b'a'"),
        ("\u00a0\t", "must be text that is not empty"),
        ("smile \ud83d", r"holds half of a character \(the lone surrogate '\\ud83d' at position 6\)"),
        ("\udc80byte", "holds .* lone surrogate .* at position 0"),
    ],
)
@pytest.mark.parametrize("field", ["question", "answer"])
def test_a_field_that_is_no_text_is_named_with_its_row(field, value, message):
    with pytest.raises(ValueError, match=f'^gfast: row 2: field "{field}" {message}'):
        QADataset([ROWS[0], {**ROWS[1], field: value}], demo_tokenizer())


def rows_text() -> str:
    return "\n".join(json.dumps(row) for row in ROWS)


def parquet() -> bytes:
    return frame().to_parquet()


FILES = {
    "parquet": (parquet, "a Parquet file.*read_parquet"),
    "csv": (lambda: frame().to_csv(index=False).encode(), "looks like CSV.*read_csv"),
    "csv in quotes": (lambda: b'"id","question","answer"\n1,"a","b"', "looks like CSV"),
    "tsv": (lambda: b"question\tanswer\na\tb\n", "looks like TSV"),
    "gzip": (lambda: gzip.compress(rows_text().encode()), "compressed by gzip.*gunzip"),
    "bzip2": (lambda: bz2.compress(rows_text().encode()), "compressed by bzip2"),
    "xz": (lambda: lzma.compress(rows_text().encode()), "compressed by xz"),
    "zip": (lambda: b"PK\x03\x04" + bytes(30), "a ZIP archive or an Excel workbook"),
    "utf-16": (lambda: rows_text().encode("utf-16"), "UTF-16 text.*UTF-8"),
    "utf-16 without a mark": (lambda: rows_text().encode("utf-16-le"), "NUL bytes, as UTF-16"),
    "utf-32": (lambda: rows_text().encode("utf-32"), "UTF-32 text|NUL"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS.*pull"),
    "web page": (lambda: b"<!DOCTYPE html>\n<html></html>", "a web page"),
    "latin 1": (lambda: '{"question": "Où ?", "answer": "b"}'.encode("latin-1"), "not UTF-8 text"),
    "array": (lambda: json.dumps(ROWS).encode(), "one JSON array"),
    "array over lines": (lambda: json.dumps(ROWS, indent=1).encode(), "one JSON array"),
    "one object over lines": (lambda: json.dumps(ROWS[0], indent=1).encode(), "not valid JSON"),
    "python's own": (lambda: str(ROWS[0]).encode(), "not valid JSON"),
    "text": (lambda: b"Once upon a time", "not valid JSON"),
    "running text": (lambda: b'{"text": "Once"}', 'field "question" is missing.*running text'),
    "chat": (lambda: b'{"messages": [{"role": "user", "content": "Who?"}]}', "is missing.*chats"),
    "shared chat": (lambda: b'{"conversations": []}', "is missing.*chats"),
    "choices": (lambda: b'{"question": "Who?", "choices": ["a", "b"], "answer": 1}', "must be text, got 1;.*choices"),
    "instruction": (lambda: b'{"instruction": "Who?", "output": "Me."}', r"the row has instruction, output"),
    "nan": (lambda: b'{"question": "Who?", "answer": NaN}', "must be text, got NaN"),
    "half a character": (lambda: b'{"question": "Who?", "answer": "\\ud83d"}', "lone surrogate"),
    "digits": (lambda: b'{"question": ' + b"1" * 5000 + b"}", "JSON"),
    "depth": (lambda: b"[" * 200000, "JSON"),
    "a number": (lambda: b"7", "expected a JSON object .* got 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_one_line_with_file_row_and_what_is_expected(name, tmp_path):
    make, message = FILES[name]
    content = make()
    for file, load in (("rows.jsonl", load_jsonl), ("forget01.json", lambda p: load_tofu("forget01", p.parent))):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"(?s)gfast: .*{file}, row 1: .*(?:{message})") as caught:
            load(tmp_path / file)
        text = str(caught.value)
        assert '"question" and "answer"' in text and "\n" not in text and len(text) < 700


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\0" * 64, "NUL bytes"),
        (b'{"question": "Who?", "answer": "a', "not valid JSON"),
        (b'{"question": "Who?", "answer": null}', "must be text, got null"),
        (b'{"question": "Who?", "answer": ["a"]}', "must be text, got"),
    ],
)
def test_the_row_is_the_line_of_the_file(line, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(rows_text().encode() + b"\r\n\r\n" + line)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, row {len(ROWS) + 2}: .*{message}"):
        load_jsonl(file)


def test_text_that_json_can_hold_passes(tmp_path):
    rows = [{"question": "a\u0000b\u2028c", "answer": "\U0001f642 \ufffd", "score": float("nan")}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    assert str(load_jsonl(tmp_path / "rows.jsonl")) == str(rows)
    tokenizer = demo_tokenizer()
    ids = QADataset(rows, tokenizer)[0]["input_ids"]
    assert "a\0b\u2028c" in tokenizer.decode(ids) and "\U0001f642 \ufffd" in tokenizer.decode(ids)


def test_a_cut_answer_keeps_a_label():
    rows = [{"question": "Why", "answer": "a"}, {"question": "Why was it so late?", "answer": "because " * 100}]
    tokenizer = demo_tokenizer()
    least = int((QADataset(rows, tokenizer)[1]["labels"] == -100).sum())
    for length in range(least - 1, least + 4):
        if length > least:
            with pytest.warns(UserWarning, match="1 of 2 rows.*lost the end of their answer .*row 2"):
                data = QADataset(rows, tokenizer, max_length=length)
            assert len(data[1]["input_ids"]) == length and int((data[1]["labels"] != -100).sum()) == length - least
        else:
            with pytest.raises(
                ValueError, match=rf"row 2: the prompt alone has {least} tokens, so max_length={length}"
            ):
                QADataset(rows, tokenizer, max_length=length)


def test_a_weight_of_each_row_goes_into_its_item():
    rows = [{**row, "weight": 0.5 * index} for index, row in enumerate(ROWS)]
    items = QADataset(rows, demo_tokenizer())
    assert [items[index]["weight"] for index in range(len(rows))] == [row["weight"] for row in rows]
    assert RefusalDataset(rows, demo_tokenizer())[1]["weight"] == 0.5
    pair = PreferenceDataset(rows, demo_tokenizer())[1]
    assert (pair["weight"], pair["preferred_weight"]) == (0.5, 0.5)
    assert "weight" not in QADataset(ROWS, demo_tokenizer())[0]
    for wrong in ("heavy", [1, 0], None, float("nan"), float("inf")):
        with pytest.raises(ValueError, match='row 2.*"weight"'):
            QADataset([rows[0], {**rows[1], "weight": wrong}], demo_tokenizer())
