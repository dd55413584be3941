"""Adapters: what they do to a batch, and the original model that they hide."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from helpers.border import DATA, adapted, literal_nll
from helpers.geffect_models import gradient, tiny

import gfast
from gfast import model_state, peft_models
from gfast.geffect import processes
from gfast.hidden_states import layer_hidden
from gfast.model_output import model_output
from gfast.objectives import GA, KL, NLL, NPO, RR, TNPO, WGA, Mix


@pytest.mark.parametrize("engine", [None, "stream", "sample", "token", "gram"])
def test_adapters_that_begin_where_a_phrase_is(engine):
    """Activated LoRA reads the tokens in PeftModel.forward."""
    if "alora_invocation_tokens" not in pytest.importorskip("peft").LoraConfig.__dataclass_fields__:
        pytest.skip("this version of peft has no activated LoRA")
    data = copy.deepcopy(DATA)
    for side in data.values():
        for batch in side:
            batch["input_ids"][:, 2] = 7
    model = adapted(alora_invocation_tokens=[7], init_lora_weights=False).double()
    everywhere = adapted(init_lora_weights=False).double()
    everywhere.load_state_dict(model.state_dict())
    plain = {key: value for key, value in data["forget"][0].items() if key != "ref_logp"}
    assert abs(literal_nll(model, plain) - literal_nll(everywhere, plain)) > 1e-4
    if engine is None:
        torch.testing.assert_close(gfast.model_loss(model, plain, NLL()).loss, literal_nll(model, plain))
        return

    def risk(side):
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in side]
        plain = [{key: value for key, value in batch.items() if key != "ref_logp"} for batch in side]
        parts = zip(plain, counts, strict=True)
        return gradient(model, sum(literal_nll(model, batch) * count for batch, count in parts) / sum(counts))

    own, other = risk(data["forget"]), risk(data["retain"])
    if engine in ("sample", "gram"):  # the adapter sees some tokens of all samples in one list
        with pytest.raises(ValueError, match="lora_.*whose rows cannot be told apart by sample"):
            gfast.g_effect(model, WGA(), engine=engine, groups=lambda name: "all", **data)
        return
    effect = gfast.g_effect(model, GA(), engine=engine, groups=lambda name: "all", **data)
    assert effect.unlearn["all"] == pytest.approx(-sum(float((own[n] * own[n]).sum()) for n in own), rel=1e-8)
    assert effect.retain["all"] == pytest.approx(-sum(float((own[n] * other[n]).sum()) for n in own), rel=1e-7)


def test_adapters_by_sample():
    """adapter_names is PEFT's input, and reaches the layers through its own forward."""
    model = adapted(init_lora_weights=False).double()
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    rows = len(batch["input_ids"])
    mixed = batch | {"adapter_names": ["__base__"] + ["default"] * (rows - 1)}
    logp = gfast.model_logp(model, mixed)
    on = gfast.model_logp(model, batch)
    with peft_models.adapters_off(model):
        off = gfast.model_logp(model, batch)
    torch.testing.assert_close(logp, torch.cat([off[:1], on[1:]]))
    assert not torch.allclose(on[:1], off[:1])
    for engine in ("sample", "gram"):  # the adapter sees some samples alone
        with pytest.raises(ValueError, match=f"the {engine} engine cannot attribute the module .*lora_"):
            gfast.g_effect(model, WGA(), engine=engine, forget=mixed, retain=batch)
    directions = gfast.risk_gradients(model, forget=mixed, retain=mixed)
    turned = mixed | {"adapter_names": mixed["adapter_names"][::-1]}
    with pytest.raises(ValueError, match="measured on other forget data"):
        gfast.g_effect(model, GA(), forget=turned, retain=mixed, directions=directions)
    for part, name in zip(processes._parts(mixed, 1), mixed["adapter_names"], strict=True):
        assert part["adapter_names"] == [name]
    row = {key: batch[key].reshape(1, -1) for key in ("input_ids", "labels")} | {"adapter_names": ["__base__"]}
    row["position_ids"] = torch.arange(batch["input_ids"].shape[1]).repeat(rows)[None]
    row["labels"] = torch.where(row["position_ids"] == 0, -100, row["labels"])
    with pytest.raises(ValueError, match="'adapter_names' .1 of them. of a packed batch belongs to rows"):
        gfast.pg_effect(model, forget=row, retain=batch)


def start(model, values: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=values)


CONFIGS = {
    "plain": ({}, None),
    "dora": ({"use_dora": True}, None),
    "saved head": ({"modules_to_save": ["lm_head"]}, None),
    "trained biases": (
        {"bias": "all", "target_modules": ["fc1", "q_proj"]},
        r"q_proj.base_layer.bias' and \d+ more of the base stays",
    ),
    "pissa": ({"init_lora_weights": "pissa"}, "initialised by 'pissa', which rewrote the base"),
    "olora": ({"init_lora_weights": "olora"}, "initialised by 'olora', which rewrote the base"),
    "layers repeated": ({"layer_replication": [[0, 2], [1, 2]]}, "initialised by 'layer_replication', which rewrote"),
    "kasa": ({"kasa_config": "KasaConfig"}, "initialised by 'kasa_config', which rewrote the base"),
}


@pytest.mark.parametrize("objective", [NPO(0.3), TNPO(), KL(), RR(layer=2)], ids=str)
@pytest.mark.parametrize("kind", [*CONFIGS, "trained norm", "not zero"])
def test_with_adapters_the_original_is_the_base_or_refused(kind, objective):
    peft = pytest.importorskip("peft")
    options, message = CONFIGS.get(kind, ({}, None))
    base = tiny("phi" if kind == "trained biases" else "llama", dtype=torch.float32).eval()
    original = copy.deepcopy(base)
    options = dict(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM") | options
    if kind == "kasa":
        if not hasattr(peft, "KasaConfig"):
            pytest.skip("this version of PEFT has no KaSA")
        options["kasa_config"] = peft.KasaConfig()
    model = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    if kind == "trained norm":
        model.base_model.model.model.norm.weight.requires_grad_(True)
        message = r"norm.weight'.*of the base stays"
    if kind == "not zero":
        start(model, 0.5)
        message = "adapters are not zero.*reference='base'"
    batch = {key: value for key, value in DATA["retain"][0].items() if key != "ref_logp"}
    if message is not None:
        with pytest.raises(ValueError, match=message):
            gfast.model_loss(model, batch, objective)
        if kind != "not zero":
            return
    else:
        gfast.model_loss(model, batch, objective)  # looks at the adapters: they are zero
        start(model, 0.5)  # as training does
    found = gfast.model_loss(model, batch, objective, reference="base" if kind == "not zero" else "auto").loss
    given = dict(batch)
    with torch.no_grad():
        head, hidden, _ = model_output(original, batch)
        given |= dict(ref_logp=gfast.model_logp(original, batch), ref_hidden=hidden, ref_head=head.weight.detach())
        given |= dict(ref_layer_hidden=layer_hidden(original, batch, 2))
    torch.testing.assert_close(found, gfast.model_loss(model, given, objective).loss)


@pytest.mark.parametrize("active", [["taught"], ["default", "taught"]], ids=str)
def test_adapters_that_are_switched_on_later_are_looked_at_themselves(active):
    """That others were zero says nothing of the model with these: it may start from what they have learned."""
    peft = pytest.importorskip("peft")
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("llama", dtype=torch.float32).eval(), config)
    start(model, 0.0)
    gfast.model_loss(model, batch, NPO())  # default is zero
    model.add_adapter("taught", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.taught" in name:
                parameter.normal_(std=0.5)
    model.base_model.set_adapter(active if len(active) > 1 else active[0])
    with pytest.raises(ValueError, match="adapters are not zero"):
        gfast.model_loss(model, batch, NPO())
    expected = gfast.model_loss(model, batch, NPO(), reference="base").loss  # from now on it is said
    torch.testing.assert_close(gfast.model_loss(model, batch, NPO()).loss, expected)
    model.base_model.set_adapter("default")
    start(model, 0.5)
    gfast.model_loss(model, batch, NPO())  # which was zero


def taught_adapters(peft):
    """A model with adapters that have learned something, and what makes a fresh one, alike in names and shapes."""
    from helpers.training_tiny import tiny_model

    def fresh():
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
        return peft.get_peft_model(tiny_model(), config)

    taught = fresh()
    start(taught, 0.5)
    return taught, fresh


@pytest.mark.parametrize("how", ["set_peft_model_state_dict", "load_adapter", "delete and load", "load_state_dict"])
def test_taught_adapters_in_the_place_of_fresh_ones_are_looked_at_again(how, tmp_path):
    """The name of an adapter says nothing of what it has learned."""
    from helpers.training_tiny import collator, datasets

    peft = pytest.importorskip("peft")
    taught, fresh = taught_adapters(peft)
    taught.save_pretrained(tmp_path)
    model, batch = fresh(), collator()([datasets()[0][0]])
    gfast.model_loss(model, batch, NPO())  # zero
    if how == "set_peft_model_state_dict":
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(taught))
    elif how == "load_state_dict":
        model.load_state_dict(taught.state_dict())
    else:
        if how == "delete and load":
            model.add_adapter("other", model.peft_config["default"])
            model.set_adapter("other")
            model.delete_adapter("default")
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
        model.set_adapter("default")
    with pytest.raises(ValueError, match="adapters are not zero"):
        gfast.model_loss(model, batch, NPO())
    gfast.model_loss(model, batch, NPO(), reference="base")  # now it is said
    gfast.model_loss(model, batch, NPO())


def test_an_adapter_made_anew_under_the_same_name_is_looked_at_again():
    from helpers.training_tiny import collator, datasets, tiny_model

    peft = pytest.importorskip("peft")
    settings = dict(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(**settings))
    batch = collator()([datasets()[0][0]])
    gfast.model_loss(model, batch, NPO())
    model.delete_adapter("default")
    model.add_adapter("default", peft.LoraConfig(**settings, init_lora_weights=False))
    model.set_adapter("default")
    with pytest.raises(ValueError, match="adapters are not zero"):
        gfast.model_loss(model, batch, NPO())


def test_of_a_batch_without_labels_all_tokens_are_looked_at():
    from helpers.training_tiny import collator, datasets

    model, _ = taught_adapters(pytest.importorskip("peft"))
    batch = collator()([datasets()[0][0]])
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for one in (empty, batch):
        with pytest.raises(ValueError, match="adapters are not zero"):
            gfast.model_loss(model, one, NPO())
    start(model, 0.0)
    assert float(gfast.model_loss(model, empty, NPO(), reduction="sum").loss) == 0
    start(model, 0.5)
    assert float(gfast.model_loss(model, batch, NPO()).loss) != 0  # which were zero


def test_a_lightly_taught_adapter_of_a_16_bit_model_is_no_rounding():
    from helpers.training_tiny import collator, datasets

    peft = pytest.importorskip("peft")
    batch = collator()([datasets()[0][0]])
    taught, make = taught_adapters(peft)
    taught, fresh = taught.to(torch.bfloat16), make().to(torch.bfloat16)
    start(taught, 1e-3)
    with model_state.evaluating(taught), torch.no_grad(), taught.disable_adapter():
        base = gfast.model_logp(taught, batch)
    with model_state.evaluating(taught), torch.no_grad():
        apart = (gfast.model_logp(taught, batch) - base).abs().sum() / (base != 0).sum()
    assert 0 < apart < 2e-2  # less than what 16 bits round by
    with pytest.raises(ValueError, match="adapters are not zero"):
        gfast.model_loss(taught, batch, NPO())
    gfast.model_loss(fresh, batch, NPO())


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "orthogonal"}], ids=str
)
def test_fresh_adapters_of_a_16_bit_model_add_nothing(options):
    from helpers.training_tiny import collator, datasets, tiny_model

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM", **options)
    try:
        model = peft.get_peft_model(tiny_model().to(torch.bfloat16), config)
    except ValueError:
        pytest.skip("this version of PEFT has no such adapters")
    loss = gfast.model_loss(model, collator()([datasets()[0][0]]), NPO(), reference="auto").loss
    assert loss.item() == pytest.approx(13.8629, rel=2e-2)


@pytest.mark.parametrize("objective", ["GA", "NPO"])
def test_a_checkpoint_tells_whether_the_base_was_the_original(objective, tmp_path):
    """A run by GA never looked: that its adapters are not zero may be what they had learned before it."""
    from helpers.training_tiny import config, pairing

    from gfast.training import UnlearnTrainer

    taught, fresh = taught_adapters(pytest.importorskip("peft"))
    data, collate = pairing()

    def trained(model, objective, steps, resume=None):
        args = config(tmp_path, objective=objective, max_steps=steps, save_strategy="steps", save_steps=1)
        trainer = UnlearnTrainer(model, args, train_dataset=data, data_collator=collate)
        trainer.train(resume_from_checkpoint=resume)

    trained(taught if objective == "GA" else fresh(), objective, 1)
    if objective == "GA":
        with pytest.raises(ValueError, match="adapters are not zero"):
            trained(fresh(), "NPO", 2, resume=True)
    else:
        trained(fresh(), "NPO", 2, resume=True)


@pytest.mark.parametrize("began", [True, False])
def test_effects_of_a_resumed_run_know_the_original_if_they_were_there_at_its_start(began, tmp_path):
    """In any Trainer: a callback that comes later has not seen what the adapters were."""
    from helpers.training_tiny import collator, datasets
    from transformers import Trainer, TrainingArguments

    _, fresh = taught_adapters(pytest.importorskip("peft"))
    (forget, retain), collate = datasets(), collator()
    batch, kept = collate([forget[0]]), collate([retain[0]])

    def trained(steps, measured, resume=None):
        args = TrainingArguments(
            str(tmp_path), max_steps=steps, use_cpu=True, save_steps=1, disable_tqdm=True, remove_unused_columns=False,
            report_to=[], learning_rate=0.1,
        )  # fmt: skip
        callbacks = [gfast.GEffectCallback(1, [batch], [kept], Mix(NLL(), KL()))] if measured else []
        plain = lambda items: {key: value for key, value in collate(items).items() if key != "sample_id"}  # noqa: E731
        Trainer(fresh(), args, train_dataset=forget, data_collator=plain, callbacks=callbacks).train(
            resume_from_checkpoint=resume
        )

    trained(1, began)
    if began:
        trained(2, True, resume=True)
    else:
        with pytest.raises(ValueError, match="adapters are not zero"):
            trained(2, True, resume=True)


@pytest.mark.parametrize("reference", ["auto", "base", "adapted"])
def test_a_cache_of_a_model_whose_adapters_learned_the_data(reference, tmp_path):
    from helpers.training_tiny import collator, datasets, tiny_model

    from gfast.training import ReferenceCache

    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    start(model, 0.5)
    data, path = datasets()[0], tmp_path / "reference.safetensors"
    build = functools.partial(ReferenceCache.build, model, data, collator(), path)
    if reference == "auto":
        with pytest.raises(ValueError, match="adapters are not zero"):
            build()
        assert not path.exists()
        return
    cache = build(reference=reference)
    item = collator()([data[0]])
    with torch.no_grad(), model_state.evaluating(model):
        if reference == "adapted":
            expected = gfast.model_logp(model, item)
        else:
            with model.disable_adapter():
                expected = gfast.model_logp(model, item)
    torch.testing.assert_close(cache.get(int(item["sample_id"][0]))["ref_logp"], expected[0])
    build(reference=reference)  # loads it
    start(model, 0.4)  # other adapters
    if reference == "adapted":
        with pytest.raises(ValueError, match="for another model"):
            build(reference=reference)
    else:
        build(reference=reference)


def test_a_base_below_transformers_own_adapters_is_not_at_hand(monkeypatch):
    """`AutoModelForCausalLM.from_pretrained(an adapter's folder)` gives such models too."""
    from helpers.training_tiny import collator, datasets, tiny_model

    from gfast.training import ReferenceCache

    peft = pytest.importorskip("peft")
    integration = pytest.importorskip("transformers.integrations.peft")
    monkeypatch.setattr(integration, "check_peft_version", lambda **_: None)
    model, data = tiny_model(), datasets()[0]
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    start(model, 0.5)
    for reference in ("auto", "base", "adapter:default"):
        with pytest.raises(ValueError, match="adapters of this model are transformers' own"):
            ReferenceCache.build(model, data, collator(), reference=reference)
    item = collator()([data[0]])
    with torch.no_grad(), model_state.evaluating(model):
        expected = gfast.model_logp(model, item)
    cache = ReferenceCache.build(model, data, collator(), reference="adapted")
    torch.testing.assert_close(cache.get(int(item["sample_id"][0]))["ref_logp"], expected[0])


def test_switching_adapters_off_and_on_leaves_them_as_they_were():
    model = adapted()
    frozen = [p for name, p in model.named_parameters() if "lora_A" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with peft_models.adapters_off(model):
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_adapters_that_are_off_stay_off():
    """In somebody's disable_adapter() the model is the base, and still is after the original has been asked."""
    model, batch = adapted(), {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    start(model, 0.4)
    with model.disable_adapter():
        expected = gfast.model_logp(model, batch)
        out = gfast.model_loss(model, batch, NPO(beta=0.5), reference="base")
        torch.testing.assert_close(out.logp, expected)
        torch.testing.assert_close(gfast.model_logp(model, batch), expected)
    assert (gfast.model_logp(model, batch) - expected).abs().max() > 1e-3
