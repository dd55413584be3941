"""Where a user's model or batch meets gfast: the same function as `model(**batch)`, or an error by name."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from helpers import architectures
from helpers.border import DATA, literal_nll
from helpers.geffect_models import VOCAB, gradient, tiny

import gfast
from gfast.objectives import GA, NLL, RMU


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


# Models that are none of ours


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


@pytest.mark.parametrize("first", ["no labels", "vectors", "refused"])
def test_a_batch_that_shows_nothing_does_not_pass_a_bidirectional_model(first):
    model = architectures.build("xlnet")
    batch = architectures.batch_for(model)
    vectors = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach(), "input_ids": None}
    shows = {"no labels": {"labels": torch.full_like(batch["labels"], -100)}, "vectors": vectors, "refused": {"x": 1}}
    with pytest.raises(ValueError, match="bidirectional|'x'") if first != "no labels" else contextlib.nullcontext():
        gfast.model_loss(model, {**batch, **shows[first]}, NLL())
    with pytest.raises(ValueError, match="XLNetLMHeadModel is no causal language model: it is bidirectional"):
        gfast.model_loss(model, batch, NLL())


@pytest.mark.parametrize("kind", ["xglm", "jamba"])
def test_padding_on_the_left_that_sees_everything_does_not_make_a_model_bidirectional(kind):
    """Where all of a text is labelled, padding scores its first token."""
    model = architectures.build(kind, torch.float32)
    batch = {key: value.flip(1) for key, value in architectures.batch_for(model).items()}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert float(gfast.model_loss(model, batch, NLL()).loss) == pytest.approx(
        float(literal_nll(model, batch)), rel=1e-5
    )


def test_logits_of_another_shape_are_refused():
    class Pooled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.mean(1)
            return out

    with pytest.raises(ValueError, match=r"Pooled answered a batch of \(\d, \d+\) tokens with logits of shape"):
        gfast.model_loss(Pooled(transformers.LlamaConfig(**SIZES)), DATA["forget"][0], NLL())


def test_a_wrapper_of_ones_own_is_not_looked_through():
    """It holds the model where DDP does, and what it answers is another model's."""

    class Twice(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = model

        def forward(self, **batch):
            out = self.module(**batch)
            out.logits = out.logits * 2
            return out

    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    with pytest.raises(ValueError, match="found no transformers model inside Twice"):
        gfast.model_loss(Twice(tiny("llama")), batch, NLL())
    with pytest.raises(ValueError, match="found no transformers model inside Twice"):
        gfast.g_effect(Twice(tiny("llama")), GA(), forget=batch, retain=batch, groups=lambda name: "all")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@torch.no_grad()
def looked_at(module, args, output):
    output.softmax(-1).amax()


def doubled(module, args, output):
    return Doubled.apply(output)


@torch.no_grad()
def scaled(module, args, output):
    return output.mul_(2)


def mapped(module, args, output):
    return torch.func.vmap(lambda row: row * 2)(output)


def looked_at_and_doubled(module, args, output):
    output.amax()
    return Doubled.apply(output)


LOOKS = [looked_at, doubled, scaled, mapped, looked_at_and_doubled]


@pytest.mark.parametrize("engine", [None, "stream", "sample", "token", "gram"])
@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
def test_logits_that_are_looked_at_where_gradients_are_off(look, engine):
    """A hook that logs under no_grad; a function with a backward of its own; a change that autograd does not see."""
    model = tiny("llama").eval()
    model.lm_head.register_forward_hook(look)
    batch, other = ({k: v for k, v in DATA[side][0].items() if k != "ref_logp"} for side in ("forget", "retain"))
    own = gradient(model, literal_nll(model, batch))
    if engine is None:
        for _ in range(2):
            loss = gfast.model_loss(model, batch, NLL()).loss
            torch.testing.assert_close(loss, literal_nll(model, batch))
            found = gradient(model, loss)
            torch.testing.assert_close(found, own)
        return
    risk = gradient(model, literal_nll(model, other))
    effect = gfast.g_effect(model, NLL(), forget=batch, retain=other, engine=engine)
    expected = sum(float((own[name] * risk[name]).sum()) for name in own)
    assert effect.total("retain") == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_that_the_embedding_has_not(token):
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][0, 1] = token
    message = f"the batch has the token id {token}, and the embedding of LlamaForCausalLM has {VOCAB} rows"
    with pytest.raises(ValueError, match=message):
        gfast.model_loss(tiny("llama"), batch, NLL())
    with pytest.raises(ValueError, match=message):
        gfast.g_effect(tiny("llama"), GA(), forget=batch, retain=batch)


def test_a_batch_without_rows_that_the_model_does_not_take():
    batch = {key: value[:0] for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    with pytest.raises(ValueError, match=r"the batch has no tokens \(0, .*LlamaForCausalLM does not take"):
        gfast.model_loss(tiny("llama"), batch, NLL())


@pytest.mark.parametrize("engine", ["stream", "sample", "token", "gram"])
def test_labels_of_32_bits(engine):
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    narrow = {**batch, "labels": batch["labels"].int()}
    one, other = (gfast.g_effect(tiny("llama"), GA(), forget=b, retain=b, engine=engine) for b in (batch, narrow))
    assert one.unlearn == other.unlearn


# Parameters that are not here


@pytest.mark.parametrize("masked", [True, False])
def test_a_model_without_values(masked):
    batch = {key: value for key, value in DATA["forget"][0].items() if masked or key != "attention_mask"}
    with pytest.raises(ValueError, match="LlamaForCausalLM or its batch is on the meta device"):
        gfast.model_loss(tiny("llama").to("meta"), batch, NLL())


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
