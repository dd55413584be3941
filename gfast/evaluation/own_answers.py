# SPDX-License-Identifier: Apache-2.0
"""A model's own answers to the questions of the forget set, to be forgotten beside those of the data (BS-S)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gfast.data.rows import CUT, as_rows
from gfast.evaluation.generation import generate, text_of
from gfast.evaluation.run import Evaluation
from gfast.evaluation.samples import EvaluationSet, encoded
from gfast.model_state import evaluating, rng_kept

logger = logging.getLogger("gfast")


def own_answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    samples: int = 3,
    share: float = 0.5,
    temperature: float = 1.0,
    max_new_tokens: int = 200,
    batch_size: int = 16,
    seed: int = 0,
    template: str = "auto",
    chat_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    r"""The rows, and answers to their questions that the model gives itself, with weights (BS-S).

    .. math:: L = (1 - \lambda) L(D_u) + \lambda L(\hat D_u), \quad \hat D_u = \{(x, \hat y^{(j)})\}_{j \le N}, \quad
        \hat y^{(j)} \sim p(\cdot \mid x; \theta)

    Ascent moves the probability that it takes from an answer to what the model believes beside it; what it says by
    itself is forgotten too. The weights make the mean over all rows of any objective that takes them that mixture: 1 -
    lambda and lambda / N of what is there of a row, times the number of rows over that of questions. Objectives that
    take the mean over tokens (GA, WGA) count long answers more, in both parts.

    This is the form in which the answers are drawn once, before the training. The published code draws them anew every
    two epochs: call again with the model as it is by then, and go on with a new run.

    Args:
        model, tokenizer: the model that is to forget.
        rows: dicts with `question` and `answer`, and `weight` if they have one, which multiplies.
        samples: N >= 1 draws a row. share: lambda, in (0, 1). temperature: > 0.
        max_new_tokens, batch_size: of the generation. seed: the same one gives the same answers.
        template, chat_kwargs: the prompt's, as `gfast.data.QADataset` has them.

    Returns:
        The rows with their weights, and after each what the model answered: `question`, `answer`, `weight`, and
        `answer_cut` where it had not ended after `max_new_tokens`: `gfast.data.QADataset` then labels no end. Empty
        answers are left out; a question with nothing else keeps its row's whole weight.

    Raises:
        ValueError: rows that cannot be asked, or are too long for the model, before any generation; numbers out of
            range.

    Source: arXiv 2510.19422 (equation 8) and its published code; the defaults are those of its configuration.

    Example:
        >>> from gfast.evaluation import own_answers
        >>> rows = own_answers(model, tokenizer, forget, samples=3)    # doctest: +SKIP
    """
    for name, value, good, words in (
        ("samples", samples, samples >= 1, "1 or more"),
        ("share", share, 0 < share < 1, "a number between 0 and 1"),
        ("temperature", temperature, temperature > 0, "a number above 0"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
    ):
        if not good:
            raise ValueError(f"gfast: own_answers: {name} is {value}; give {words}")
    rows = [dict(row) for row in as_rows(rows)]
    asked = EvaluationSet("forget", "own answers", rows, generate=max_new_tokens)
    evaluation = Evaluation([asked], [encoded(asked, tokenizer, template, chat_kwargs)], tokenizer, batch_size)
    evaluation.check_model(model)
    prompts, ends = [sample.prompt for sample in evaluation.samples[0]], evaluation.ends_for(model)
    said: list[dict[str, Any]] = []
    with evaluating(model), rng_kept():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            for generated in generate(model, some, max_new_tokens, ends, evaluation.pad_id, samples, temperature):
                cut = {} if generated.ended else {CUT: True}
                said.append({"answer": text_of(tokenizer, generated.ids), **cut})
    by_row = [
        [answer for answer in said[at * samples : (at + 1) * samples] if answer["answer"]] for at in range(len(rows))
    ]
    lost = samples * len(rows) - sum(map(len, by_row))
    if lost:
        logger.info("own_answers: %d of %d answers are empty and left out", lost, samples * len(rows))
    scale = (len(rows) + sum(map(len, by_row))) / len(rows)
    out = []
    for row, answers in zip(rows, by_row, strict=True):
        own = scale * float(row.get("weight", 1.0))
        out.append({**row, "weight": own * (1 - share) if answers else own})
        out += [{"question": row["question"], "weight": own * share / len(answers), **answer} for answer in answers]
    return out
