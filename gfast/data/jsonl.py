"""JSON lines files of question/answer rows, read line by line with errors that say where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path


def iter_jsonl(path: str | Path, fields: Sequence[str] = ("question", "answer")) -> Iterator[dict]:
    """Yield the rows of a UTF-8 JSON lines file one at a time; memory is that of one line.

    Each line is a JSON object; each of `fields` must be in it as text that is not empty, other fields pass through.
    Blank lines are skipped but counted: the row in a message is the line's number in the file, from 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not UTF-8, not JSON or not an object, a field is missing, empty or not text.

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
            where = f"gfast: {path}, row {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line)"
                ) from None
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                hint = "; the file looks like one JSON array, but each line must be an object of its own"
                hint = hint if text.lstrip().startswith("[") else ""
                raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno}){hint}") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{where}: expected a JSON object with {' and '.join(fields)}, got {text.strip()[:60]}"
                )
            for field in fields:
                if field not in row:
                    have = ", ".join(map(str, row)) or "nothing"
                    raise ValueError(f'{where}: field "{field}" is missing (the row has {have})')
                value = row[field]
                if not isinstance(value, str):
                    raise ValueError(f'{where}: field "{field}" must be text, got {json.dumps(value)[:60]}')
                if not value.strip():
                    raise ValueError(f'{where}: field "{field}" is empty')
            yield row


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
