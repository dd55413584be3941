"""Where a user's model, batch or adapter meets gfast: the same function as `model(**batch)`, or an error by name."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
import transformers
from helpers.geffect_models import VOCAB, batches, dots, gradient, literal_loss, tiny

import gfast
from gfast import hf, model_state, wrappers
from gfast.hidden_states import layer_hidden
from gfast.model import model_output
from gfast.objectives import GA, KL, NLL, NPO, RMU, RR, TNPO, WGA

DATA = dict(forget=batches(1), retain=batches(2))


def literal_nll(model, batch, **inputs) -> torch.Tensor:
    given = {key: value for key, value in batch.items() if key not in ("labels", "ref_logp")}
    logp = model(**given, **inputs).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    picked = logp.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return -torch.where(labels != -100, picked, 0.0).sum() / (labels != -100).sum()


# D. What the model's own call does to its logits


def change_of(function):
    """A model whose logits go through a function."""

    def by_hook(model):
        model.register_forward_hook(lambda module, args, out: setattr(out, "logits", function(out.logits)) or out)
        return model

    def by_a_patched_forward(model):
        original = model.forward

        @functools.wraps(original)
        def forward(*args, **kwargs):
            out = original(*args, **kwargs)
            out.logits = function(out.logits)
            return out

        model.forward = forward
        return model

    def by_a_subclass(model):
        cls = type(model)

        class Changed(cls):
            def forward(self, *args, **kwargs):
                out = super().forward(*args, **kwargs)
                out.logits = function(out.logits)
                return out

        model.__class__ = Changed
        return model

    def by_a_hook_of_the_head(model):
        model.get_output_embeddings().register_forward_hook(lambda module, args, out: function(out))
        return model

    return [by_hook, by_a_patched_forward, by_a_subclass, by_a_hook_of_the_head]


def biased(logits):
    return logits + torch.linspace(-2, 2, VOCAB, dtype=logits.dtype)


def with_a_closed_vocabulary(logits):
    logits = logits.clone()
    logits[..., 5] = -1e4
    return logits


FUNCTIONS = {
    "scaled": lambda z: z / 4,
    "turned round": lambda z: -1.5 * z,
    "capped": lambda z: 3 * torch.tanh(z / 3),
    "biased": biased,
    "closed": with_a_closed_vocabulary,
}


@pytest.mark.parametrize("way", range(4), ids=["hook", "patched", "subclass", "hook of the head"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["llama", "tied_llama"])
def test_changed_logits_count_in_losses_and_in_every_engine(kind, name, way):
    model = change_of(FUNCTIONS[name])[way](tiny(kind).eval())
    batch = DATA["forget"][0]
    plain = {key: value for key, value in batch.items() if key != "ref_logp"}
    expected = literal_nll(model, plain)
    out = gfast.model_loss(model, batch, NLL())
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    for found, right in zip(gradient(model, out.loss).values(), gradient(model, expected).values(), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    own, risk = (gradient(model, literal_loss(model, DATA["forget"], name)) for name in ("wga", "nll"))
    right = dots(model, own, risk, 4, kind.startswith("tied"))
    for engine in ("stream", "sample", "token", "gram"):
        effect = gfast.g_effect(model, WGA(alpha=0.7), engine=engine, **DATA)
        assert effect.unlearn == pytest.approx(right, rel=1e-8, abs=1e-12), engine


@pytest.mark.parametrize("engine", ["stream", "sample", "token", "gram"])
def test_a_model_that_answers_with_a_tuple(engine):
    class Tuple(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return (super().forward(*args, **kwargs).logits / 2,)

    model = tiny("llama").eval()
    change_of(FUNCTIONS["scaled"])[0](expected := tiny("llama").eval())
    model.__class__ = Tuple
    model.lm_head.weight.data /= 2
    found, right = (gfast.g_effect(m, WGA(alpha=0.7), engine=engine, groups="layer", **DATA) for m in (model, expected))
    # the head's own gradient is with respect to half the weight
    assert {k: v for k, v in found.unlearn.items() if k != "lm"} == pytest.approx(
        {k: v for k, v in right.unlearn.items() if k != "lm"}, rel=1e-9
    )


def adapted(**options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    options = dict(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM") | options
    return peft.get_peft_model(tiny("llama"), peft.LoraConfig(**options)).eval()


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


def sliced_loss(logits, labels, *_, **__):
    """As models do that drop the last row from their logits, rather than the first from their labels."""
    rows = (logits * 1.0)[..., :-1, :].contiguous()
    return torch.nn.functional.cross_entropy(rows.view(-1, rows.shape[-1]), labels[..., 1:].reshape(-1))


@pytest.mark.parametrize("own_terms", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("kind", ["mixture", "sliced", "adalora"])
def test_terms_of_the_models_own_loss(kind, own_terms, caplog):
    if kind in ("mixture", "sliced"):
        model = tiny("mixtral").train()
        model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.7
        if kind == "sliced":
            model.loss_function = sliced_loss
    else:
        peft = pytest.importorskip("peft")
        options = dict(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1)
        model = peft.get_peft_model(
            tiny("llama"), peft.AdaLoraConfig(**options, orth_reg_weight=0.5, task_type="CAUSAL_LM")
        ).double()
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    whole, alone = model(**batch).loss, literal_nll(model, batch)
    expected = alone + own_terms * (whole - alone)
    assert abs(whole - alone) > 1e-3
    hf._log_own_terms.cache_clear()
    with caplog.at_level(logging.WARNING, "gfast"):
        out = gfast.model_loss(model, batch, NLL(), own_terms=own_terms)
    assert ("adds terms to its own loss" in caplog.text) == (own_terms == 0)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-7)
    for found, right in zip(gradient(model, out.loss).values(), gradient(model, expected).values(), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-7)


# C. Inputs


def test_inputs_that_change_the_answer_reach_the_model():
    model = tiny("llama").eval()
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    plain = gfast.model_loss(model, batch, NLL()).loss
    positions = torch.arange(batch["input_ids"].shape[1])[None] * 3
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach() * 1.5
    size = batch["input_ids"].shape[1]
    mask = torch.ones(1, 1, size, size, dtype=torch.bool).tril(0).triu(-1).expand(len(embeds), 1, size, size)
    for changed in (
        batch | {"position_ids": positions.expand_as(batch["input_ids"])},
        {key: value for key, value in batch.items() if key != "input_ids"} | {"inputs_embeds": embeds},
        batch | {"attention_mask": mask},
    ):
        expected = literal_nll(model, changed)
        assert abs(expected - plain) > 1e-4
        torch.testing.assert_close(gfast.model_loss(model, changed, NLL()).loss, expected, rtol=1e-10, atol=1e-12)
        logp = gfast.model_logp(model, changed)
        torch.testing.assert_close(-logp.sum() / (batch["labels"][:, 1:] != -100).sum(), expected)
        right = gradient(model, expected)
        effect = gfast.g_effect(model, GA(), forget=changed, retain=changed, groups=lambda name: "all")
        assert effect.unlearn["all"] == pytest.approx(-sum(float(g.square().sum()) for g in right.values()), rel=1e-6)


def test_adapters_by_sample():
    """adapter_names is PEFT's input, and reaches the layers through its own forward."""
    model = adapted(init_lora_weights=False).double()
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    rows = len(batch["input_ids"])
    mixed = batch | {"adapter_names": ["__base__"] + ["default"] * (rows - 1)}
    logp = gfast.model_logp(model, mixed)
    on = gfast.model_logp(model, batch)
    with wrappers.adapters_off(model):
        off = gfast.model_logp(model, batch)
    torch.testing.assert_close(logp, torch.cat([off[:1], on[1:]]))
    assert not torch.allclose(on[:1], off[:1])


def test_what_the_model_does_not_take_is_named():
    class Narrow(transformers.LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    model = Narrow(transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                            num_attention_heads=2))  # fmt: skip
    batch = dict(DATA["forget"][0])
    gfast.model_loss(model, batch, NLL())
    with pytest.raises(ValueError, match="'pixel_values', which Narrow does not take.*attention_mask, input_ids"):
        gfast.model_loss(model, batch | {"pixel_values": torch.zeros(1)}, NLL())
    gfast.model_loss(model, batch | {"pixel_values": None}, NLL())


def test_a_mask_that_the_model_cannot_take():
    """On the right of a causal model padding changes nothing, on the left it does."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if "xlstm" not in names:
        pytest.skip("this version of transformers has no xLSTM")
    from helpers.architectures import batch_for, build

    model = build("xlstm")
    batch = batch_for(model)
    ones = torch.ones_like(batch["input_ids"])
    ones[-1, -2:] = 0
    gfast.model_loss(model, batch | {"attention_mask": ones}, NLL())
    with pytest.raises(ValueError, match="'attention_mask', which xLSTMForCausalLM does not take"):
        gfast.model_loss(model, batch | {"attention_mask": ones.flip(1)}, NLL())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_images_count_in_the_cache_and_the_stream_engine(name, tmp_path):
    from helpers.architectures import IMAGE, batch_for, build

    from gfast.training import ReferenceCache

    if f"{name}+image" not in IMAGE:
        pytest.skip(f"this version of transformers has no {name}")
    model = build(f"{name}+image")
    batch = batch_for(model)
    other = {k: v + 1.0 if k == "pixel_values" else v for k, v in batch.items()}
    expected = gfast.model_logp(model, batch)
    moved = (gfast.model_logp(model, other) - expected).abs().max()
    assert moved > 1e-4
    effect = gfast.g_effect(model, GA(), forget=batch, retain=other, groups=lambda name: "all")
    ours, others = (gradient(model, gfast.model_loss(model, one, NLL()).loss) for one in (batch, other))
    assert effect.retain["all"] == pytest.approx(-sum(float((ours[n] * others[n]).sum()) for n in ours), rel=1e-5)
    directions = gfast.risk_gradients(model, forget=batch, retain=batch, groups=lambda name: "all")
    with pytest.raises(ValueError, match="measured on other retain data"):
        gfast.g_effect(model, GA(), forget=batch, retain=other, groups=lambda name: "all", directions=directions)

    rows = len(batch["input_ids"])
    ids = torch.arange(rows)

    class Data:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {key: batch[key] for key in ("input_ids", "labels", "pixel_values")}

    whole = batch | {
        "sample_id": ids,
        "attention_mask": batch.get("attention_mask", torch.ones_like(batch["input_ids"])),
    }
    cache = ReferenceCache.build(model, Data(), lambda items: whole, tmp_path / "cache.safetensors")
    mask = whole["attention_mask"].bool()
    for row in range(rows):
        torch.testing.assert_close(
            cache.get(row)["ref_logp"].double(), expected[row][mask[row]].double(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_training_sees_the_images(name, tmp_path):
    from helpers.architectures import IMAGE, batch_for, build

    from gfast.training import UnlearnConfig, UnlearnTrainer

    if f"{name}+image" not in IMAGE:
        pytest.skip(f"this version of transformers has no {name}")
    model = build(f"{name}+image", dtype=torch.float32)
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch_for(model).items()}
    expected = {k: v.clone() for k, v in gradient(model, literal_nll(model, batch)).items()}
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    args = UnlearnConfig(
        str(tmp_path), objective="GA", use_cpu=True, max_steps=1, learning_rate=0.5, optim="sgd", weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=1,
    )  # fmt: skip
    rows = [{"number": 0}]
    UnlearnTrainer(model, args, train_dataset=rows, data_collator=lambda items: dict(batch)).train()
    tower = 0.0
    for key, value in model.named_parameters():
        step = (value.detach() - before[key]).double()
        torch.testing.assert_close(
            step, 0.5 * expected[key].double(), rtol=1e-3, atol=1e-6, msg=lambda t, k=key: f"{k}: {t}"
        )
        tower += float(step.square().sum()) if "vision" in key else 0.0
    assert tower > 0


# H. Models that are none of ours


SIZES = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
OTHERS = {
    "encoder-decoder": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2)
    ),
    "masked": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
    "bidirectional": lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=False)),
    "classifier": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES)),
    "bare decoder": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_of_other_kinds_are_refused_by_name(kind):
    model = OTHERS[kind]().eval()
    batch = {key: value for key, value in DATA["forget"][0].items()}
    for call in (
        lambda: gfast.model_loss(model, batch, NLL()),
        lambda: gfast.model_logp(model, batch),
        lambda: gfast.model_loss(model, batch, RMU(layer=1)),
        *(lambda e=e: gfast.g_effect(model, GA(), forget=batch, retain=batch, engine=e) for e in ("stream", "token")),
    ):
        with pytest.raises(ValueError, match=f"{type(model).__name__} is no causal language model"):
            call()


def test_logits_of_another_shape_are_refused():
    class Pooled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.mean(1)
            return out

    with pytest.raises(ValueError, match=r"Pooled answered a batch of \(\d, \d+\) tokens with logits of shape"):
        gfast.model_loss(Pooled(transformers.LlamaConfig(**SIZES)), DATA["forget"][0], NLL())


# I. Parameters that are not here


@pytest.mark.parametrize("engine", ["stream", "sample", "token", "gram"])
@pytest.mark.parametrize("kind", ["meta", "frozen meta", "offloaded"])
def test_absent_parameters_are_refused_before_any_work(kind, engine, tmp_path):
    model = tiny("llama", dtype=torch.float32)
    if kind == "offloaded":
        accelerate = pytest.importorskip("accelerate")
        model = accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        model.model.layers[1].to("meta")
        model.model.layers[1].requires_grad_(kind == "meta")
    model.forward = None  # any work would fail differently
    message = "offloaded by Accelerate" if kind == "offloaded" else r"'model.layers.1.*on the meta device"
    with pytest.raises(ValueError, match=message):
        gfast.g_effect(model, GA(), engine=engine, **DATA)


# A. The original model


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
}


@pytest.mark.parametrize("objective", [NPO(0.3), TNPO(), KL(), RR(layer=2)], ids=str)
@pytest.mark.parametrize("kind", [*CONFIGS, "trained norm", "not zero"])
def test_with_adapters_the_original_is_the_base_or_refused(kind, objective):
    peft = pytest.importorskip("peft")
    options, message = CONFIGS.get(kind, ({}, None))
    base = tiny("phi" if kind == "trained biases" else "llama", dtype=torch.float32).eval()
    original = copy.deepcopy(base)
    options = dict(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM") | options
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


def test_switching_adapters_off_and_on_leaves_them_as_they_were():
    model = adapted()
    frozen = [p for name, p in model.named_parameters() if "lora_A" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with wrappers.adapters_off(model):
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
