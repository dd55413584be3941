"""UnlearnTrainer: gradients, accumulation, objectives, references, evaluation, logs."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.training_tiny import (
    FORGET_ROWS,
    TOKENIZER,
    collator,
    config,
    copied,
    datasets,
    pairing,
    parameters,
    tiny_model,
)
from torch.utils.data import Subset

from gfast.objectives import (
    CEU,
    DPO,
    GA,
    JSD,
    KL,
    NLL,
    NPO,
    PO,
    RMU,
    RR,
    SHRED,
    TNPO,
    UNDIAL,
    WGA,
    WTNPO,
    JensUn,
    Mix,
    SatImp,
    SimNPO,
    Unilogit,
)
from gfast.training.records import read_records
from gfast.training.reference import ReferenceCache
from gfast.training.trainer import UnlearnTrainer


def train(model, args, kind="qa", references=None, objective=None, **options):
    data, collate = pairing(kind)
    options = {"train_dataset": data, "data_collator": collate, **options}
    trainer = UnlearnTrainer(model, args, objective=objective, references=references, **options)
    trainer.train()
    return trainer


def plain_nll(model, batches):
    """Sum of NLL and number of tokens, with nothing of gfast's in it."""
    total, tokens = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        total = total + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        tokens += int((labels != -100).sum())
    return total, tokens


def test_one_step_is_the_hand_computed_gradient(tmp_path):
    model = tiny_model()
    before, twin = parameters(model), copied(model).double()
    args = config(tmp_path, optim="sgd", per_device_train_batch_size=6, retain_term="nll", gamma=0.5, alpha=2.0)
    train(model, args)
    forget, retain = datasets()
    (ascent, n), (descent, m) = (plain_nll(twin, [collator()([d[i] for i in range(6)])]) for d in (forget, retain))
    (-0.5 * ascent / n + 2.0 * descent / m).backward()
    moved = {name: (before[name] - parameter.detach()) / 1e-2 for name, parameter in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        scale = parameter.grad.abs().max()
        assert (moved[name] - parameter.grad).abs().max() <= 2e-4 * scale, name


def test_accumulation_equals_one_big_batch(tmp_path):
    results = []
    for batch_size, accumulate in ((6, 1), (2, 3), (4, 2)):
        model = tiny_model()
        args = config(
            tmp_path / f"{batch_size}",
            optim="sgd",
            retain_term="nll",
            objective="SimNPO",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
        )
        trainer = train(model, args)
        results.append((parameters(model), trainer.state.log_history[0]))
    (expected, log), *others = results
    before = parameters(tiny_model())
    for found, other_log in others:
        for name, value in expected.items():
            step = (value - before[name]).abs().max()
            assert (found[name] - value).abs().max() <= 1e-4 * step, name
        for key in ("loss", "forget_loss", "retain_loss", "mean_weight", "mean_inverse_confidence"):
            assert other_log[key] == pytest.approx(log[key], rel=1e-5), key


def test_a_step_without_dropout_is_the_same_step(tmp_path):
    class WithoutDropout(UnlearnTrainer):
        def compute_loss(self, model, *args, **kwargs):
            model.eval()
            return super().compute_loss(model, *args, **kwargs)

    found = []
    for trainer in (UnlearnTrainer, WithoutDropout):
        args = config(tmp_path / trainer.__name__, optim="sgd", retain_term="nll", gradient_accumulation_steps=3)
        data, collate = pairing()
        run = trainer(tiny_model(), args, train_dataset=data, data_collator=collate)
        run.train()
        found.append(run.state.log_history[0]["loss"])
        # outside a training a loss is over its own count
        item = collate([data[0]])
        alone = (run.compute_loss(run.model.train(mode), item).item() for mode in (True, False))
        assert len({round(value, 5) for value in alone}) == 1
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def cache_for(objective, side_data, model, **options):
    from gfast.training.batches import needed_from_cache

    what = needed_from_cache(objective)
    layer = getattr(objective, "layer", None) if "layer_hidden" in what else None
    return ReferenceCache.build(model, side_data, collator(), what=what, layer=layer, **options) if what else None


@pytest.mark.parametrize(
    "objective",
    [
        GA(),
        WGA(alpha=0.5),
        SatImp(),
        TNPO(),
        WTNPO(),
        NPO(),
        SimNPO(),
        DPO(),
        PO(),
        NLL(),
        Mix(NPO(), KL()),
        Mix(GA(), NLL(), alpha=2.0),
        Mix(RMU(layer=1, c=2.0), RR(layer=1)),
        RMU(layer=1),
        Mix(UNDIAL(), JSD()),
        Mix(CEU(), NLL()),
        SHRED(),
        Unilogit(),
        JensUn((3, 4)),
    ],
    ids=str,
)
def test_every_objective_trains(tmp_path, objective):
    model = tiny_model()
    before = parameters(model)
    mix = objective if isinstance(objective, Mix) else Mix(objective)
    kind = {"dpo": "pairs", "po": "refusal"}.get(mix.forget.key, "qa")
    forget, retain = datasets(kind)
    references = {"forget": cache_for(mix.forget, forget, model)}
    if mix.retain is not None:
        references["retain"] = cache_for(mix.retain, retain, model)
    references = {side: cache for side, cache in references.items() if cache is not None}
    trainer = train(model, config(tmp_path), kind, references, objective)
    log = trainer.state.log_history[0]
    assert math.isfinite(log["loss"]) and math.isfinite(log["forget_loss"])
    assert any((value != before[name]).any() for name, value in parameters(model).items())
    if mix.forget.key == "npo":
        assert log["forget_loss"] == pytest.approx(2 * math.log(2) / 0.1, rel=1e-4)
    if mix.forget.key in ("npo", "tnpo", "ga"):
        assert log["mean_weight"] == pytest.approx(1.0, rel=1e-4)
    if isinstance(mix.retain, (KL, RR, JSD)):
        assert abs(log["retain_loss"]) < 1e-5


def test_hidden_states_of_another_layer_are_refused(tmp_path):
    model, (_, retain) = tiny_model(), datasets()
    cache = ReferenceCache.build(model, retain, collator(), what={"layer_hidden"}, layer=0)
    with pytest.raises(ValueError, match="holds hidden states of layer 0, not 1"):  # was trained towards those
        train(model, config(tmp_path), references={"retain": cache}, objective=Mix(RMU(layer=1), RR(layer=1)))


def test_a_reference_that_is_needed_and_missing_is_said_before_any_work(tmp_path):
    model = tiny_model()
    before = parameters(model)
    with pytest.raises(ValueError, match=r"NPO\(beta=0.1\) needs ref_logp .*ReferenceCache.build"):
        train(model, config(tmp_path, objective="NPO"))
    with pytest.raises(ValueError, match="KL.*ref_head, ref_hidden"):
        train(model, config(tmp_path, retain_term="kl"))
    assert all((value == before[name]).all() for name, value in parameters(model).items())


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no parameter of the model is trained"):
        train(tiny_model().requires_grad_(False), config(tmp_path))


@pytest.mark.parametrize(
    ("options", "rows", "words"),
    [
        ({"max_steps": -1, "num_train_epochs": 0}, 4, "num_train_epochs is 0 and max_steps -1: no step would be taken"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 3}, 2, "the 2 rows .* fewer than the 3 that"),
        ({}, 0, "the training data set is empty"),
    ],
)
def test_a_training_without_a_step_is_refused(options, rows, words, tmp_path):
    data, collate = pairing()
    with pytest.raises(ValueError, match=words):
        train(tiny_model(), config(tmp_path, **options), train_dataset=Subset(data, range(rows)))


def test_a_loss_after_a_training_is_of_its_batch_alone(tmp_path):
    """And so are the terms that the model adds to its own loss, whatever the last step's micro-batches were."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_local_experts=4)
    options = dict(num_key_value_heads=1, output_router_logits=True, router_aux_loss_coef=0.7)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=len(TOKENIZER), **sizes, **options))
    forget, _ = datasets()
    own = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, own_loss_terms=True, objective="NLL")
    trainer = train(model, config(tmp_path, **own), train_dataset=forget, data_collator=collator())
    batch = collator()([forget[0], forget[1]])
    del batch["sample_id"]
    with torch.no_grad():
        found, expected = trainer.compute_loss(model, batch), model.eval()(**batch).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_logged_terms_are_the_objectives_without_the_models_own(tmp_path):
    """Whatever their factors are: and so the dual variable of PDU, which moves by the retain loss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_local_experts=4)
    options = dict(num_key_value_heads=1, output_router_logits=True, router_aux_loss_coef=5.0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=len(TOKENIZER), **sizes, **options))
    given = dict(objective="PDU:primal_dual=true,dual_step_size=0.5", retain_term="nll", gamma=0.2, alpha=0.5)
    found = []
    for own in (False, True):
        data, collate = pairing()
        args = config(tmp_path / str(own), own_loss_terms=own, **given)
        trainer = train(copied(model), args, train_dataset=data, data_collator=collate)
        found.append([*(trainer.state.log_history[0][name] for name in ("forget_loss", "retain_loss", "loss")),
                      trainer.dual.value])  # fmt: skip
    (*plain, loss, dual), (*beside, whole, moved) = found
    assert beside == pytest.approx(plain, rel=1e-6) and moved == pytest.approx(dual, rel=1e-6) != given["alpha"]
    assert whole > loss + 5.0


def test_a_retain_term_without_retain_batches_is_refused(tmp_path):
    forget, _ = datasets()
    with pytest.raises(ValueError, match="has a retain term, but the batches hold only forget"):
        train(tiny_model(), config(tmp_path, retain_term="nll"), train_dataset=forget, data_collator=collator())


def test_plain_batches_are_forget_batches(tmp_path):
    forget, _ = datasets()
    trainer = train(tiny_model(), config(tmp_path), train_dataset=forget, data_collator=collator())
    assert trainer.state.log_history[0]["forget_loss"] < 0


def test_adapters_off_are_the_reference(tmp_path):
    peft = pytest.importorskip("peft")
    results = []
    for cached in (False, True):
        model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        forget, retain = datasets()
        references = None
        if cached:
            with pytest.raises(ValueError, match="adapters are not zero"):
                cache_for(TNPO(), forget, model)
            references = {
                "forget": cache_for(TNPO(), forget, model, reference="base"),
                "retain": cache_for(KL(), retain, model, reference="base"),
            }
            assert references["forget"].model_fingerprint == cache_for(TNPO(), forget, tiny_model()).model_fingerprint
        args = config(tmp_path / str(cached), objective="TNPO", retain_term="kl", max_steps=2, reference="base")
        trainer = train(model, args, references=references)
        assert trainer.state.log_history[0]["retain_loss"] > 1e-3
        results.append(parameters(model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-6)


def test_evaluation_is_the_exact_token_mean(tmp_path):
    model = tiny_model()
    data, collate = pairing()
    forget, retain = datasets()
    args = config(tmp_path, per_device_eval_batch_size=4)
    trainer = UnlearnTrainer(model, args, train_dataset=data, eval_dataset=data, data_collator=collate)
    nested = trainer.evaluate()
    model.eval()
    with torch.no_grad():
        (forgotten, n), (kept, m) = (
            plain_nll(model, [collator()([item[side] for item in (data[i] for i in range(6))])])
            for side in ("forget", "retain")
        )
    assert nested["eval_forget_loss"] == pytest.approx(float(forgotten) / n, rel=1e-5)
    assert nested["eval_retain_loss"] == pytest.approx(float(kept) / m, rel=1e-5)
    assert nested["eval_loss"] == pytest.approx(float(forgotten + kept) / (n + m), rel=1e-5)
    plain = UnlearnTrainer(model, args, train_dataset=data, eval_dataset=forget, data_collator=collator()).evaluate()
    assert plain["eval_loss"] == pytest.approx(float(forgotten) / n, rel=1e-5)
    assert len(retain) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluations_along_a_run_are_of_the_same_pairs(tmp_path, workers):
    """Also of the data that are trained on, which pair anew each epoch, and with workers that outlive an evaluation."""
    data, collate = pairing(rows=FORGET_ROWS[:2])
    more = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True} if workers else {}
    args = config(tmp_path, retain_term="nll", num_train_epochs=3, eval_strategy="epoch", **more)
    args.max_steps, args.learning_rate = -1, 0.0
    trained, others = [], pairing(rows=FORGET_ROWS[:2])[0]
    for evaluated in (data, others):
        trainer = UnlearnTrainer(tiny_model(), args, train_dataset=data, eval_dataset=evaluated, data_collator=collate)
        trainer.train()
        logs = trainer.state.log_history
        trained = [log["retain_loss"] for log in logs if "retain_loss" in log]
        found = [log["eval_retain_loss"] for log in logs if "eval_retain_loss" in log]
        assert len(set(trained)) == 3 and found == [pytest.approx(trained[0], rel=1e-5)] * 3
    trainer.data_collator = collator()
    apart = [trainer.evaluate(side)["eval_loss"] for side in (data.forget, data.retain)]
    both = [plain_nll(trainer.model, [collator()([side[i] for i in range(len(side))])]) for side in datasets()]
    assert apart[1] == pytest.approx(float(both[1][0].detach()) / both[1][1], rel=1e-5) and apart[0] != apart[1]


def test_data_that_no_cache_knows_are_evaluated(tmp_path):
    """An NLL needs nothing of the original: data of other sample ids, and of those of the training's."""
    model, (forget, retain) = tiny_model(), datasets()
    cache = ReferenceCache.build(model, forget, collator())
    args = config(tmp_path, objective="NPO", per_device_eval_batch_size=4)
    trainer = UnlearnTrainer(model, args, train_dataset=forget, data_collator=collator(), references={"forget": cache})
    total, n = plain_nll(model.eval(), [collator()([retain[i] for i in range(6)])])
    expected = float(total.detach()) / n
    for offset in (0, 1000):
        data = [{**retain[i], "sample_id": i + offset} for i in range(6)]
        assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert trainer.predict(data).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert "ref_logp" in next(iter(trainer.get_train_dataloader()))


def test_terms_are_recorded_each_step(tmp_path):
    trainer = train(tiny_model(), config(tmp_path / "run-a", objective="WGA", retain_term="nll", max_steps=3))
    frame = read_records(tmp_path / "run-a")
    assert sorted(frame["step"].unique()) == [1, 2, 3]
    assert set(frame["run"]) == {"run-a"} and set(frame["objective"]) == {"WGA(alpha=1.0) + NLL()"}
    table = frame.pivot(index="step", columns="quantity", values="value")
    assert set(table.columns) == {
        "loss", "forget_loss", "retain_loss", "mean_weight", "mean_inverse_confidence", "learning_rate",
    }  # fmt: skip
    logged = [entry["mean_inverse_confidence"] for entry in trainer.state.log_history if "loss" in entry]
    assert table["mean_inverse_confidence"].tolist() == pytest.approx(logged)
    assert (table["mean_inverse_confidence"] > 1).all() and (table["mean_weight"] < 1).all()
    assert set(table["learning_rate"]) == {1e-2}


def test_config_refuses_what_cannot_be_meant(tmp_path):
    for options, words in (
        ({"objective": "GAA"}, "no objective is called"),
        ({"objective_args": ["alpha"]}, "should read name=number"),
        ({"objective": "SatImp:beta1=5,beta1=1"}, "give beta1 twice, as 5 and as 1"),
        ({"objective": "WGA", "objective_args": ["beta=1"]}, "no parameter beta"),
        ({"retain_term": "ce"}, "choose one of none, nll, kl, jsd, rr"),
        ({"retain_term": "rr"}, "use RMU"),
        ({"remove_unused_columns": True}, "must be False"),
        ({"geffect_every": -1}, "give 0 or more"),
        ({"objective": "WGA", "alpha": 0.5}, "alpha is 0.5, and has no effect without --retain_term.*WGA:alpha=0.5"),
        ({"weights_tau": 0.5}, "weights_tau is 0.5, and has no effect without --weights"),
    ):
        with pytest.raises(ValueError, match=words):
            config(tmp_path, **options)
    assert config(tmp_path).label_names == ["labels"]
    with pytest.raises(ValueError, match="takes an UnlearnConfig"):
        from transformers import TrainingArguments

        UnlearnTrainer(tiny_model(), TrainingArguments(output_dir=str(tmp_path)))


def test_autocast_ends_with_an_error(tmp_path):
    model = tiny_model()
    model.model.norm.register_forward_hook(lambda *args: (_ for _ in ()).throw(ArithmeticError("no")))
    for call in ("train", "evaluate"):
        data = datasets()[0]
        args = config(tmp_path, bf16=True, max_steps=1)
        trainer = UnlearnTrainer(model, args, train_dataset=data, eval_dataset=data, data_collator=collator())
        with pytest.raises(ArithmeticError):
            getattr(trainer, call)()
        assert not torch.is_autocast_enabled("cpu")


def test_bf16_autocast_trains(tmp_path):
    trainer = train(tiny_model(), config(tmp_path, objective="WGA", bf16=True, retain_term="nll"))
    exact = train(tiny_model(), config(tmp_path, objective="WGA", retain_term="nll"))
    found, expected = (t.state.log_history[0]["loss"] for t in (trainer, exact))
    assert found == pytest.approx(expected, rel=0.05)
    assert TOKENIZER.vocab_size
