"""EvaluateCallback: evaluations along a training that change nothing of it, by one process or several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import training_parallel
from helpers.training_tiny import TOKENIZER, config, pairing, parameters, tiny_model
from test_training_parallel import together

import gfast
from gfast import metrics
from gfast.data import bundled_perturbed
from gfast.evaluation import Evaluation, EvaluationSet, encoded, sources
from gfast.files import read_json
from gfast.metrics.log import parse_log


def trained(folder, callbacks=(), **options):
    data, collate = pairing()
    model = tiny_model()
    args = config(folder, max_steps=3, **options)
    trainer = gfast.UnlearnTrainer(model, args, train_dataset=data, data_collator=collate, callbacks=list(callbacks))
    trainer.train()
    return parameters(model)


def test_evaluations_along_a_training(tmp_path):
    sets = [replace(one, generate=3) for one in sources.bundled(4)]
    callback = gfast.EvaluateCallback(2, sets, TOKENIZER, batch_size=3)
    found = trained(tmp_path / "with", [callback])
    assert all(torch.equal(value, found[name]) for name, value in trained(tmp_path / "without").items())
    assert sorted(callback.summaries) == [0, 2, 3]
    for step, summary in callback.summaries.items():
        log = metrics.load_log(tmp_path / "with" / "evaluations" / f"step-{step:08d}.json")
        assert metrics.probability(log)["forget"] == summary["sets"]["forget"]["probability"]
    # the first log can be the retain log of a later training
    again = gfast.EvaluateCallback(0, sets, TOKENIZER, batch_size=3, retain_log=metrics.load_log(
        tmp_path / "with" / "evaluations" / "step-00000000.json"))  # fmt: skip
    trained(tmp_path / "again", [again], learning_rate=0.3)
    assert sorted(again.summaries) == [0, 3]
    first, last = (again.summaries[step]["forget_quality"]["geometric"]["log10_p"] for step in (0, 3))
    assert first == 0 and last < 0
    # a course that begins anew leaves no logs of another
    trained(tmp_path / "with", [gfast.EvaluateCallback(0, sets, TOKENIZER, batch_size=3)])
    there = sorted(path.name for path in (tmp_path / "with" / "evaluations").iterdir())
    assert there == ["step-00000000.json", "step-00000003.json", "summaries.json"]


def test_processes_gather_what_one_finds(tmp_path):
    runs = {1: tmp_path / "one", 2: tmp_path / "two"}
    together(training_parallel.evaluated, runs)
    one, first, second = (read_json(runs[w] / f"process-{rank}.json") for w, rank in ((1, 0), (2, 0), (2, 1)))
    assert first == second and set(first) == {"0", "1", "2"}
    assert first["0"] == one["0"]  # the untrained model: the same numbers, bit for bit
    logs = [metrics.load_log(folder / "evaluations" / "step-00000000.json") for folder in runs.values()]
    for name, values in logs[0].sets["forget"].values.items():
        assert (values == logs[1].sets["forget"].values[name]).all()


def test_what_cannot_be_evaluated_is_said_before_training():
    rows = [{**row, "perturbed_answer": []} for row in bundled_perturbed()[0][:2]]
    one = EvaluationSet("forget", "mine", rows, paraphrase="paraphrased_answer", perturbed="perturbed_answer")
    with pytest.raises(ValueError, match="row 1: .*perturbed answers"):
        gfast.EvaluateCallback(1, [one], TOKENIZER)
    sets = sources.bundled(3)
    some = [encoded(one, TOKENIZER) for one in sets]
    work = Evaluation(sets, some, TOKENIZER)
    retain_log = parse_log(work.log(work.run(tiny_model()), "three rows", {}))
    with pytest.raises(ValueError, match="they are of 2 and 3 rows"):
        gfast.EvaluateCallback(1, sources.bundled(2), TOKENIZER, retain_log=retain_log)
    for every in (-1, 2.5, "2", float("nan"), True, None):
        with pytest.raises(ValueError, match="every is .*; give the optimizer steps between evaluations"):
            gfast.EvaluateCallback(every, sources.bundled(2), TOKENIZER)
    whole = EvaluationSet("forget", "texts", sets[0].rows, generate=0, encode=sources.WholeText(TOKENIZER))
    for options in ({"template": "plain"}, {"chat_kwargs": {"thinking": False}}):
        with pytest.raises(ValueError, match="have no effect on these sets, which write their own prompts"):
            gfast.EvaluateCallback(1, [whole], TOKENIZER, **options)
    rows = [{**row, "perturbed_answer": row["perturbed_answer"][:2]} for row in sets[1].rows]
    with pytest.raises(ValueError, match="they have 2 and . perturbed answers a row"):
        gfast.EvaluateCallback(1, [sets[0], replace(sets[1], rows=rows)], TOKENIZER, retain_log=retain_log)
