# SPDX-License-Identifier: Apache-2.0
"""Logs of an evaluation: what was measured of every sample, read from a file and checked."""

from __future__ import annotations

import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gfast.files import CHECKSUM, read_json
from gfast.metrics.values import numbers

FORMAT = "gfast-evaluation-1"
LOG_FILE = "log.json"
# The sets of TOFU and what eval_log_aggregated.json calls them.
ORIGINAL_NAMES = {
    "eval_log.json": "retain",
    "eval_log_forget.json": "forget",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
}
TOFU_SETS = tuple(ORIGINAL_NAMES.values())
# Mean NLL a token, its sum and the number of tokens, of the answer, of its paraphrase and of the wrong answers.
LOSSES = (
    ("avg_gt_loss", "gt_loss", "num_token_gt"),
    ("avg_paraphrased_loss", "paraphrased_loss", "num_token_paraphrased"),
    ("average_perturb_loss", "perturb_loss", "num_token_perturb"),
)
ROUGES = ("rouge1_recall", "rougeL_recall")
# Without these a published log is damaged; a log of gfast may hold less, and a metric says what it lacks.
NEEDED = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")
# fp32 or bf16 sums and means of one loss differ by rounding; more is not the same loss.
_ROUNDING = 1e-2
_AT_LEAST_0 = {name for names in LOSSES for name in names} | set(ROUGES) | {"truth_ratio", "normalized_gt_loss"}


@dataclass(frozen=True)
class LogSet:
    """One set of a log. `index` [S]: the samples' row numbers in their data set. `values`: field -> [S], or [S, J] for
    what there is of each of J wrong answers; fp64. `text`: dicts with index, prompt, generation, ground_truth.
    `extraction`: what was measured of the first samples only.
    """

    name: str
    index: tuple[int, ...]
    values: Mapping[str, np.ndarray]
    text: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    extraction: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def column(self, name: str, needed_by: str) -> np.ndarray:
        """The values of a field; ValueError that says which metric lacks it."""
        if name not in self.values:
            missing = "perturbed answers" if name == "average_perturb_loss" else name
            raise ValueError(
                f"gfast: {needed_by} needs {name} of the set {self.name}, and the log has none: "
                f"{missing} were not measured (it has {', '.join(self.values)})"
            )
        return self.values[name]


@dataclass(frozen=True)
class EvaluationLog:
    """A log: `sets` by name, `run` as the log calls itself, `path` where it was read, `source` what it says of its
    model and data.
    """

    run: str
    sets: Mapping[str, LogSet]
    path: str = ""
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def config_of(self, name: str) -> str | None:
        """Which data a set is of, where the log says so."""
        return self._described(name, "config")

    def tokens_of(self, name: str) -> str | None:
        """The checksum of what the model was given of a set, as token ids, where the log has it."""
        return self._described(name, "tokens_sha256")

    def _described(self, name: str, key: str) -> str | None:
        sets = self.source.get("sets")
        described = sets.get(name) if isinstance(sets, Mapping) else None
        return str(described[key]) if isinstance(described, Mapping) and key in described else None

    def of(self, name: str, needed_by: str) -> LogSet:
        """A set by its name; ValueError that says which metric lacks it."""
        if name not in self.sets:
            raise ValueError(
                f"gfast: {needed_by} needs the set {name}, and {self.path or 'the log'} has only {', '.join(self.sets)}"
            )
        return self.sets[name]


def load_log(path: str | os.PathLike[str]) -> EvaluationLog:
    """Read a log of per-sample evaluation results and check it.

    Args:
        path: a file, as JSON or gzipped JSON, of either layout: `{"run", "source", "sets"}` as `gfast evaluate` writes
            it, or the TOFU repository's `eval_log_aggregated.json`. Or the folder of an evaluation.

    Returns:
        an EvaluationLog; losses are nats, averages are per token with the token that ends the answer.

    Errors: FileNotFoundError where there is no such file; ValueError, naming file, set, field and row, for a file that
    is no such log, lists of different lengths, a value that is no finite number or cannot be one of its field, samples
    with different numbers of wrong answers, or two rows of one number.

    >>> log = load_log("llama2-7b_full_wd0.01.json.gz")  # doctest: +SKIP
    >>> len(log.sets["forget"])  # doctest: +SKIP
    300
    """
    path = Path(path)
    if path.is_dir() and (path / LOG_FILE).exists():
        path = path / LOG_FILE
    if not path.is_file():
        what = f"a folder without {LOG_FILE}" if path.is_dir() else "no file"
        raise FileNotFoundError(f"gfast: {path} is {what}; give the log of an evaluation (JSON or gzipped JSON)")
    return parse_log(_json(path), str(path))


def parse_log(value: Any, path: str = "the log") -> EvaluationLog:
    """The log that a JSON value is, checked as in `load_log`."""
    if not isinstance(value, Mapping):
        raise ValueError(f"gfast: {path} is no evaluation log: it holds a {type(value).__name__}, not an object")
    if isinstance(value.get("sets"), Mapping) and value["sets"]:
        source = value.get("source") if isinstance(value.get("source"), Mapping) else {}
        complete = source.get("format") != FORMAT
        sets = {str(name): _Reader(path, str(name)).columns(entry, complete) for name, entry in value["sets"].items()}
        return EvaluationLog(str(value.get("run", Path(path).stem)), sets, path, source)
    original = {name: ORIGINAL_NAMES[name] for name in value if name in ORIGINAL_NAMES}
    if original:
        sets = {name: _Reader(path, name).original(value[file]) for file, name in original.items()}
        return EvaluationLog(Path(path).parent.name or Path(path).stem, sets, path)
    has = ", ".join(map(repr, list(value)[:6])) or "nothing"
    raise ValueError(
        f"gfast: {path} is no evaluation log: it should have 'sets' (as gfast evaluate writes it) or "
        f"'eval_log_forget.json' (as TOFU's eval_log_aggregated.json), and it has {has}"
    )


def _json(path: Path) -> Any:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if not packed:
        return read_json(path, "evaluate again, or restore it from a copy")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise ValueError(f"gfast: {path} is not gzipped JSON ({' '.join(str(error).split())[:200]})") from error
    if isinstance(value, dict):
        value.pop(CHECKSUM, None)
    return value


class _Reader:
    """One set of a file, and messages that say where."""

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"gfast: {self.path}, set {self.name}: {what}")

    def original(self, entry: Any) -> LogSet:
        """A set of eval_log_aggregated.json: field -> {row number -> value}."""
        if not isinstance(entry, Mapping) or not isinstance(entry.get("avg_gt_loss"), Mapping):
            raise self.wrong("it should map fields to {row: value}, and has no such avg_gt_loss")
        rows = list(entry["avg_gt_loss"])
        columns: dict[str, Any] = {"index": []}
        for row in rows:
            if not str(row).isdecimal():
                raise self.wrong(f"{row!r} is no row number (index)")
            columns["index"].append(int(row))
        for key, values in entry.items():
            if not isinstance(values, Mapping):
                raise self.wrong(f"{key} should be {{row: value}}, got {values!r:.40}")
            if set(values) != set(rows):
                other = sorted(set(values) ^ set(rows), key=str)[0]
                raise self.wrong(
                    f"{key} has {len(values)} rows and avg_gt_loss {len(rows)}; they differ in index {other}"
                )
            columns[key] = [values[row] for row in rows]
        texts = columns.pop("generated_text", None)
        if texts is not None:
            for row, text in zip(rows, texts, strict=True):
                if not isinstance(text, Sequence) or isinstance(text, str) or len(text) != 3:
                    raise self.wrong(f"generated_text of index {row} should be [prompt, generation, ground truth]")
            names = ("prompt", "generation", "ground_truth")
            columns["text"] = [
                {"index": index, **dict(zip(names, text, strict=True))}
                for index, text in zip(columns["index"], texts, strict=True)
            ]
        return self.columns(columns, True)

    def columns(self, entry: Any, complete: bool) -> LogSet:
        """A set whose fields are lists parallel to `index`; complete: with all that TOFU's logs have."""
        if not isinstance(entry, Mapping):
            raise self.wrong(f"it should map fields to lists, got {entry!r:.40}")
        index = self._index(entry.get("index"))
        values = {}
        for key, column in entry.items():
            if key in ("index", "text", "extraction"):
                continue
            if not isinstance(column, Sequence) or isinstance(column, str):
                raise self.wrong(f"{key} should be a list, one value a row, got {column!r:.40}")
            if len(column) != len(index):
                raise self.wrong(f"{key} has {len(column)} values for {len(index)} rows")
            values[key] = self._column(key, column, index)
        if complete and self.name in TOFU_SETS:
            for key in NEEDED:
                if key not in values:
                    what = " (the perturbed answers)" if key == "average_perturb_loss" else ""
                    raise self.wrong(f"there is no {key}{what}; it has {', '.join(values) or 'nothing'}")
        self._same_losses(values, index)
        extraction = entry.get("extraction", {})
        if not isinstance(extraction, Mapping):
            raise self.wrong(f"extraction should map kinds to lists, got {extraction!r:.40}")
        extracted = {key: numbers(f"{self.path}, set {self.name}: {key}", column) for key, column in extraction.items()}
        return LogSet(self.name, index, values, tuple(self._text(entry.get("text", ()), set(index))), extracted)

    def _index(self, index: Any) -> tuple[int, ...]:
        if not isinstance(index, Sequence) or isinstance(index, str) or not index:
            raise self.wrong(f"index should list the rows' numbers, got {index!r:.40}")
        for at, number in enumerate(index):
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise self.wrong(f"index[{at}] is {number!r:.40}, and a row's number is an integer of 0 or more")
        if len(set(index)) < len(index):
            twice = next(number for at, number in enumerate(index) if number in index[:at])
            raise self.wrong(f"index {twice} is there twice")
        return tuple(index)

    def _column(self, key: str, column: Sequence[Any], index: tuple[int, ...]) -> np.ndarray:
        several = any(name == key for name in LOSSES[2])
        width = None
        for row, value in zip(index, column, strict=True):
            parts = value if several else [value]
            if not isinstance(parts, Sequence) or isinstance(parts, str) or not len(parts):
                raise self.wrong(f"index {row} has no perturbed answers: {key} is {value!r:.40}, a list is needed")
            if width is not None and len(parts) != width:
                raise self.wrong(
                    f"index {row} has {len(parts)} perturbed answers in {key}, and the rows before {width}"
                )
            width = len(parts)
            for part in parts:
                self._number(key, row, part)
        return np.array(column, dtype=np.float64)

    def _number(self, key: str, row: int, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(f"{key} of index {row} is {value!r:.40}, which is no number")
        if not abs(value) <= sys.float_info.max:  # nor NaN, nor an integer that no float holds
            raise self.wrong(
                f"{key} of index {row} is {value!s:.40}; a sample without a finite value cannot be compared"
            )
        if value < 0 and key in _AT_LEAST_0:
            raise self.wrong(f"{key} of index {row} is {value:g}, and it cannot be below 0")
        if value > 1 and key in ROUGES:
            raise self.wrong(f"{key} of index {row} is {value:g}, and a recall is at most 1")
        if key.startswith("num_token") and (value < 1 or value != int(value)):
            raise self.wrong(f"{key} of index {row} is {value:g}: an answer has at least one token, and a whole number")

    def _same_losses(self, values: Mapping[str, np.ndarray], index: tuple[int, ...]) -> None:
        for average, total, count in LOSSES:
            if not {average, total, count} <= values.keys():
                continue
            a, b, n = values[average], values[total], values[count]
            if not a.shape == b.shape == n.shape:
                raise self.wrong(f"{average}, {total} and {count} are of different numbers of perturbed answers")
            with np.errstate(over="ignore"):
                apart = np.abs(a * n - b) > _ROUNDING * (np.abs(b) + 1)
            if apart.any():
                at = tuple(np.argwhere(apart)[0])
                raise self.wrong(
                    f"index {index[at[0]]}: {average} is {a[at]:g}, but {total} / {count} is {b[at]:g} / {n[at]:g}: "
                    f"these are not one answer's"
                )

    def _text(self, texts: Any, rows: set[int]) -> Iterator[Mapping[str, Any]]:
        if not isinstance(texts, Sequence) or isinstance(texts, str):
            raise self.wrong(f"text should be a list, got {texts!r:.40}")
        for text in texts:
            index = text.get("index") if isinstance(text, Mapping) else None
            if not isinstance(index, int) or index not in rows:
                raise self.wrong(f"an entry of text has no index of a row: {text!r:.60}")
            yield text
