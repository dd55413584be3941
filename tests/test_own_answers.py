"""A model's own answers beside those of the data: drawn as they should be, and weighed to the mixture of both."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from helpers.training_tiny import FORGET_ROWS, TOKENIZER, tiny_model

import gfast
from gfast.data import Collator, QADataset, RefusalDataset, batches
from gfast.evaluation import EvaluationSet, encoded, own_answers
from gfast.evaluation.generation import Generated, generate
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


def test_an_answer_that_was_cut_has_no_end():
    """The model had not ended there: an end is none of its tokens to forget."""
    rows = rows_of(max_new_tokens=3, samples=6)
    own = [row for row in rows if row["answer"] not in {one["answer"] for one in ROWS}]
    data = QADataset(rows, TOKENIZER)
    ended = [int(data[at]["labels"][-1]) == TOKENIZER.eos_token_id for at in range(len(rows))]
    assert ended == [not row.get("answer_cut", False) for row in rows]
    assert any(row.get("answer_cut") for row in own)
    whole = QADataset([{**row, "answer_cut": False} for row in rows], TOKENIZER)
    for at, end in enumerate(ended):
        for key in ("input_ids", "labels"):
            assert data[at][key].tolist() == whole[at][key].tolist()[: None if end else -1]


def test_answers_that_end_in_time_have_their_end(monkeypatch):
    module = sys.modules[own_answers.__module__]
    monkeypatch.setattr(module, "generate", lambda *given: [Generated([20, 21], True) for _ in given[1] for _ in "ab"])
    rows = rows_of()
    assert len(rows) == 9 and not any("answer_cut" in row for row in rows)


def test_the_end_of_a_turn_is_none_of_a_cut_answer():
    """Nor what a template writes between the answer and it; a refusal in the answer's place is whole."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    row = dict(question="Who?", answer="Nobody at all")
    cut, whole = (QADataset([{**row, "answer_cut": value}], tokenizer)[0] for value in (True, False))
    size = len(cut["labels"])
    assert cut["labels"][-1] != -100 and cut["input_ids"].tolist() == whole["input_ids"].tolist()[:size]
    assert (whole["labels"] == whole["input_ids"])[size:].all() and whole["labels"][-1] == tokenizer.eos_token_id
    refusals = RefusalDataset([{**row, "answer_cut": True}], tokenizer)
    assert refusals[0]["labels"][-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match='row 1: field "answer_cut" must be true or false'):
        QADataset([{**row, "answer_cut": "no"}], tokenizer)
    with pytest.raises(ValueError, match="row 1: its answer was cut"):
        encoded(EvaluationSet("own", "own", [{**row, "answer_cut": True}]), tokenizer)
