"""A model's own answers beside those of the data: drawn as they should be, and weighed to the mixture of both."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers.training_tiny import FORGET_ROWS, TOKENIZER, tiny_model

import gfast
from gfast.data import Collator, QADataset, batches
from gfast.evaluation import own_answers
from gfast.evaluation.generation import generate
from gfast.objectives import NPO

ROWS = FORGET_ROWS[:3]


def rows_of(model=None, **options):
    return own_answers(model or tiny_model(), TOKENIZER, ROWS, **{"max_new_tokens": 6, "samples": 2, **options})


def test_answers_are_of_the_seed_and_leave_no_trace():
    model, state = tiny_model(), torch.get_rng_state()
    rows = rows_of(model)
    assert rows == rows_of(model) and rows != rows_of(model, seed=1) and torch.equal(state, torch.get_rng_state())
    assert [row["question"] for row in rows if row["answer"] in {one["answer"] for one in ROWS}] == [
        row["question"] for row in ROWS
    ]
    assert all(row["answer"].strip() for row in rows) and len(rows) > len(ROWS)


def test_the_mean_over_rows_is_the_mixture_of_both_parts():
    """NPO: the mean over texts of a value times the text's weight."""
    share, model = 0.3, tiny_model()
    rows = rows_of(share=share)

    def loss(some):
        collator = Collator(TOKENIZER)
        (batch,) = batches(QADataset([{k: v for k, v in row.items() if k != "weight"} for row in some], TOKENIZER),
                           collator, len(some))  # fmt: skip
        weights = torch.tensor([row.get("weight", 1.0) for row in some])
        ref = gfast.model_logp(model, batch).detach() - 0.3
        weight = weights[:, None].expand(batch["labels"].shape)
        return gfast.model_loss(model, {**batch, "weight": weight}, NPO(), ref_logp=ref).loss.item()

    own = [[row for row in rows if row["question"] == one["question"]][1:] for one in ROWS]
    assert all(own)
    plain = [[{**row, "weight": 1.0} for row in some] for some in own]
    expected = (1 - share) * loss(ROWS) + share * sum(map(loss, plain)) / len(ROWS)
    assert loss(rows) == pytest.approx(expected, rel=1e-5)


def test_questions_without_an_answer_keep_their_weight(monkeypatch):
    monkeypatch.setattr(sys.modules[own_answers.__module__], "text_of", lambda tokenizer, ids: "")
    rows = rows_of()
    assert [row["weight"] for row in rows] == [1.0] * len(ROWS)


def test_draws_are_of_the_whole_distribution():
    """Of many draws of one token each token comes as often as the model says."""
    model = tiny_model().eval()
    prompt = [[5, 6, 7]]
    with torch.no_grad():
        p = torch.softmax(model(input_ids=torch.tensor(prompt)).logits[0, -1].double() / 2.0, 0)
    torch.manual_seed(0)
    drawn = [one.ids[0] for one in generate(model, prompt, 1, [len(p) - 1], 0, 4000, 2.0) if one.ids]
    counts = torch.bincount(torch.tensor(drawn), minlength=len(p)).double() / 4000
    for token in p[:-1].topk(5).indices.tolist():
        assert abs(counts[token] - p[token]) < 5 * float((p[token] / 4000).sqrt())


@pytest.mark.parametrize(
    "options, words",
    [(dict(samples=0), "samples is 0"), (dict(share=1.0), "share is 1.0"), (dict(temperature=0.0), "temperature is"),
     (dict(max_new_tokens=10_000), "may be generated after it")],
)  # fmt: skip
def test_what_cannot_be_drawn(options, words):
    with pytest.raises(ValueError, match=words):
        rows_of(**options)
