"""gfast.hf against transformers itself: heads, hidden states and the place of every parameter, family by family."""

from __future__ import annotations

import pytest
import torch
from helpers import architectures
from helpers.marks import slow_when
from torch import nn

import gfast
from gfast import hf, wrappers
from gfast.hidden_states import layer_hidden
from gfast.model_output import model_output

transformers = pytest.importorskip("transformers")

VOCAB, LAYERS = 61, 3
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
KV = dict(num_key_value_heads=2, head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
FAMILIES = {
    "llama": KV,
    "mistral": KV,
    "mixtral": KV | dict(num_local_experts=4),
    "qwen2": KV,
    "qwen2_moe": KV | EXPERTS,
    "qwen3": KV,
    "qwen3_moe": KV | EXPERTS,
    "phi": {},
    "phi3": KV,
    "phimoe": KV | dict(num_local_experts=4),
    "gemma": KV,
    "gemma2": KV | dict(final_logit_softcapping=3.0),
    "gemma3_text": KV | dict(final_logit_softcapping=3.0),
    "cohere": KV | dict(logit_scale=0.25),
    "cohere2": KV | dict(logit_scale=0.25),
    "granite": KV | dict(logits_scaling=3.0, embedding_multiplier=2.0),
    "granitemoe": KV | dict(num_local_experts=4, logits_scaling=3.0),
    "gpt2": {},
    "gpt_neo": dict(num_layers=LAYERS, num_heads=4, attention_types=[[["global"], LAYERS]]),
    "gptj": dict(rotary_dim=4),
    "gpt_neox": {},
    "gpt_bigcode": {},
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "bloom": dict(n_layer=LAYERS, n_head=4),
    "falcon": {},
    "stablelm": KV,
    "starcoder2": KV,
    "olmo": KV,
    "olmo2": KV,
    "smollm3": KV,
}


def make(family: str, **options):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**(SIZES | FAMILIES.get(family, {}) | options))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norm weights and biases too, so that leaving one out shows
            parameter.normal_(std=0.2)
    return model


def make_batch(rows: int = 2, length: int = 7) -> dict:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), "sample_id": torch.arange(rows)}


def reference(model, batch):
    with torch.no_grad():
        return model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_family_agrees_with_transformers(family):
    model, batch = make(family), make_batch()
    expected = reference(model, batch)
    with torch.no_grad():
        head, hidden, _ = model_output(model, batch)
        logits = hidden @ head.weight.T
        logits = head.logit_scale * (logits if head.bias is None else logits + head.bias)
        if head.softcap:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-6)
        for layer in range(LAYERS + 1):
            torch.testing.assert_close(layer_hidden(model, batch, layer), expected.hidden_states[layer], rtol=0, atol=0)
    assert hf.num_layers(model) == LAYERS
    units = hf.parameter_units(model)
    assert set(units) == {name for name, _ in model.named_parameters()}
    assert set(range(LAYERS)) <= set(units.values())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert ("embed+lm" in units.values()) == tied


def test_head_numbers():
    def head(*args, **options):
        return model_output(make(*args, **options), make_batch()).head

    assert head("gemma2").softcap == 3.0
    assert head("gemma2", final_logit_softcapping=None).softcap is None
    assert head("cohere").logit_scale == 0.25
    assert head("granite").logit_scale == pytest.approx(1 / 3)
    assert head("phi").bias is not None
    llama = make("llama")
    found = model_output(llama, make_batch()).head
    assert found.weight is llama.lm_head.weight and found.bias is None and found.module is llama.lm_head


def test_units_of_gpt2_and_opt():
    gpt2 = hf.parameter_units(make("gpt2"))
    assert gpt2["transformer.wte.weight"] == "embed+lm"
    assert gpt2["transformer.wpe.weight"] == "embed"
    assert gpt2["transformer.h.1.attn.c_attn.weight"] == 1
    assert gpt2["transformer.ln_f.bias"] == LAYERS
    opt = hf.parameter_units(make("opt", tie_word_embeddings=False))
    assert opt["model.decoder.embed_positions.weight"] == "embed"
    assert opt["model.decoder.final_layer_norm.weight"] == LAYERS
    assert opt["lm_head.weight"] == "lm"
    bloom = hf.parameter_units(make("bloom"))
    assert bloom["transformer.word_embeddings_layernorm.weight"] == "embed"


def test_no_transformers_model_inside():
    with pytest.raises(ValueError, match="Hugging Face causal language model"):
        hf.decoder(nn.Linear(2, 2))


def test_frozen_parameters_have_no_unit():
    model = make("llama")
    model.get_input_embeddings().requires_grad_(False)
    assert "model.embed_tokens.weight" not in hf.parameter_units(model)


def test_parameter_without_a_place_is_named():
    model = make("llama")
    model.model.mystery = nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"'model\.mystery\.weight' \(5, 3\)"):
        hf.parameter_units(model)
    model.model.mystery.requires_grad_(False)
    hf.parameter_units(model)


def test_parameter_shared_by_blocks_is_named():
    model = make("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp.*shared by several parts \(0, 2\)"):
        hf.parameter_units(model)


def test_layer_hidden_stops_after_the_wanted_layer_and_is_differentiable():
    model, batch = make("llama"), make_batch()
    ran = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    layer_hidden(model, batch, 1)  # the first time it looks whether that is the hidden state of transformers
    ran.clear()
    hidden = layer_hidden(model, batch, 1)
    assert ran == [0]
    hidden.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert model.model.layers[1].mlp.up_proj.weight.grad is None
    assert all(not block._forward_pre_hooks for block in model.model.layers)


@pytest.mark.parametrize("where", ["", "model", "model.layers.0"])
def test_layer_hidden_lets_what_waits_for_the_end_of_a_call_run(where):
    """A hook around the blocks keeps accounts of the call (a reduction to prepare, weights to give back)."""
    model, batch = make("llama"), make_batch()
    ended = []
    model.get_submodule(where).register_forward_hook(lambda module, args, output: ended.append(module))
    expected = layer_hidden(model, batch, 1)  # the first time looks at all
    ended.clear()
    torch.testing.assert_close(layer_hidden(model, batch, 1), expected, rtol=0, atol=0)
    assert len(ended) == 1


@pytest.mark.parametrize("place", ["model.layers.0", "model"])
def test_layer_hidden_sees_hooks_that_come_later(place):
    """Steering: what stands between the blocks, or comes out of them, is another number from then on."""
    model, batch = make("llama"), make_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def changed(module, args, output):
        if isinstance(output, torch.Tensor):
            return 1.5 * output
        output.last_hidden_state = 1.5 * output.last_hidden_state
        return output

    def agree():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            torch.testing.assert_close(layer_hidden(model, batch, layer), state, rtol=0, atol=0)

    agree()
    handles = [model.get_submodule(place).register_forward_hook(changed)]
    handles.append(model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 0.3, *args[1:])))
    agree()
    for handle in handles:
        handle.remove()
    agree()


def test_layer_hidden_out_of_range():
    with pytest.raises(ValueError, match="use 0 .* to 3"):
        layer_hidden(make("llama"), make_batch(), LAYERS + 1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layer_hidden_with_gradient_checkpointing(reentrant):
    model, batch = make("llama"), make_batch()
    expected = reference(model, batch).hidden_states[2]
    layer_hidden(model, batch, 2).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    hidden = layer_hidden(model, batch, 2)
    torch.testing.assert_close(hidden, expected)
    hidden.square().sum().backward()
    for name, grad in grads.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad)


def test_everything_but_labels_and_our_own_keys_reaches_the_model():
    model, batch = make("llama"), make_batch()
    seen = {}
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    positions = torch.arange(7).expand(2, 7)
    ours = dict(ref_logp=torch.zeros(2, 7), ref_layer_hidden=torch.zeros(2, 7, 32))
    model_output(model, batch | ours | dict(position_ids=positions, token_type_ids=None))
    assert set(seen) == {"input_ids", "attention_mask", "position_ids", "use_cache"}
    with pytest.raises(ValueError, match="no 'input_ids'.*labels"):
        model_output(model, {"labels": batch["labels"]})


@pytest.mark.parametrize(
    "name, plain",
    [
        ("module.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("module._orig_mod.base_model.model.model.norm.weight", "model.norm.weight"),
        ("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("model.layers.0._checkpoint_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.lora_A.default.weight", "model.layers.0.q_proj.lora_A.default.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("transformer.h.0.module.weight", "transformer.h.0.module.weight"),
    ],
)
def test_unwrap_name(name, plain):
    assert wrappers.unwrap_name(name) == plain


@slow_when(lambda p: p.kind != "data parallel")
@pytest.mark.parametrize("kind", ["compiled", "data parallel", "both"])
def test_compiled_and_data_parallel_wrappers(kind):
    model, batch = make("llama"), make_batch()
    units = hf.parameter_units(model)
    wrapped = model if kind == "compiled" else nn.DataParallel(model)
    if kind != "data parallel":
        wrapped = torch.compile(wrapped, backend="aot_eager")  # test_inductor.py compiles to the end
    assert hf.decoder(wrapped) is model.model
    assert {wrappers.unwrap_name(name): unit for name, unit in hf.parameter_units(wrapped).items()} == units
    torch.testing.assert_close(gfast.model_logp(wrapped, batch), gfast.model_logp(model, batch))


def test_activation_checkpoint_wrapper():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, batch = make("llama"), make_batch()
    units, hidden = hf.parameter_units(model), layer_hidden(model, batch, 1)
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(block)
    assert {wrappers.unwrap_name(name): unit for name, unit in hf.parameter_units(model).items()} == units
    torch.testing.assert_close(layer_hidden(model, batch, 1), hidden, rtol=0, atol=0)


def test_peft_lora():
    peft = pytest.importorskip("peft")
    batch = make_batch()
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"], r=2)
    model = peft.get_peft_model(make("llama"), config)
    units = hf.parameter_units(model)
    assert set(units) == {name for name, p in model.named_parameters() if p.requires_grad}
    prefix = "base_model.model.model."
    assert units[prefix + "layers.1.self_attn.q_proj.lora_A.default.weight"] == 1
    assert units[prefix + "embed_tokens.lora_embedding_A.default"] == "embed"
    assert units[prefix + "norm.modules_to_save.default.weight"] == LAYERS
    head, hidden, _ = model_output(model, batch)
    torch.testing.assert_close(hidden @ head.weight.T, model(**without_extras(batch)).logits)


def test_peft_on_the_head_falls_back_to_logits():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["lm_head"], r=2))
    head, logits, _ = model_output(model, make_batch())
    assert head is None and logits.shape[-1] == VOCAB
    assert set(hf.parameter_units(model).values()) == {"lm"}


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(make("llama"), config)
    with pytest.raises(ValueError, match="prompt-learning"):
        hf.decoder(model)


def without_extras(batch: dict) -> dict:
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name, depends", [("prophetnet", True), ("mamba", False), ("opt", False), ("llama", False)])
def test_models_that_answer_by_the_width_of_a_batch_are_told(name, depends):
    """ProphetNet's n-gram stream looks at padding. Who does not call every block causal is tried, once."""
    model = architectures.build(name)
    assert hf.depends_on_width(model) is depends
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    assert hf.depends_on_width(model) is depends
    assert not ran
