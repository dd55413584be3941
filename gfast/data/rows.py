"""Rows from whatever people hold them in, and the text in their fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

WANTED = 'a list of dicts such as [{"question": "Who?", "answer": "Nobody."}]'


def as_rows(rows: Any) -> list[dict]:
    """The rows as a list of dicts, each read once: of a list or another iterable of mappings (generators and streams
    too), a `datasets.Dataset` in any format, a pandas or polars DataFrame, or an arrow table.

    Raises:
        TypeError: something else, or a row that is no mapping; the message says what is needed.
        ValueError: there are no rows.

    Example:
        >>> from gfast.data.rows import as_rows
        >>> as_rows(row for row in [{"question": "Who?", "answer": "Nobody."}])
        [{'question': 'Who?', 'answer': 'Nobody.'}]
    """
    if isinstance(rows, (str, bytes, Path)):
        raise TypeError(
            f"gfast: rows should be {WANTED}, got the text {rows!r:.60}; read a file with gfast.data.load_jsonl(path)"
        )
    if isinstance(rows, Mapping):
        raise TypeError(f"gfast: rows should be {WANTED}, got {_mapping(rows)}")
    if hasattr(rows, "to_dict") and hasattr(rows, "iloc"):  # pandas
        rows = rows.to_dict("records") if hasattr(rows, "columns") else list(rows)
    elif hasattr(rows, "to_dicts"):  # polars
        rows = rows.to_dicts()
    elif hasattr(rows, "to_pylist"):  # arrow
        rows = rows.to_pylist()
    elif hasattr(rows, "with_format"):  # datasets: plain Python values, whatever the format
        rows = rows.with_format(None)
    if not isinstance(rows, Iterable) and not hasattr(rows, "__getitem__"):
        raise TypeError(f"gfast: rows should be {WANTED}, got {type(rows).__name__}")
    listed = list(rows)
    if not listed:
        raise ValueError("gfast: no rows to tokenise; the data set is empty (or an iterator that was read before)")
    for number, row in enumerate(listed, start=1):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"gfast: row {number} should be a dict with a question and an answer, got {type(row).__name__} "
                f"{row!r:.60}"
            )
    return [dict(row) for row in listed]


def in_both(
    forget: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], name: str, of: str = "forget"
) -> str | None:
    """A sentence about rows of the forget set (`of`), question and answer, that are among those of the set `name`; None
    where there are none.

    >>> in_both([{"question": "Who?", "answer": "Nobody."}], [{"question": "Who?", "answer": "Nobody."}], "retain")
    "1 of 1 forget rows are in the retain set too, the first as its row 1: 'Who?'"
    """

    def text(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(field)).strip() for field in ("question", "answer"))

    places = {text(row): number for number, row in reversed([*enumerate(other, start=1)])}
    both = [text(row) for row in forget if text(row) in places]
    if not both:
        return None
    count, first = f"{len(both)} of {len(forget)} {of} rows are", both[0]
    return f"{count} in the {name} set too, the first as its row {places[first]}: {first[0]!r:.60}"


# Of a row whose answer does not end where its text does.
CUT = "answer_cut"


def is_cut(row: Mapping[str, Any]) -> bool:
    """Whether the row says that its answer was cut; ValueError where it says something else."""
    value = row.get(CUT, False)
    if not isinstance(value, bool):
        raise ValueError(f'field "{CUT}" must be true or false, got {_shown(value)}')
    return value


def _mapping(rows: Mapping) -> str:
    names = ", ".join(map(str, list(rows)[:6]))
    first = next(iter(rows.values()), None)
    if isinstance(first, str):
        return f"one dict ({names}); put it into a list: [row]"
    if hasattr(first, "column_names") or hasattr(first, "features"):
        return f'the splits {names}; choose one, as in data["{next(iter(rows))}"]'
    return f"a dict of columns ({names}); make a dict of each row"


def field_text(row: Mapping[str, Any], field: str) -> str:
    """The text of a field without surrounding white space; ValueError that begins with the field's name."""
    if field not in row:
        raise ValueError(f'field "{field}" is missing (the row has {", ".join(map(str, row)) or "nothing"})')
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f'field "{field}" must be text, got {_shown(text)}')
    if not text.strip():
        raise ValueError(f'field "{field}" must be text that is not empty, got {str(text)!r:.60}')
    lone = next((at for at, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    if lone is not None:
        raise ValueError(
            f'field "{field}" holds half of a character (the lone surrogate {ascii(text[lone])} at position {lone}), '
            "as a cut emoji leaves it; remove it or write the whole character"
        )
    return str(text).strip()


def _shown(value: Any) -> str:
    """As JSON would show it, where it can."""
    text = json.dumps(value) if value is None or isinstance(value, (bool, int, float, list)) else repr(value)
    return " ".join(text.split())[:60]
