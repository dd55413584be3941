# SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks: sets of samples, each a question with answers to score, as token ids."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gfast.data.encode import IGNORE, Chat, Plain, make_encoder, resolve_template
from gfast.data.rows import as_rows, field_text, in_both, is_cut

logger = logging.getLogger("gfast")

# TOFU's field of the question in other words.
REWORDED = "paraphrased_question"


@dataclass(frozen=True)
class EvaluationSet:
    """Rows to evaluate, and what of them.

    name: what the log calls the set: forget, retain, real_authors, world_facts, or another.
    config: which data these are, as far as p-values compare ("forget10_perturbed").
    rows: dicts with the fields below, in whatever `gfast.data.QADataset` takes; a row's number is its place. index:
        other numbers, if the rows are some of more.
    paraphrase: field of the answer in other words, from which the truth ratio takes the right answer's loss; where it
        is the field `answer` itself, that loss is measured once.
    perturbed: field of the wrong answers, a list of texts. None: there are none, and no truth ratio.
    generate: tokens to generate at most; 0: none, and no ROUGE. stops: texts at which a generation is cut.
    choices: the answers are choices: the log says whether the right one is the most likely.
    encode: (question, answer) -> (token ids, labels), where the prompt is not the tokenizer's template.
    """

    name: str
    config: str
    rows: Sequence[Mapping[str, Any]]
    question: str = "question"
    answer: str = "answer"
    paraphrase: str | None = None
    perturbed: str | None = None
    generate: int = 200
    stops: tuple[str, ...] = ()
    index: tuple[int, ...] = ()
    choices: bool = False
    encode: Callable[[str, str], tuple[list[int], list[int]]] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        # Read once: of a generator nothing is left, and some data sets are cut into columns by rows[:n].
        object.__setattr__(self, "rows", as_rows(self.rows))

    def checksum(self) -> str:
        """SHA-256 of the rows."""
        text = json.dumps([list(self.index), *self.rows], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Sample:
    """A question with its answers. index: its row. answers: distinct (token ids, labels), prompt and end included.
    fields: which of them each loss of the log is of: gt, paraphrased, perturb. reworded: (token ids, labels) of the
    right answer after the question in other words, where the row has one. closing: how many of the right answer's
    labels end it: the token that does, and what a template writes before that.
    """

    index: int
    question: str
    truth: str
    answers: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    fields: Mapping[str, tuple[int, ...]]
    reworded: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    closing: int = 1

    @property
    def row(self) -> int:
        """Its row as errors count rows: as the lines of a file, from 1. Logs count them from 0."""
        return self.index + 1

    @property
    def right(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids and labels of the right answer with its prompt."""
        return self.answers[self.fields["gt"][0]]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The token ids in front of the right answer."""
        ids, labels = self.right
        return ids[: first_label(labels)]

    def counts(self, name: str) -> list[int]:
        """Tokens of the answers of a field, with the one that ends each."""
        return [sum(label != IGNORE for label in self.answers[at][1][1:]) for at in self.fields[name]]


_said: set[str] = set()


def say_rows_in_both(sets: Sequence[EvaluationSet]) -> None:
    """A warning, once, for rows of a forget set that are in another set too."""

    def rows_of(eval_set: EvaluationSet) -> list[dict[str, Any]]:
        return [{"question": row.get(eval_set.question), "answer": row.get(eval_set.answer)} for row in eval_set.rows]

    for eval_set in sets:
        for other in sets if eval_set.name.rpartition("_")[2] == "forget" else ():
            overlap = (
                None if other is eval_set else in_both(rows_of(eval_set), rows_of(other), other.name, eval_set.name)
            )
            if overlap is not None and overlap not in _said:
                _said.add(overlap)
                then = "Membership inference asks what tells the sets apart" if other.name == "holdout" else (
                    f"What is said of the {other.name} set is said of them as well")  # fmt: skip
                logger.warning("gfast: %s. %s: take them out of one", overlap, then)


def tokens_checksum(samples: Sequence[Sample]) -> str:
    """SHA-256 of what a model is given: the same rows are other tokens under another tokenizer or template."""
    return hashlib.sha256(
        repr([(sample.index, sample.answers, sample.fields, sample.reworded) for sample in samples]).encode()
    ).hexdigest()


def first_label(labels: Sequence[int]) -> int:
    """Where the answer begins."""
    return next(at for at, label in enumerate(labels) if label != IGNORE)


def encoded(
    eval_set: EvaluationSet,
    tokenizer: Any,
    template: str = "auto",
    chat_kwargs: Mapping[str, Any] | None = None,
    max_length: int | None = None,
) -> list[Sample]:
    """The samples of a set. Nothing is cut: an answer that was would have another loss. template and chat_kwargs are
    those of sets without an `encode` of their own.

    Errors: ValueError, naming set and row (counted from 1), for a missing field, a row without perturbed answers or
    with fewer than others, a right choice that has the tokens of a wrong one, an answer that was cut, an answer
    without a label, or more tokens than `max_length`.
    """
    encode = eval_set.encode or make_encoder(tokenizer, resolve_template(tokenizer, template), chat_kwargs)
    rows = eval_set.rows
    numbers = eval_set.index or tuple(range(len(rows)))
    samples, several = [], None
    for number, row in zip(numbers, rows, strict=True):
        try:
            question = field_text(row, eval_set.question)
            texts = {"gt": [field_text(row, eval_set.answer)]}
            if eval_set.answer == "answer" and is_cut(row):
                raise ValueError("its answer was cut (answer_cut), so that it has no end to score: leave such rows out")
            if eval_set.paraphrase is not None:
                texts["paraphrased"] = [field_text(row, eval_set.paraphrase)]
            if eval_set.perturbed is not None:
                texts["perturb"] = _wrong_answers(row, eval_set.perturbed)
                several = several or (number, len(texts["perturb"]))
                if len(texts["perturb"]) != several[1]:
                    raise ValueError(
                        f'field "{eval_set.perturbed}" has {len(texts["perturb"])} answers, and row {several[0] + 1} '
                        f"has {several[1]}: all rows need as many"
                    )
            sample = _sample(number, question, texts, encode, max_length)
            if eval_set.choices and sample.fields["gt"][0] in sample.fields.get("perturb", ()):
                raise ValueError(
                    f"the tokenizer makes the same tokens of {texts['gt'][0]!r:.40}, the right choice, and of a wrong "
                    "one, so that no model can tell them apart"
                )
            if row.get(REWORDED) is not None:
                ids, labels = encode(field_text(row, REWORDED), texts["gt"][0])
                sample = replace(sample, reworded=(tuple(ids), tuple(labels)))
            samples.append(sample)
        except ValueError as error:
            reason = str(error).removeprefix("gfast: ")
            raise ValueError(
                f"gfast: the set {eval_set.name} ({eval_set.config}), row {number + 1}: {reason}"
            ) from error
    return samples


def _wrong_answers(row: Mapping[str, Any], name: str) -> list[str]:
    texts = row.get(name)
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
        raise ValueError(f'field "{name}" should list perturbed answers, got {texts!r:.60}')
    return [field_text({name: text}, name) for text in texts]


def _sample(
    number: int,
    question: str,
    texts: Mapping[str, Sequence[str]],
    encode: Callable[[str, str], tuple[list[int], list[int]]],
    max_length: int | None,
) -> Sample:
    answers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    fields = {}
    for name, several in texts.items():
        places = []
        for text in several:
            ids, labels = (tuple(part) for part in encode(question, text))
            if all(label == IGNORE for label in labels[1:]):
                raise ValueError(f"the answer {text[:60]!r} has no label: no token of it would be scored")
            if max_length is not None and len(ids) > max_length:
                raise ValueError(
                    f"question and answer have {len(ids)} tokens, more than {max_length}; an answer that is cut has "
                    f"another loss: raise max_length, if the model takes as many, or take the row out"
                )
            places.append(answers.setdefault((ids, labels), len(answers)))
        fields[name] = tuple(places)
    right, encoded = texts["gt"][0], tuple(answers)
    closing = 1  # where it is not known, or shares a token with the answer
    if isinstance(encode, (Plain, Chat)):
        (ids, labels), bare = encoded[fields["gt"][0]], tuple(encode(question, right, False)[0])
        if ids[: len(bare)] == bare:
            closing = sum(label != IGNORE for label in labels[len(bare) :])
    return Sample(number, question, right, encoded, fields, closing=closing)
