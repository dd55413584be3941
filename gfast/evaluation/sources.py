# SPDX-License-Identifier: Apache-2.0
"""The sets of benchmarks and of one's own files, as an evaluation asks them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gfast.data import bundled_perturbed, iter_jsonl, load_jsonl, load_tofu
from gfast.data.encode import IGNORE, NO_END, join, leading
from gfast.data.tofu import from_hub
from gfast.evaluation.samples import EvaluationSet
from gfast.metrics.log import EvaluationLog
from gfast.words import did_you_mean

logger = logging.getLogger("gfast")

FORGET_SPLITS = ("forget01", "forget05", "forget10")
WMDP = ("wmdp-bio", "wmdp-chem", "wmdp-cyber")
_PERTURBED = {"paraphrase": "paraphrased_answer", "perturbed": "perturbed_answer"}
_LETTERS = "ABCDEFGHIJ"
# open-unlearning's for MUSE's questions: without a chat template a model goes on with questions of its own.
_NEXT_QUESTION = ("\n\n", "\nQuestion", "Question:")


def tofu(forget: str, path: str | Path | None, ds_size: int = 0, holdout: str | None = None) -> list[EvaluationSet]:
    """TOFU's four sets, in the order of its logs: retain, forget, real_authors, world_facts; holdout if there is one.

    forget: the split (forget10) or its perturbed configuration. path: a folder with `<config>.json`, None: the hub.
    ds_size: of retain and forget the first so many rows, 0: all; the logs of the TOFU repository have 300.
    """
    split = forget.removesuffix("_perturbed")
    if split not in FORGET_SPLITS:
        raise ValueError(
            f"gfast: TOFU has no forget split {forget!r}{did_you_mean(split, FORGET_SPLITS)} "
            f"It is one of {', '.join(FORGET_SPLITS)}"
        )
    options = {"answer": "answer", "perturbed": "perturbed_answer", "paraphrase": "answer"}
    sets = [
        EvaluationSet("retain", "retain_perturbed", _first(load_tofu("retain_perturbed", path), ds_size), **_PERTURBED),
        EvaluationSet(
            "forget", f"{split}_perturbed", _first(load_tofu(f"{split}_perturbed", path), ds_size), **_PERTURBED
        ),
        EvaluationSet("real_authors", "real_authors_perturbed", load_tofu("real_authors_perturbed", path), **options),
        EvaluationSet("world_facts", "world_facts_perturbed", load_tofu("world_facts_perturbed", path), **options),
    ]
    if holdout:
        sets.append(EvaluationSet("holdout", holdout, load_tofu(holdout, path), generate=0))
    return sets


def bundled(ds_size: int = 0) -> list[EvaluationSet]:
    """The bundled authors, with answers in other words and wrong ones."""
    forget, retain = bundled_perturbed()
    return [
        EvaluationSet("retain", "bundled retain", _first(retain, ds_size), generate=60, **_PERTURBED),
        EvaluationSet("forget", "bundled forget", _first(forget, ds_size), generate=60, **_PERTURBED),
    ]


def jsonl(files: Mapping[str, str], path: str | Path | None, ds_size: int = 0) -> list[EvaluationSet]:
    """One's own question/answer lines: name of the set -> file. Where every row has `paraphrased_answer` and
    `perturbed_answer`, as in TOFU's perturbed configurations, they are scored too.
    """
    sets = []
    for name, file in files.items():
        rows = _first(load_jsonl(Path(path or "") / file), ds_size)
        have = {key: field for key, field in _PERTURBED.items() if any(field in row for row in rows)}
        if "perturbed" in have and "paraphrase" not in have:
            have["paraphrase"] = "answer"
        sets.append(EvaluationSet(name, Path(file).stem, rows, **have))
    return sets


def trained(
    source: str,
    forget: str,
    retain: str | None,
    path: str | Path | None,
    ds_size: int = 0,
    *,
    max_forget: int = 0,
    max_retain: int = 0,
    forget_authors: int = 4,
) -> list[EvaluationSet]:
    """What a model that is trained on these data (bundled, tofu or jsonl) is asked: of no more of their rows than it is
    trained on, and of TOFU's other sets. forget_authors: of the bundled ones.
    """
    if source == "tofu":
        sets = tofu(forget, path, ds_size)
    elif source == "jsonl":
        sets = jsonl({"forget": forget, **({"retain": retain} if retain else {})}, path, ds_size)
    else:
        rows = dict(zip(("forget", "retain"), bundled_perturbed(forget_authors), strict=True))
        sets = [replace(eval_set, rows=_first(rows[eval_set.name], ds_size)) for eval_set in bundled()]
    limits = {"forget": max_forget, "retain": max_retain}
    return [replace(eval_set, rows=_first(eval_set.rows, limits.get(eval_set.name, 0))) for eval_set in sets]


def muse(hub: str, path: str | Path | None, tokenizer: Any, ds_size: int = 0) -> list[EvaluationSet]:
    """MUSE: knowledge (questions after a few answered ones), verbatim memory (how a text goes on) and, for PrivLeak,
    whole texts of the forget and the holdout set.

    hub: muse-bench/MUSE-News or -Books; path: a folder with their files instead, as `<config>/<split>.jsonl` or
    `<config>_<split>.jsonl`.
    """
    sets = []
    for name in ("forget", "retain"):
        few = stored(hub, "knowmem", f"{name}_qa_icl", path, ("question", "answer"))
        rows = stored(hub, "knowmem", f"{name}_qa", path, ("question", "answer"))
        shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in few)
        encode = Continuation(tokenizer, shots)
        sets.append(
            EvaluationSet(f"knowmem_{name}", f"knowmem {name}_qa", _first(rows, ds_size), generate=32,
                          stops=_NEXT_QUESTION, encode=encode)
        )  # fmt: skip
    rows = stored(hub, "verbmem", "forget", path, ("prompt", "gt"))
    sets.append(
        EvaluationSet("verbmem", "verbmem forget", _first(rows, ds_size), "prompt", "gt", generate=128,
                      encode=Continuation(tokenizer))
    )  # fmt: skip
    for name in ("forget", "holdout"):
        rows = stored(hub, "privleak", name, path, ("text",))
        texts = [{"question": row["text"], "answer": row["text"]} for row in _first(rows, ds_size)]
        sets.append(EvaluationSet(name, f"privleak {name}", texts, generate=0, encode=WholeText(tokenizer)))
    return sets


def choices(
    name: str, hub: str, config: str, path: str | Path | None, tokenizer: Any, ds_size: int = 0
) -> EvaluationSet:
    """Multiple choice (WMDP, MMLU): the letter of the right choice as the answer, the others' as wrong ones.

    The prompt is lm-eval's: a line about the subject, the question, the choices by letter, `Answer:`. Accuracy is the
    share of questions whose right letter is the most likely.
    """
    rows = _first(stored(hub, config, "test", path, ("question",)), ds_size)
    asked = []
    for number, row in enumerate(rows, start=1):
        texts, right = row.get("choices"), row.get("answer")
        if not isinstance(texts, Sequence) or isinstance(texts, str) or not 2 <= len(texts) <= len(_LETTERS):
            raise ValueError(
                f"gfast: {hub} {config}, row {number}: choices should be a list of texts, got {texts!r:.60}"
            )
        if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(texts):
            raise ValueError(
                f"gfast: {hub} {config}, row {number}: answer is {right!r:.40}, and should be the place of the right "
                f"one of {len(texts)} choices, from 0"
            )
        subject = str(row.get("subject") or config.removeprefix("wmdp-")).replace("_", " ")
        lines = [f"{letter}. {text}" for letter, text in zip(_LETTERS, texts, strict=False)]
        about = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}.get(subject, subject)
        head = f"The following are multiple choice questions (with answers) about {about}."
        question = "\n".join([f"{head}\n", row["question"].strip(), *lines, "Answer:"])
        wrong = [letter for letter in _LETTERS[: len(texts)] if letter != _LETTERS[right]]
        asked.append({"question": question, "answer": _LETTERS[right], "perturbed_answer": wrong})
    encode = Continuation(tokenizer, ends=False)
    return EvaluationSet(
        name, f"{config} test", asked, perturbed="perturbed_answer", generate=0, choices=True, encode=encode
    )


class Continuation:
    """A text and how it goes on, after a space: no template. With `ends` the end token is a label too."""

    def __init__(self, tokenizer: Any, before: str = "", ends: bool = True) -> None:
        self.tokenizer, self.before, self.ends = tokenizer, before, ends

    def __call__(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        prompt = f"{self.before}{question}" if not self.before else f"{self.before}Question: {question}\nAnswer:"
        if self.ends and self.tokenizer.eos_token_id is None:
            raise ValueError(NO_END)
        ids, start = join(self.tokenizer, prompt, f" {answer}")
        rest = ids[start:] + ([self.tokenizer.eos_token_id] if self.ends else [])
        head = self._leading + ids[:start]
        return head + rest, [IGNORE] * len(head) + rest

    @cached_property
    def _leading(self) -> list[int]:
        return leading(self.tokenizer)


class WholeText:
    """A text all of whose tokens but the first are labels."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        ids = list(self.tokenizer(answer).input_ids)
        return ids, [IGNORE, *ids[1:]]


def stored(hub: str, config: str, split: str, path: str | Path | None, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a data set on the hub, or of a folder that has its files: `<config>/<split>.parquet`, .jsonl or .json
    (JSON lines), or its parts `<config>/<split>-00000-of-00002.*`; `<config>_<split>.*`; of `test` `<config>.*`.

    Errors: FileNotFoundError, naming what was looked for; ValueError for a row without one of `fields`, as text.
    """
    if path is None:
        rows = from_hub(hub, config, split, f"give --data_path with a folder that holds {config}/{split}.jsonl")
        where = f"{hub}, {config} {split}"
    else:
        files = _files(Path(path), config, split)
        rows, where = [row for file in files for row in _read(file, fields)], str(files[0])
    for number, row in enumerate(rows, start=1):
        for field in fields:
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(f"gfast: {where}, row {number}: {field} should be text, got {row.get(field)!r:.60}")
    if not rows:
        raise ValueError(f"gfast: {where} has no rows")
    return rows


def _files(folder: Path, config: str, split: str) -> list[Path]:
    """The file of a split, or all of its parts, as the hub has them: `<split>-00000-of-00002.parquet`."""
    names = [f"{config}/{split}", f"{config}_{split}", f"{config}-{split}", f"{config}/{split}-*-of-*"]
    if split == "test":  # of data with other splits it would be taken for each of them
        names.append(config)
    for name in names:
        for kind in ("jsonl", "json", "parquet"):
            files = sorted(folder.glob(f"{name}.{kind}"))
            if files and "*" in name:
                count = files[0].stem.rpartition("-")[2]
                if str(len(files)) != count.lstrip("0"):
                    raise FileNotFoundError(
                        f"gfast: {files[0]} is one of {count} files of {config} {split}, and {len(files)} of them are "
                        f"in {files[0].parent}: copy the others there too"
                    )
            if files:
                return files
    raise FileNotFoundError(
        f"gfast: {folder} has no file for {config} {split}: it should be {config}/{split}.jsonl (or .json, .parquet)"
    )


def _read(file: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file).to_pylist()
    return list(iter_jsonl(file, fields))


def as_logged(eval_set: EvaluationSet, log: EvaluationLog) -> EvaluationSet:
    """As many of the first rows of a set as a retain log has of the same set; ValueError where its forget set is of
    others.
    """
    if eval_set.name not in log.sets:
        return eval_set
    index = log.sets[eval_set.name].index
    if sorted(index) != list(range(len(index))):
        if eval_set.name == "forget":
            raise ValueError(f"gfast: the forget set of {log.path} is of other rows than the first {len(index)}")
        return eval_set
    if len(index) < len(eval_set.rows):
        say = "The retain log is of the first %d rows of the %s set: these are evaluated (--ds_size)"
        logger.info(say, len(index), eval_set.name)
    return replace(eval_set, rows=eval_set.rows[: len(index)])


def _first(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return rows[:count] if count else rows
