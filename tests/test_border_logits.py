"""What the model's own call does to its logits and its loss: it counts, or it is refused by name."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
import transformers
from helpers.border import DATA, literal_nll
from helpers.geffect_models import VOCAB, dots, gradient, literal_loss, tiny
from helpers.marks import slow_when

import gfast
from gfast import hf
from gfast.objectives import KL, NLL, WGA


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


# every function by a hook, and every way with one function
WAYS = ["hook", "patched", "subclass", "hook of the head"]
# every function and every way of a head that embeddings share as well, though not each with each
CHANGES = [
    pytest.param(kind, name, way, id=f"{kind}-{name}-{WAYS[way]}")
    for kind in ("llama", "tied_llama") for name in FUNCTIONS for way in range(4)
    if kind == "llama" or name == "biased" or way == 0
]  # fmt: skip


@slow_when(lambda p: (p.way, p.kind) != (0, "llama") and p.name != "biased")
@pytest.mark.parametrize(("kind", "name", "way"), CHANGES)
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


def doubled(module, grads, *_):
    return tuple(grad if grad is None else 2 * grad for grad in grads)


@pytest.mark.parametrize("where", ["head", "gradient of the logits", "copy of PEFT", "every module"])
def test_backward_hooks_of_the_head_change_gradients(where):
    model = tiny("llama").eval()
    if where == "copy of PEFT":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        model = model.double()
    head, handle = model.get_output_embeddings(), None
    if where == "every module":
        handle = torch.nn.modules.module.register_module_full_backward_hook(
            lambda module, *grads: doubled(module, *grads) if module is head else None
        )
    elif where == "gradient of the logits":
        head.register_full_backward_pre_hook(doubled)
    else:
        head.register_full_backward_hook(doubled)
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    try:
        expected, out = literal_nll(model, batch), gfast.model_loss(model, batch, NLL())
        torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
        for found, right in zip(gradient(model, out.loss).values(), gradient(model, expected).values(), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    finally:
        if handle is not None:
            handle.remove()


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
    batch["labels"] = batch["labels"].int() if own_terms == 0.5 else batch["labels"]  # no cross-entropy takes these
    expected = alone + own_terms * (whole - alone)
    assert abs(whole - alone) > 1e-3
    hf._log_own_terms.cache_clear()
    with caplog.at_level(logging.WARNING, "gfast"):
        out = gfast.model_loss(model, batch, NLL(), own_terms=own_terms)
    assert ("adds terms to its own loss" in caplog.text) == (own_terms == 0)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-7)
    for found, right in zip(gradient(model, out.loss).values(), gradient(model, expected).values(), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-7)


class EarlyExit(transformers.LlamaForCausalLM):
    """Whose loss has a cross-entropy of the first block's states, and of the last ones' in a form of its own."""

    exits, smoothing, calls = 1.0, 0.0, 0

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        self.calls += 1
        out = self.model(input_ids, attention_mask, use_cache=False, output_hidden_states=True)
        logits, loss = self.lm_head(out.last_hidden_state), None
        if labels is not None:
            target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
            both = [logits, self.lm_head(out.hidden_states[1])][: 2 if self.exits else 1]
            first, *others = (
                torch.nn.functional.cross_entropy(
                    z.float().view(-1, z.shape[-1]), target, label_smoothing=self.smoothing
                )
                for z in both
            )
            loss = first + self.exits * sum(others) + 0.1 * out.hidden_states[1].square().mean()
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize(("exits", "smoothing", "calls"), [(0.0, 0.0, 1), (0.3, 0.0, 2), (0.0, 0.2, 1)])
def test_cross_entropies_of_other_logits_are_the_models_own_terms(exits, smoothing, calls):
    model = tiny("llama", dtype=torch.float32).eval()
    model.__class__, model.exits, model.smoothing = EarlyExit, exits, smoothing
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    whole = model(**batch).loss
    model.calls = 0
    out = gfast.model_loss(model, batch, NLL(), own_terms=1.0)
    assert model.calls == calls
    torch.testing.assert_close(out.loss, whole, rtol=1e-5, atol=1e-7)
    found, right = (gradient(model, loss) for loss in (out.loss, whole))
    for name, expected in right.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)


class OwnLoss(transformers.LlamaForCausalLM):
    """Whose loss is `factor` times a cross-entropy in one form or another, and a term."""

    form, factor, first = "padded", 0.5, 0.0

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        out = self.model(input_ids, attention_mask, use_cache=False, output_hidden_states=True)
        logits, loss = self.lm_head(out.last_hidden_state), None
        if labels is not None:
            term = 0.1 * out.hidden_states[1].square().mean()
            if self.first:  # of an early exit, computed before the other
                term = term + self.first * self.cross_entropy(self.lm_head(out.hidden_states[1]), labels)
            loss = self.factor * self.cross_entropy(logits, labels) + term
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    def cross_entropy(self, logits, labels):
        function, after = torch.nn.functional.cross_entropy, labels[:, 1:]
        rows = (logits * 1.0)[:, :-1].flatten(0, 1)
        if self.form == "padded":
            target = torch.nn.functional.pad(after, (0, 1), value=-100)
            return function(logits.float().view(-1, logits.shape[-1]), target.reshape(-1))
        if self.form == "sliced":
            return function(rows, after.reshape(-1))
        if self.form == "summed":
            return function(rows, after.reshape(-1), reduction="sum") / 7
        if self.form == "by token":
            return function(rows, after.reshape(-1), reduction="none").sum() / 7
        if self.form == "unshifted":
            return function(logits.flatten(0, 1), labels.reshape(-1))
        assert self.form == "by hand"
        logp, valid = torch.log_softmax(rows, -1), after.reshape(-1) != -100
        return -logp[valid].gather(1, after.reshape(-1)[valid, None]).mean()


def of_own_loss(form, **options):
    model = tiny("llama", dtype=torch.float32).eval()
    model.__class__, model.form = OwnLoss, form
    for name, value in options.items():
        setattr(model, name, value)
    batch = {key: value for key, value in DATA["forget"][0].items() if key != "ref_logp"}
    return model, batch


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("form", ["padded", "sliced", "summed", "by token"])
def test_a_cross_entropy_that_the_model_scales_is_no_term_of_its_own(form, factor, graded):
    model, batch = of_own_loss(form, factor=factor)
    alone = literal_nll(model, batch)
    hidden = model.model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
    expected = alone + 0.1 * hidden[1].square().mean()
    with torch.set_grad_enabled(graded):
        out = gfast.model_loss(model, batch, NLL(), own_terms=1.0)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-7)
    if graded:
        found, right = (gradient(model, loss) for loss in (out.loss, expected))
        for name, one in right.items():
            torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", ["padded", "sliced"])
def test_the_cross_entropy_of_an_early_exit_is_not_taken_for_that_of_the_logits(form):
    model, batch = of_own_loss(form, first=0.3, factor=1.0)
    whole = model(**batch).loss
    for _ in range(2):  # the second time it is known which
        out = gfast.model_loss(model, batch, NLL(), own_terms=1.0)
        torch.testing.assert_close(out.loss, whole, rtol=1e-5, atol=1e-7)
    found, right = (gradient(model, loss) for loss in (out.loss, whole))
    for name, expected in right.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", ["unshifted", "by hand"])
def test_own_terms_that_cannot_be_told_from_the_cross_entropy_are_refused(form):
    model, batch = of_own_loss(form)
    with pytest.raises(ValueError, match="own_terms: the own loss of OwnLoss has no torch.nn.functional.cross_entropy"):
        gfast.model_loss(model, batch, NLL(), own_terms=1.0)


def test_own_terms_of_a_batch_without_labels_are_the_terms_alone():
    model, batch = of_own_loss("sliced")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    hidden = model.model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
    out = gfast.model_loss(model, batch, NLL(), own_terms=1.0)
    torch.testing.assert_close(out.loss, 0.1 * hidden[1].square().mean(), rtol=1e-5, atol=1e-7)


def test_what_the_original_does_to_its_logits_is_not_guessed_where_the_models_are_its_own():
    """Beside deferred logits, values of the original without a form have the model's own."""
    model = tiny("gemma2").eval()
    batch = DATA["forget"][0]
    hidden = model.model(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state.detach()
    given = {**batch, "ref_hidden": hidden, "ref_head": model.lm_head.weight.detach()}
    assert float(gfast.model_loss(model, given, KL()).loss) == pytest.approx(0.0, abs=1e-9)
    compiled = torch.compile(model, backend="eager")  # whose code is looked at
    assert float(gfast.model_loss(compiled, given, KL()).loss) == pytest.approx(0.0, abs=1e-9)
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: out.clamp(-1e9, 1e9))
    with pytest.raises(
        ValueError, match=r"KL\(\): this model's own logits are taken .* ref_head_form=\(scale, soft cap\)"
    ):
        gfast.model_loss(model, given, KL())
    given["ref_head_form"] = (1.0, model.config.final_logit_softcapping)
    assert float(gfast.model_loss(model, given, KL()).loss) == pytest.approx(0.0, abs=1e-9)
