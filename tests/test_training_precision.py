"""What is measured along a training in mixed precision is the model as it is saved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.training_tiny import TOKENIZER, collator, config, datasets, pairing, tiny_model
from transformers import AutoModelForCausalLM

import gfast
from gfast import wrappers
from gfast.evaluation import sources
from gfast.evaluation.results import summarize
from gfast.metrics.log import parse_log
from gfast.objectives import GA, WGA
from gfast.training import NLLCallback
from gfast.training.evaluation import nll
from gfast.training.records import read_step


def values(rows, quantity):
    return {(row["objective"], row["side"], row["group"]): row["value"] for row in rows if row["quantity"] == quantity}


@pytest.mark.parametrize("adapters", [False, True])
def test_numbers_along_a_run_in_bf16_are_those_of_the_saved_model(adapters, tmp_path):
    model = tiny_model()
    if adapters:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    sets = [replace(one, generate=8) for one in sources.bundled(4)]
    forget, retain = ([collator()([data[index] for index in range(4)])] for data in datasets())
    evaluate = gfast.EvaluateCallback(0, sets, TOKENIZER)
    effects = gfast.GEffectCallback(0, forget, retain, [GA(), WGA()], run_folder=tmp_path / "effects")
    risks = NLLCallback(0, forget, retain, label="NLL", run_folder=tmp_path / "nll")
    data, collate = pairing()
    args = config(tmp_path, retain_term="nll", max_steps=2, bf16=True)
    callbacks = [evaluate, effects, risks]
    trainer = gfast.UnlearnTrainer(model, args, train_dataset=data, data_collator=collate, callbacks=callbacks)
    trainer.train()
    if adapters:
        model.save_pretrained(tmp_path / "saved")
        saved = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "saved", is_trainable=True)
    else:
        trainer.save_model(tmp_path / "saved")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert next(saved.parameters()).dtype == torch.float32
    found = values(read_step(tmp_path / "nll", 2), "risk")
    assert found["NLL", "unlearn", ""] == pytest.approx(nll(saved, forget), rel=1e-6)
    assert found["NLL", "retain", ""] == pytest.approx(nll(saved, retain), rel=1e-6)
    found = values(read_step(tmp_path / "effects", 2), "g_effect")
    for effect in gfast.g_effect(saved, [GA(), WGA()], forget=forget, retain=retain):
        for side in ("unlearn", "retain"):
            name = (str(effect.objective), side, "total")
            assert found[name] == pytest.approx(effect.total(side), rel=1e-4)
    log = evaluate.evaluation.log(evaluate.evaluation.run(saved), "saved", {})
    for name, one in summarize(parse_log(log))["sets"].items():
        assert evaluate.summaries[2]["sets"][name] == pytest.approx(one, rel=1e-5)


def test_the_mixed_precision_of_a_training_is_put_back(tmp_path):
    """And a forward that somebody has put in the place of the model's own stays in either case."""
    model, calls = tiny_model(), []
    own = model.forward
    model.forward = lambda *args, **options: calls.append(1) or own(*args, **options)
    data, collate = pairing()
    args = config(tmp_path, retain_term="nll", bf16=True)
    trainer = gfast.UnlearnTrainer(model, args, train_dataset=data, data_collator=collate)
    trainer.train()
    batch = collator()([datasets()[0][0]])
    around = model.forward
    mixed = gfast.model_logp(model, batch)
    calls.clear()
    with wrappers.own_precision(model):
        plain = gfast.model_logp(model, batch)
    assert calls and model.forward is around
    assert torch.equal(gfast.model_logp(model, batch), mixed) and not torch.equal(mixed, plain)
    del model.forward
    assert torch.equal(gfast.model_logp(model, batch), plain)
