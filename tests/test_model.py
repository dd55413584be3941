"""model_loss and model_logp against the model's own logits, for heads of several kinds and through wrappers."""

import pytest
import torch
import transformers
from helpers.small_models import batch_of, gradients, tiny
from helpers.training_tiny import collator, datasets, tiny_model

import gfast
from gfast.model_output import shifted
from gfast.objectives import CEU, DPO, GA, KL, NPO, RMU, RR, UNDIAL, WGA, Mix, Unilogit
from gfast.ops.token_kl import token_kl_reference
from gfast.ops.unlearn_loss import unlearn_loss_reference


def plain_logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "cohere", "granite", "phi", "gptj_like"])
@pytest.mark.parametrize("objective", [WGA(0.5), NPO(0.3), DPO(0.3)], ids=str)
def test_model_loss_equals_the_models_own_logits(kind, objective):
    model, batch = tiny(kind), batch_of()
    labels = shifted(batch["labels"])
    with torch.no_grad():
        ref = gfast.model_logp(model, batch) - 0.3 * (batch["labels"] != -100)
    ref[:, 0] = 0
    out = gfast.model_loss(model, {**batch, "ref_logp": ref}, objective)
    aligned = torch.nn.functional.pad(ref[:, 1:], (0, 1))
    truth = unlearn_loss_reference(plain_logits(model, batch), labels, objective, ref_logp=aligned)
    torch.testing.assert_close(out.loss, truth.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.logp[:, 1:], truth.logp[:, :-1])
    torch.testing.assert_close(out.weight[:, 1:], truth.weight[:, :-1])
    assert (out.logp[:, 0] == 0).all()
    for ours, exact in zip(gradients(model, out.loss), gradients(model, truth.loss), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("objective", [WGA(0.5), NPO(0.3), CEU()], ids=str)
def test_a_model_in_torch_func_is_its_literal_definition(objective):
    """As functional_call makes one of parameters that a transform has wrapped; fused ops refuse by name."""

    class Loss(torch.nn.Module):
        def __init__(self, impl):
            super().__init__()
            self.model, self.impl = tiny("llama").eval(), impl

        def forward(self, batch):
            return gfast.model_loss(self.model, batch, objective, impl=self.impl).loss

    batch = batch_of()
    batch["ref_logp"] = -3.0 * (batch["labels"] != -100)
    module = Loss("reference")
    parameters = dict(module.named_parameters())
    plain = dict(zip(parameters, gradients(module.model, module(batch)), strict=True))

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (batch,))

    detached = {name: value.detach() for name, value in parameters.items()}
    for name, found in torch.func.grad(loss)(detached).items():
        torch.testing.assert_close(found, plain[name], rtol=1e-8, atol=1e-11)
    module.impl = "auto"
    with pytest.raises(RuntimeError, match='pass impl="reference"'):
        torch.func.grad(loss)(detached)


def test_kl_from_cached_hidden_states_and_from_adapters():
    original, batch = tiny("llama"), batch_of()
    moved = tiny("llama")
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.05 * torch.randn_like(p)
        ref_logits = plain_logits(original, batch)
        ref_hidden = original.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    labels = shifted(batch["labels"])
    count = (labels != -100).sum()
    truth = token_kl_reference(plain_logits(moved, batch), ref_logits, labels).sum() / count
    cached = {**batch, "ref_hidden": ref_hidden, "ref_head": original.lm_head.weight.detach()}
    out = gfast.model_loss(moved, cached, KL())
    assert out.logp is None and out.weight is None
    torch.testing.assert_close(out.loss, truth, rtol=1e-9, atol=1e-12)
    for ours, exact in zip(gradients(moved, out.loss), gradients(moved, truth), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-11)
    with pytest.raises(ValueError, match="ReferenceCache"):
        gfast.model_loss(moved, batch, KL())

    peft = pytest.importorskip("peft", reason="the adapter path needs peft")
    adapted = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="adapters are not zero"):
        gfast.model_loss(adapted.double(), batch, KL())
    loss = gfast.model_loss(adapted.double(), batch, KL(), reference="base").loss
    truth = token_kl_reference(plain_logits(adapted, batch), ref_logits, labels).sum() / count
    assert truth > 0
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-12)


def test_rmu_and_rr_read_the_layer_that_hidden_states_names():
    model, batch = tiny("llama"), batch_of()
    states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    valid = batch["labels"] != -100
    for layer in (0, 2, 3):
        hidden = states.hidden_states[layer]
        rmu = RMU(layer=layer, c=2.0)
        difference = hidden - 2.0 * rmu.direction(16)
        expected = (difference.square().mean(-1) * valid).sum() / valid.sum()
        torch.testing.assert_close(gfast.model_loss(model, batch, rmu).loss, expected)
        assert gfast.model_loss(model, {**batch, "ref_layer_hidden": hidden.detach()}, RR(layer=layer)).loss == 0
    with pytest.raises(ValueError, match="ref_layer_hidden"):
        gfast.model_loss(model, batch, RR(layer=2))


def test_a_cache_says_of_which_layer_its_hidden_states_are(tmp_path):
    """Joined by hand too, where nothing else could tell."""
    model, data = tiny_model(), datasets()[0]
    build = dict(dataset=data, collator=collator(), path=tmp_path / "cache", what={"layer_hidden"}, layer=1)
    cache = gfast.ReferenceCache.build(model, **build)
    batch = collator()([data[index] for index in range(3)])
    batch |= cache.join(batch["sample_id"], batch["attention_mask"].sum(1), batch["labels"].shape[1])
    assert gfast.model_loss(model, batch, RR(layer=1)).loss.abs() < 1e-6
    with pytest.raises(ValueError, match=r"RR\(layer=2\) was given the original's hidden states of layer 1"):
        gfast.model_loss(model, batch, RR(layer=2))
    halves = dict(forget=[batch], retain=[batch], objective=RR(layer=2))
    with pytest.raises(ValueError, match="of layer 1"):
        gfast.g_effect(model, **halves)


def test_rows_without_labels_and_padding_do_not_count():
    model, batch = tiny("llama"), batch_of()
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    loss = gfast.model_loss(model, empty, GA()).loss
    assert loss == 0 and all((g == 0).all() for g in gradients(model, loss))
    wide = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=1),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 5), value=-100),
    }
    torch.testing.assert_close(gfast.model_loss(model, wide, WGA()).loss, gfast.model_loss(model, batch, WGA()).loss)


def test_reductions_and_normalizer():
    model, batch = tiny("llama"), batch_of()
    count = int((shifted(batch["labels"]) != -100).sum())
    total = gfast.model_loss(model, batch, WGA(), reduction="sum").loss
    torch.testing.assert_close(gfast.model_loss(model, batch, WGA()).loss, total / count)
    torch.testing.assert_close(gfast.model_loss(model, batch, WGA(), normalizer=7.0).loss, total / 7)
    none = gfast.model_loss(model, batch, WGA(), reduction="none")
    assert none.loss.shape == batch["labels"].shape
    torch.testing.assert_close(none.loss.sum(), total)
    torch.testing.assert_close(none.loss.detach(), none.weight * none.logp)


def test_errors_come_before_the_forward_pass():
    model, batch = tiny("llama"), batch_of()
    model.forward = model.model.forward = None  # any forward pass would fail differently
    with pytest.raises(ValueError, match="needs ref_logp"):
        gfast.model_loss(model, batch, NPO())
    with pytest.raises(ValueError, match="no 'labels'"):
        gfast.model_loss(model, {"input_ids": batch["input_ids"]}, WGA())
    with pytest.raises(ValueError, match="same shape"):
        gfast.model_loss(model, {**batch, "labels": batch["labels"][:, 1:]}, WGA())
    for wrong, found in ((batch["labels"].tolist(), "a list"), (batch["labels"][0], r"of shape \(\d+,\)")):
        with pytest.raises(ValueError, match=rf"labels must be a tensor \[B, T\].* they are {found}"):
            gfast.model_loss(model, {**batch, "labels": wrong}, WGA())
    with pytest.raises(TypeError, match="once a term"):
        gfast.model_loss(model, batch, Mix(WGA()))
    with pytest.raises(TypeError, match="a batch is a dict of tensors.*this is a list"):
        gfast.model_loss(model, [batch], WGA())


@pytest.mark.parametrize("objective", [KL(), RMU(layer=1), RR(layer=1), UNDIAL(), CEU(), Unilogit()], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none", "sequence_mean"])
def test_a_reduction_that_an_objective_does_not_know_is_refused(objective, reduction):
    """KL with reduction="sum" was its mean, without a word."""
    given = {key: torch.zeros(1) for key in objective.needs}
    with pytest.raises(ValueError, match=f"knows only reduction='token_mean', not '{reduction}'"):
        gfast.model_loss(tiny("llama"), {**batch_of(), **given}, objective, reduction=reduction)


def test_a_real_model(shared):
    """The trained model's log-probs are those of its logits, and better than chance on a sentence of its own kind."""
    folder = shared / "models" / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    # Not AutoTokenizer: the model's files name a class that transformers 4 does not have.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt")["input_ids"]
    batch = dict(input_ids=ids, labels=ids)
    with torch.no_grad():
        ours = gfast.model_logp(model, batch)[0, 1:]
        theirs = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert -ours.mean() < 2.0
