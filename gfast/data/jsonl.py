"""JSON lines files of question/answer rows, read line by line with errors that say where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gfast.data.rows import field_text

# How files of other kinds begin, what they are called, and how to make JSON lines of them.
_PANDAS = "pandas.{}(...).to_json(..., orient='records', lines=True) makes such a file of it"
_KINDS = (
    (b"PAR1", "a Parquet file", _PANDAS.format("read_parquet")),
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook", _PANDAS.format("read_excel") + ", or unpack it"),
    (b"ARROW1", "an Arrow file", "datasets.Dataset.from_file(...).to_json(...) makes such a file of it"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (b"BZh", "compressed by bzip2", "unpack it with bunzip2"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with unzstd"),
    (b"\xfd7zXZ\x00", "compressed by xz", "unpack it with unxz"),
    (b"\xff\xfe\0\0", "UTF-32 text", "save it as UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"version https://", "a pointer of Git LFS, not the file itself", "fetch that with git lfs pull"),
    (b"<!doctype html", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
)


def iter_jsonl(path: str | Path, fields: Sequence[str] = ("question", "answer")) -> Iterator[dict]:
    """Yield the rows of a UTF-8 JSON lines file one at a time; memory is that of one line.

    Each line is a JSON object; each of `fields` must be in it as text that is not empty, other fields pass through.
    Blank lines are skipped but counted: the row in a message is the line's number in the file, from 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind (Parquet, CSV, compressed, UTF-16, one JSON array), a line is not UTF-8,
            not JSON or not an object, a field is missing, empty, not text or holds half a character. The message names
            file and row and says what is expected.

    Example:
        >>> from gfast.data import iter_jsonl
        >>> for row in iter_jsonl("mine.jsonl"):  # doctest: +SKIP
        ...     print(row["question"])
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"gfast: {path} {what}; expected a JSON lines file with {' and '.join(fields)}")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = _row(line, number, fields)
            except ValueError as error:
                raise ValueError(f"gfast: {path}, row {number}: {error}") from None
            if row is not None:
                yield row


def _row(line: bytes, number: int, fields: Sequence[str]) -> dict[str, Any] | None:
    """The row of a line, None for a blank one; ValueError says what is wrong with it."""
    expected = "expected a JSON object with {} on each line".format(" and ".join(f'"{field}"' for field in fields))
    kind = (
        next((kind for kind in _KINDS if line.startswith(kind[0]) or line.lower().startswith(kind[0])), None)
        if number == 1
        else None
    )
    if kind is not None:
        raise ValueError(f"the file is {kind[1]}; {expected}: {kind[2]}")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start} of the line); {expected}") from None
    if not text.strip():
        return None
    if "\0" in text:
        raise ValueError(f"holds NUL bytes, as UTF-16 text or a file whose writing was interrupted does; {expected}")
    try:
        row = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        hint = _hint(text, fields) if number == 1 else ""
        reason = f"not valid JSON ({error.msg} at column {error.colno})"
        if text.lstrip().startswith("["):
            hint = "; the file looks like one JSON array, but each line must be an object of its own"
        raise ValueError(f"{reason}; {expected}{hint}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets, a name twice
        reason = str(error).partition(";")[0] if isinstance(error, ValueError) else "nested too deeply"
        raise ValueError(f"not readable JSON ({reason}); {expected}") from None
    if not isinstance(row, dict):
        hint = "; the file looks like one JSON array, but each line must be an object of its own"
        raise ValueError(f"{expected}, got {text.strip()[:60]}{hint if isinstance(row, list) else ''}")
    for field in fields:
        try:
            if isinstance(row.get(field), str) and not row[field].strip():
                raise ValueError(f'field "{field}" is empty')
            field_text(row, field)
        except ValueError as error:
            raise ValueError(f"{error}; {expected}, both text{_shape(row)}") from None
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object each of whose names is given once: of two values Python would take the last without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'"{next(name for name in names if names.count(name) > 1)}" is given twice')
    return row


def _hint(text: str, fields: Sequence[str]) -> str:
    """A first line that names the fields between commas or tabs is a table's."""
    for sign, name in ((",", "CSV"), ("\t", "TSV")):
        names = [cell.strip().strip("\"'").lower() for cell in text.split(sign)]
        if len(names) > 1 and any(field.lower() in names for field in fields):
            return f"; the file looks like {name}: {_PANDAS.format('read_csv')}"
    return ""


def _shape(row: Mapping[str, Any]) -> str:
    """What rows of other well-known shapes would need."""
    if "messages" in row or "conversations" in row:
        return "; these are chats: take the question from the user's turn and the answer from the assistant's"
    if "choices" in row:
        return "; these are multiple choices: write the choices into the question and the right one as the answer"
    if "text" in row:
        return "; this is running text: make questions and answers about it"
    return ""


def load_jsonl(path: str | Path, fields: Sequence[str] = ("question", "answer")) -> list[dict]:
    """All rows of a JSON lines file (see `iter_jsonl`); a file without rows is an error.

    Example:
        >>> import pathlib, tempfile
        >>> from gfast.data import load_jsonl
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "mine.jsonl"
        >>> _ = path.write_text('{"question": "Who?", "answer": "Nobody."}')
        >>> load_jsonl(path)
        [{'question': 'Who?', 'answer': 'Nobody.'}]
    """
    rows = list(iter_jsonl(path, fields))
    if not rows:
        raise ValueError(f"gfast: {path} has no rows; expected one JSON object a line with {' and '.join(fields)}")
    return rows
