"""Rows, models and numbers that cannot be evaluated are said before any work."""

from __future__ import annotations

from dataclasses import replace

import pandas
import pytest
from helpers.data_chat import wordpiece_tokenizer
from helpers.training_tiny import TOKENIZER, tiny_model
from test_evaluation import FIELDS, evaluation, sets

from gfast.data import bundled_perturbed
from gfast.evaluation import Evaluation, EvaluationSet, encoded, sources
from gfast.evaluation.run import columns


def changed(**fields) -> EvaluationSet:
    rows = [dict(row) for row in bundled_perturbed()[0][:3]]
    for name, value in fields.items():
        rows[1][name] = value
        if value is None:
            del rows[1][name]
    return EvaluationSet("forget", "bundled", rows, **FIELDS)


def test_what_a_model_does_not_take_is_said_before_any_pass():
    one = evaluation(extraction=("exact",))
    sample = max((s for some in one.samples for s in some), key=lambda s: max(len(ids) for ids, _ in s.answers))
    length = max(len(ids) for ids, _ in sample.answers)
    with pytest.raises(ValueError, match=f"{length} tokens, and the model takes {length - 1}"):
        one.check_model(tiny_model(max_position_embeddings=length - 1))
    one.check_model(tiny_model(max_position_embeddings=length))
    with pytest.raises(ValueError, match="and the model takes"):
        one.run(tiny_model(max_position_embeddings=length - 1))  # before any pass, without having been asked
    with pytest.raises(ValueError, match=f"300 may be generated .* takes {length} .* max_new_tokens of "):
        evaluation(generate=300).check_model(tiny_model(max_position_embeddings=length))
    with pytest.raises(ValueError, match="row 1 of the set retain"):
        one.check_model(tiny_model(vocab_size=20))


@pytest.mark.parametrize("fields, message", [
    ({"perturbed_answer": None}, 'row 2: field "perturbed_answer" should list perturbed answers, got None'),
    ({"perturbed_answer": []}, "should list perturbed answers"),
    ({"perturbed_answer": "one"}, "should list perturbed answers"),
    ({"perturbed_answer": ["a", "b"]}, "has 2 answers, and row 1 has 5"),
    ({"perturbed_answer": ["a", "b", "c", "d", " "]}, "not empty"),
    ({"paraphrased_answer": None}, "row 2: .*paraphrased_answer"),
    ({"answer": 3}, "must be text"),
    ({"question": None}, '"question" is missing'),
])  # fmt: skip
def test_rows_that_cannot_be_evaluated(fields, message):
    with pytest.raises(ValueError, match=message):
        encoded(changed(**fields), TOKENIZER)


def test_an_answer_without_a_label_and_one_that_is_too_long():
    nothing = EvaluationSet("forget", "mine", sets()[0].rows, encode=lambda question, answer: ([1, 2], [-100, -100]))
    with pytest.raises(ValueError, match="row 1: the answer .* has no label"):
        encoded(nothing, TOKENIZER)
    with pytest.raises(ValueError, match="tokens, more than 12"):
        encoded(sets()[0], TOKENIZER, max_length=12)


def test_choices_that_are_the_same_tokens():
    """Of a vocabulary without the letters: each would be as likely as the right one, and the accuracy 0."""
    row = {"question": "Who?", "answer": "X", "perturbed_answer": ["Y", "Z"]}
    encode = sources.Continuation(wordpiece_tokenizer(), ends=False)
    one = EvaluationSet("wmdp", "mine", [row], perturbed="perturbed_answer", generate=0, choices=True, encode=encode)
    with pytest.raises(ValueError, match="row 1: the tokenizer makes the same tokens of 'X', the right choice, and of"):
        encoded(one, wordpiece_tokenizer())


def test_rows_in_both_sets_are_said_once(caplog):
    forget, retain = sources.bundled(4)[::-1]
    rows = [*retain.rows[:2], forget.rows[3], forget.rows[1]]
    asked = [forget, EvaluationSet("holdout", "lines", rows, generate=0), replace(retain, rows=rows, name="kept")]
    samples = [encoded(one, TOKENIZER) for one in asked]
    for _ in range(2):
        Evaluation(asked, samples, TOKENIZER)
    first = f"2 of 4 forget rows are in the holdout set too, the first as its row 4: {forget.rows[1]['question']!r:.60}"
    said = [one for one in caplog.messages if "rows are in" in one]
    for one, name, then in zip(
        said,
        ("holdout", "kept"),
        ("Membership inference asks what tells the sets apart", "What is said of the kept set is said of them as well"),
        strict=True,
    ):
        assert one == f"gfast: {first.replace('holdout', name)}. {then}: take them out of one"


def test_names_and_numbers_of_an_evaluation(caplog):
    one = sets()[0]
    samples = encoded(one, TOKENIZER)
    for options, message in (({"batch_size": 0}, "batch_size"), ({"extraction": ["perturb"]}, "extraction"),
                             ({"extraction_samples": 3}, "extraction_samples=3 has no effect without extraction"),
                             ({"extraction": ["exact"], "extraction_samples": -1}, "samples is -1")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Evaluation([one], [samples], TOKENIZER, **options)
    with pytest.raises(ValueError, match="one name"):
        Evaluation([one, one], [samples, samples], TOKENIZER)
    with caplog.at_level("WARNING", logger="gfast"):
        assert columns([4, 7], [{"a": 1}, {"a": 2, "min_k": 3}], "forget") == {"index": [4, 7], "a": [1, 2]}
    assert "min_k of the set forget is not in the log: row 5 has none" in caplog.text
    partial = columns([0, 1], [{"a": 1, "ps_exact": 0.5}, {"a": 2}])
    assert partial == {"index": [0, 1], "a": [1, 2], "extraction": {"ps_exact": [0.5]}}


def test_a_word_does_not_end_an_answer():
    """Of an encode that writes no end: what all answers end with is a part of them, unless it is only added."""
    (one, _) = sets(3)
    for added, ends in (("", ()), ("\n", tuple(TOKENIZER("\n", add_special_tokens=False).input_ids))):

        def encode(question, answer, added=added):
            ids, labels = sources.Continuation(TOKENIZER, ends=False)(question, answer)
            more = TOKENIZER(added, add_special_tokens=False).input_ids
            return ids + more, labels + more

        own = replace(one, encode=encode)
        work = Evaluation([own], [encoded(own, TOKENIZER)], TOKENIZER)
        assert len({sample.right[1][-1] for sample in work.samples[0]}) == 1
        assert work.ends == tuple(sorted({TOKENIZER.eos_token_id, *ends}))


def test_rows_of_any_kind_are_read_once():
    datasets, (one, _) = pytest.importorskip("datasets"), sets(4)
    for held in (datasets.Dataset.from_list(one.rows), pandas.DataFrame(one.rows), iter(one.rows)):
        own = replace(one, rows=held)
        assert own.rows == one.rows and own.checksum() == one.checksum()
