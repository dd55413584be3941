"""What is measured along a training in mixed precision is the model as it is saved."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import open_unlearning as ou
from helpers.cli import flags, write_original
from helpers.training_tiny import TOKENIZER, collator, config, copied, datasets, pairing, tiny_model
from transformers import AutoModelForCausalLM

import gfast
from gfast import cli, wrappers
from gfast.data import Collator, ForgetRetainCollator
from gfast.evaluation import sources
from gfast.evaluation.results import summarize
from gfast.metrics.log import parse_log
from gfast.objectives import GA, NPO, WGA
from gfast.training import NLLCallback, ReferenceCache
from gfast.training.batches import ReferenceJoin
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


@pytest.mark.parametrize("options", [dict(bf16=True), dict(bf16=False)])
def test_ratios_to_the_original_start_at_one(options, tmp_path, caplog):
    """In whatever precision the training is: values of the original of another are said to be so."""
    model, (data, collate), (forget, retain) = tiny_model(), pairing(), datasets()
    path = tmp_path / "retain.safetensors"

    def first_step(precision, folder):
        caplog.clear()
        build = partial(ReferenceCache.build, copied(model), collator=collator(), mixed_precision=precision)
        caches = {"forget": build(dataset=forget), "retain": build(dataset=retain, what={"hidden"}, path=path)}
        args = config(tmp_path / folder, objective="NPO:beta=0.3", retain_term="kl", logging_steps=1, **options)
        trainer = gfast.UnlearnTrainer(
            copied(model), args, references=caches, train_dataset=data, data_collator=collate
        )
        trainer.train()
        return trainer.state.log_history[0], [one for one in caplog.messages if "autocast" in one]

    training, other = ("bf16", "no") if options["bf16"] else ("no", "bf16")
    logs, said = first_step(training, "same")
    assert logs["forget_loss"] == pytest.approx(2 * math.log(2) / 0.3, rel=1e-6) and logs["mean_weight"] == 1
    assert logs["retain_loss"] == 0 and not said
    with pytest.raises(ValueError, match=f"computed with mixed_precision='{training}', not '{other}'"):
        first_step(other, "other")
    path.unlink()
    logs, said = first_step(other, "other")
    assert logs["mean_weight"] != 1 and logs["retain_loss"] > 0
    assert len(said) == 2 and all(f"mixed_precision='{training}'" in one for one in said)
    cache = ReferenceCache.build(model, forget, collator(), mixed_precision=other)
    joined = ForgetRetainCollator(Collator(TOKENIZER, cache), collator())
    args = config(tmp_path / "joined", objective="NPO", **options)
    gfast.UnlearnTrainer(copied(model), args, train_dataset=data, data_collator=joined)
    assert len([one for one in caplog.messages if "of the forget set were computed" in one]) == 2


@pytest.mark.parametrize("own", ["no", "bf16"])
def test_a_loop_and_effects_say_that_the_original_is_of_another_precision(own, caplog):
    """Once for a model, and of objectives that compare with it; batches that do not say theirs go without."""
    model, (forget, _) = tiny_model(), datasets()
    cache = ReferenceCache.build(model, forget, collator(), mixed_precision=own)
    batch = Collator(TOKENIZER, cache)([forget[index] for index in range(4)])
    silent = {key: value for key, value in batch.items() if key != "ref_precision"}
    pieces = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]

    def said(autocast, measure, of=batch, objective=NPO(beta=0.3)):  # noqa: B008 - frozen
        caplog.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = measure(of, objective)
        return value, [one for one in caplog.messages if "autocast" in one]

    def loss(of, objective):
        return [gfast.model_loss(model, one, objective).loss.item() for one in (of if isinstance(of, list) else [of])]

    right, wrong = own == "bf16", own != "bf16"
    at_start = pytest.approx(2 * math.log(2) / 0.3, rel=1e-6)
    assert said(right, loss) == ([at_start], []) and said(wrong, loss, objective=GA())[1] == []
    value, messages = said(wrong, loss, silent)
    assert value != [at_start] and messages == []
    value, messages = said(wrong, loss, pieces)
    assert value != [at_start] * 2 and len(messages) == 1
    assert f"mixed_precision='{'bf16' if wrong else 'no'}'" in messages[0] and said(wrong, loss)[1] == []
    joined = ReferenceJoin(lambda items: {**collator()(items), "ref_logp": batch["ref_logp"]}, {"forget": cache})
    assert "ref_precision" not in joined([forget[index] for index in range(4)])  # those are of nobody knows what
    narrow = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    for refused in (loss, lambda of, objective: gfast.g_effect(model, objective, forget=of, retain=of)):
        with pytest.raises(ValueError, match="ref_logp, have been cast to bfloat16.*precision='32-true'"):
            refused(narrow, NPO(beta=0.3))
    for engine in ("stream", "sample"):
        other, options = copied(model), dict(forget=batch, retain=batch, engine=engine)
        for autocast in (right, wrong):
            messages = said(autocast, lambda _, one, o=options, m=other: gfast.g_effect(m, one, **o))[1]
            assert len(messages) == (autocast == wrong)


def test_a_reference_is_of_the_precision_that_it_is_called_in(tmp_path):
    model, (forget, _) = tiny_model(), datasets()
    build = partial(ReferenceCache.build, dataset=forget, collator=collator())
    plain, mixed = build(model), build(model, path=tmp_path / "mixed.safetensors", mixed_precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        inside, outside = build(model), build(model, mixed_precision="no")
    args = config(tmp_path, bf16=True)
    accelerated = gfast.UnlearnTrainer(copied(model), args).accelerator.prepare(copied(model))
    config(tmp_path, bf16=False)
    around, own = build(accelerated), build(accelerated, mixed_precision="no")
    loaded = ReferenceCache.load(tmp_path / "mixed.safetensors", model=model, mixed_precision="bf16")
    for found, expected in ((inside, mixed), (around, mixed), (loaded, mixed), (outside, plain), (own, plain)):
        assert found.mixed_precision == expected.mixed_precision
        assert torch.equal(found.values["ref_logp"], expected.values["ref_logp"])
    assert (plain.mixed_precision, mixed.mixed_precision) == ("no", "bf16")
    assert not torch.equal(plain.values["ref_logp"], mixed.values["ref_logp"])
    with pytest.raises(ValueError, match="mixed_precision must be 'no', 'bf16', 'fp16' or None, not 'bfloat16'"):
        build(model, mixed_precision="bfloat16")


def test_what_is_measured_has_the_original_in_the_models_own_precision(tmp_path):
    """And not in the training's."""
    model, (data, collate), (forget, _) = tiny_model(), pairing(), datasets()
    caches = {"forget": ReferenceCache.build(model, forget, collator(), mixed_precision="bf16")}
    args = config(tmp_path, objective="NPO:beta=0.3", bf16=True, geffect_every=1)
    trainer = gfast.UnlearnTrainer(copied(model), args, references=caches, train_dataset=data, data_collator=collate)
    trainer.train()
    found = values(read_step(tmp_path, 0), "g_effect")
    batch = collator()([forget[index] for index in range(len(forget))])
    batch["ref_logp"] = gfast.model_logp(model, batch).detach()
    effect = gfast.g_effect(model, NPO(0.3), forget=batch, retain=batch)
    assert found["NPO(beta=0.3)", "unlearn", "total"] == pytest.approx(effect.total("unlearn"), rel=1e-5)


@pytest.mark.parametrize("objective", ["NPO", "DPO"])
def test_the_command_has_the_original_in_both_precisions(objective, tmp_path):
    original = write_original(tmp_path)
    options = dict(objective=objective, retain_term="kl", geffect_every=9, geffect_samples=2, max_steps=1)
    found = {}
    for precision in (True, False):
        folder = tmp_path / f"bf16-{precision}"
        assert cli.main(["unlearn", *flags(original, folder, bf16=precision, **options)]) == 0
        steps = {row["quantity"]: row["value"] for row in read_step(folder, 1)}
        assert steps["forget_loss"] == pytest.approx(2 * math.log(2) / 0.1, rel=1e-6) and steps["retain_loss"] == 0
        found[precision] = values(read_step(folder, 0), "g_effect")
    names = {path.name for path in (tmp_path / "bf16-True" / "reference").iterdir()}
    assert "retain-hidden-bf16.safetensors" in names and len(names) == 2
    for name, value in found[False].items():  # of the model before any step, in its own precision
        assert found[True][name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("objective", ["NPO", "DPO"])
def test_open_unlearnings_trainers_have_the_original_in_both_precisions(objective, tmp_path):
    method = {"retain_loss_type": "KL", "geffect_every": 9, "geffect_samples": 2, "beta": 0.1}
    found = []
    for precision in (True, False):
        args = dict(bf16=precision, max_steps=1, logging_steps=1)
        log = ou.trained(objective, tmp_path / str(precision), tiny_model(), method=method, **args).state.log_history
        step = next(one for one in log if "forget_loss" in one)
        assert step["forget_loss"] == pytest.approx(2 * math.log(2) / 0.1, rel=1e-6) and step["retain_loss"] == 0
        found.append({name: value for name, value in log[0].items() if name.startswith("geffect/")})
    assert found[0] == pytest.approx(found[1], rel=1e-5)
