"""token_effect leaves the model as it was, and names what it cannot measure."""

from __future__ import annotations

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.geffect_tokens import assert_close, data, made, stacked  # noqa: E402

from gfast.geffect import risk_gradients, token_effect  # noqa: E402
from gfast.geffect.engines import forward_mode  # noqa: E402
from gfast.objectives import GA, NLL, PO, Mix  # noqa: E402


def state_of(model):
    return (
        [(name, id(m), m.training, len(m._forward_hooks), "forward" in vars(m)) for name, m in model.named_modules()],
        [(name, id(p), p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()],
        model.config._attn_implementation,
        getattr(model.config, "_experts_implementation", None),
        torch.is_grad_enabled(),
        torch.overrides._get_current_function_mode_stack(),
    )


@pytest.mark.parametrize("failure", [None, RuntimeError("broken"), KeyboardInterrupt()])
def test_model_is_left_as_found(failure):
    model, _ = made("mixtral")
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    forget, retain = data()
    directions = risk_gradients(model, forget=forget, retain=retain, dtype=torch.float64)
    model.config._attn_implementation = "flex_attention"
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "grouped_mm"
    model.model.norm.weight.grad = kept = torch.ones_like(model.model.norm.weight)
    weights = [p.detach().clone() for p in model.parameters()]

    def fail(*_):
        if failure is not None:
            raise failure

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    before = state_of(model)
    if failure is None:
        token_effect(model, forget=forget, retain=retain, directions=directions)
    else:
        with pytest.raises(type(failure)):
            token_effect(model, forget=forget, retain=retain, directions=directions)
    assert state_of(model) == before
    handle.remove()
    assert model.model.norm.weight.grad is kept
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_fused_experts_are_switched():
    model = made("mixtral")[0].float()
    if not hasattr(model.config, "_experts_implementation"):
        pytest.skip("this version of transformers has no fused experts")
    forget, retain = data()
    expected = token_effect(model, forget=forget, retain=retain)
    model.config._experts_implementation = "grouped_mm"
    found = token_effect(model, forget=forget, retain=retain)
    assert_close(stacked(found), stacked(expected), 1e-4)
    assert model.config._experts_implementation == "grouped_mm"


def test_other_attention_is_switched_and_said(caplog):
    model, _ = made("llama")
    forget, retain = data()
    expected = token_effect(model, forget=forget, retain=retain, direction_dtype=torch.float64)
    directions = risk_gradients(model, forget=forget, retain=retain, dtype=torch.float64)
    model.config._attn_implementation = "flash_attention_2"
    forward_mode._log_switch.cache_clear()
    found = token_effect(model, forget=forget, retain=retain, directions=directions)
    token_effect(model, forget=forget, retain=retain, directions=directions)
    assert_close(stacked(found), stacked(expected), 1e-9)
    assert sum("flash_attention_2" in record.message for record in caplog.records) == 1
    assert model.config._attn_implementation == "flash_attention_2"


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Rounding(torch.nn.Module):
    def forward(self, x):
        return Straight.apply(x)


class Raw(torch.nn.Module):
    def forward(self, x):
        assert x.data_ptr()
        return x


class ThroughNumpy(torch.nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.detach().numpy() * 2) + x.numpy()


@pytest.mark.parametrize("module,what", [(Rounding, "Straight"), (Raw, "data_ptr"), (ThroughNumpy, "numpy")])
def test_what_has_no_forward_mode_is_named(module, what):
    model, _ = made("llama")
    forget, retain = data()
    directions = risk_gradients(model, forget=forget, retain=retain)
    model.model.layers[1].mlp.act_fn = module()
    with pytest.raises(ValueError, match=rf"(?s){what}.*engine='stream'") as error:
        token_effect(model, forget=forget, retain=retain, directions=directions)
    assert "model.layers.1.mlp.act_fn" in str(error.value)


@pytest.mark.skipif(transformers.__version__ < "5", reason="Bloom evaluates plain operations in transformers 4")
def test_autograd_functions_of_families_are_refused_by_name():
    config = transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    forget, retain = data()
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.gelu_impl' \(BloomGelu\).*GeLUFunction"):
        token_effect(model, forget=forget, retain=retain)


def test_bad_input():
    model, _ = made("llama")
    forget, retain = data()
    with pytest.raises(ValueError, match="forget= holds no batch"):
        token_effect(model, forget=[], retain=retain)
    with pytest.raises(ValueError, match="groups must be"):
        token_effect(model, forget=forget, retain=retain, groups="blocks")
    forget[0]["labels"][0, 2] = 61
    with pytest.raises(ValueError, match="outside the vocabulary"):
        token_effect(model, forget=forget, retain=retain)
    forget[0]["labels"][0, 2] = 4
    directions = risk_gradients(model, forget=forget, retain=retain)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    directions.squares.copy_(torch.stack([p.detach().double().square().sum() for p in model.parameters()]))
    with pytest.raises(ValueError, match=r"not finite at \d+ of \d+ tokens, in the groups .*(shallow|middle)"):
        token_effect(model, forget=forget, retain=retain, directions=directions)


def test_mix_and_refusal_have_their_remedy():
    model, _ = made("llama")
    forget, retain = data()
    tokens = token_effect(model, forget=forget, retain=retain)
    for objective in (Mix(GA(), NLL()), PO()):
        with pytest.raises(ValueError, match="engine='stream'"):
            tokens.g_effect(objective)
