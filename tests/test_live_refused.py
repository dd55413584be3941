"""What a GEffectMonitor refuses: before any work, with nothing left behind."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from helpers.geffect_models import Rounded, tiny
from helpers.process_group import alone
from test_live import FORGET, RETAIN, loss

import gfast
from gfast.geffect import Surgery
from gfast.objectives import GA, NLL, WGA
from gfast.training.options import refuse_summed_again  # noqa: E402


class Stopped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


def test_bad_input_is_refused_before_any_work_and_leaves_nothing():
    model = tiny("llama")
    monitor = gfast.GEffectMonitor(model)

    def refused(words, call):
        with pytest.raises(ValueError, match=words):
            call()
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

    def forget():
        monitor.forget(loss(model, FORGET, GA()))

    for made, words in (
        (("foo", "tensor"), "unknown surgery 'foo:tensor'"),
        (("pcgrad", "all"), "unknown surgery 'pcgrad:all'"),
        (("gru", "global", 0.0), "must be in"),
        (("gru", "global", math.nan), "must be in"),
    ):
        refused(words, lambda made=made: Surgery(*made))
    for factor in (0.0, math.nan, math.inf):
        refused("factor=", lambda factor=factor: monitor.forget(loss(model, FORGET, GA()), factor=factor))
    refused("accumulate must be", lambda: gfast.GEffectMonitor(model, accumulate="all"))
    refused("there is no G-effect: no step", monitor.effect)
    refused("retain was called before forget", lambda: monitor.retain(loss(model, RETAIN, NLL())))
    refused("has no graph", lambda: monitor.forget(torch.zeros(())))
    refused("must be one number", lambda: monitor.forget(torch.zeros(3, requires_grad=True)))
    refused("neither GA nor NLL", lambda: monitor.forget(loss(model, FORGET, GA()), risk=loss(model, FORGET, NLL())))
    forget()
    refused("without a retain loss", lambda: monitor.retain(None))
    refused("has no graph", lambda: monitor.retain(torch.zeros(())))
    assert all(p.grad is None for p in model.parameters())  # the step was undone
    forget()
    monitor.retain(loss(model, RETAIN, NLL()))
    for norm in (-1.0, math.nan):
        refused("max_norm must be a norm", lambda norm=norm: monitor.effect(max_norm=norm))
    refused("a second retain", lambda: monitor.retain(loss(model, RETAIN, NLL())))
    refused("has a gradient before the step begins", forget)
    model.zero_grad()
    forget()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    refused("'model.norm.weight' was changed after forget", lambda: monitor.retain(loss(model, RETAIN, NLL())))
    forget()
    model.zero_grad()  # the loop gave the step up: the next one is a new one
    forget()
    monitor.retain(loss(model, RETAIN, NLL()))
    assert monitor.effect().total("retain") == pytest.approx(
        gfast.g_effect(model, GA(), forget=FORGET, retain=RETAIN).total("retain")
    )


def test_the_effect_of_all_micro_batches_is_of_retain_losses():
    """Risks beside them are measured on the first alone."""
    model = tiny("llama")
    monitor = gfast.GEffectMonitor(model, accumulate="exact")
    monitor.forget(loss(model, FORGET, GA()))
    with pytest.raises(ValueError, match="accumulate='exact' measures the retain losses of all micro-batches"):
        monitor.retain(loss(model, RETAIN, WGA()), risk=loss(model, RETAIN, NLL()), last=False)
    monitor.retain(loss(model, RETAIN, WGA()), risk=loss(model, RETAIN, NLL()))
    assert "risk" in monitor.effect().measured["retain"]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=str)
@pytest.mark.parametrize("where", ["forget", "retain"])
def test_after_an_error_there_are_no_gradients_and_no_hooks(where, error):
    model = tiny("llama")
    monitor = gfast.GEffectMonitor(model)

    def stop(module, args, out):
        return Stopped.apply(out, error) if isinstance(out, torch.Tensor) else (Stopped.apply(out[0], error), *out[1:])

    handle = model.model.layers[1].register_forward_hook(stop)
    broken = loss(model, FORGET, GA())
    handle.remove()
    with pytest.raises(type(error)):
        if where == "retain":
            monitor.forget(loss(model, FORGET, GA()))
            monitor.retain(broken)
        else:
            monitor.forget(broken)
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    monitor.forget(loss(model, FORGET, GA()))
    monitor.retain(loss(model, RETAIN, NLL()))
    assert math.isfinite(monitor.effect().total("retain"))


@pytest.mark.parametrize("change", ["frozen", "trained", "replaced", "added"])
def test_a_monitor_of_other_parameters_than_the_models_is_refused(change):
    model = tiny("llama")
    head = model.lm_head
    head.requires_grad_(change != "trained")
    monitor = gfast.GEffectMonitor(model)
    if change == "replaced":
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    elif change == "added":
        head.bias = torch.nn.Parameter(head.weight.new_zeros(len(head.weight)))
    else:
        head.requires_grad_(change == "trained")
    with pytest.raises(ValueError, match="'lm_head.*since the GEffectMonitor was made: make a new one"):
        monitor.forget(loss(model, FORGET, GA()))


@pytest.mark.parametrize("accumulate", ["first", "exact"])
@pytest.mark.parametrize("after", ["forget", "retain"])
@pytest.mark.parametrize("change", ["zero", "none", "again", "other", "clip", "more"])
def test_gradients_that_change_within_a_step_are_refused(change, after, accumulate):
    model = tiny("llama")
    monitor = gfast.GEffectMonitor(model, accumulate=accumulate)
    monitor.forget(loss(model, FORGET, GA()))
    if after == "retain":
        monitor.retain(loss(model, RETAIN, NLL()), last=False)
    kept = [p.grad for p in model.parameters()] if change == "other" else []  # noqa: F841
    if change in ("none", "again", "other", "zero"):
        model.zero_grad(set_to_none=change != "zero")
    if change in ("again", "other", "more"):
        loss(model, RETAIN, NLL()).loss.backward()
    if change == "clip":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(ValueError, match="the gradient of 'model.embed_tokens.weight' was changed after forget"):
        monitor.retain(loss(model, RETAIN, NLL()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("surgery", [None, "pcgrad:tensor", "gru"])
def test_a_loss_of_another_model_is_refused(surgery):
    model, other = tiny("llama"), tiny("llama")
    monitor = gfast.GEffectMonitor(model, unlearn=True, objective=WGA(), surgery=surgery)
    calls = (
        lambda: monitor.forget(loss(other, FORGET, WGA())),
        lambda: monitor.forget(loss(model, FORGET, WGA()), risk=loss(other, FORGET, NLL())),
        lambda: monitor.retain(loss(other, RETAIN, NLL())),
        lambda: monitor.retain(loss(model, RETAIN, WGA()), risk=loss(other, RETAIN, NLL())),
        lambda: monitor.retain(None, risk=loss(other, RETAIN, NLL())),
    )
    for index, call in enumerate(calls):
        if index > 1:
            monitor.forget(loss(model, FORGET, WGA()))
        with pytest.raises(ValueError, match="the loss is of another model than the monitor's"):
            call()
        assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_backward_that_ends_before_the_parameters():
    """A function of somebody that gives no gradient: autograd tells the parameters before it of None."""

    model = tiny("llama").eval()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: Rounded.apply(output))
    monitor = gfast.GEffectMonitor(model, objective=GA())
    monitor.forget(loss(model, FORGET, GA()))
    monitor.retain(loss(model, RETAIN, NLL()))
    expected = gfast.g_effect(model, GA(), forget=FORGET, retain=RETAIN)
    for group, found in monitor.effect().retain.items():
        assert found == pytest.approx(expected.retain[group], rel=1e-6)


def taken_at_once(model):
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def taken_later(model):
    """As LOMO does: in the hook of whatever parameter comes next."""

    def step(gradient):
        for parameter in model.parameters():
            parameter.grad = None

    for parameter in model.parameters():
        parameter.register_hook(step)


@pytest.mark.parametrize("steps", [taken_at_once, taken_later])
def test_an_optimizer_that_steps_within_the_backward_is_refused(steps):
    model = tiny("llama")
    steps(model)
    monitor = gfast.GEffectMonitor(model, objective=GA())
    hook = "has a hook on its accumulated gradient" if steps is taken_at_once else "within the backward"
    with pytest.raises(ValueError, match=hook):
        monitor.forget(loss(model, FORGET, GA()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("surgery", [None, "pcgrad"])
def test_a_hook_that_sums_over_processes_sees_each_backward_alone(surgery, monkeypatch):
    """As transformers' tensor parallelism has it for norms: two processes here, alike, that have a half each."""
    model, twin = tiny("llama"), tiny("llama")
    norms = [name for name, _ in model.named_parameters() if "norm" in name]

    def doubled(parameter):
        parameter.grad.mul_(2)

    for name in norms:
        model.get_parameter(name).register_post_accumulate_grad_hook(doubled)
        twin.get_parameter(name).register_hook(lambda gradient: 2 * gradient)
    effects = []
    for each in (twin, model):
        monitor = gfast.GEffectMonitor(each, objective=GA(), surgery=surgery)
        if each is model:
            with pytest.raises(ValueError, match="norm.*has a hook on its accumulated gradient .*doubled: an"):
                monitor.forget(loss(each, FORGET, GA()))
            monkeypatch.setattr(doubled, "__module__", "transformers.distributed.tensor_parallel")
        for _ in range(2):
            monitor.forget(loss(each, FORGET, GA()).loss / 2)
        for last in (False, True):
            monitor.retain(loss(each, RETAIN, NLL()).loss / 2, last=last)
        effects.append(monitor.effect())
    refuse_summed_again(model, 1)
    with pytest.raises(ValueError, match="gradient_accumulation_steps with this tensor-parallel model"):
        refuse_summed_again(model, 2)  # which a Trainer's plain steps would be
    assert effects[1].retain == pytest.approx(effects[0].retain, rel=1e-12)
    for name, right in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, right.grad, rtol=1e-12, atol=1e-15)


def test_communication_hooks_that_do_not_sum_are_refused():
    hooks = pytest.importorskip("torch.distributed.algorithms.ddp_comm_hooks")
    power, plain = hooks.powerSGD_hook, hooks.default_hooks
    with alone():
        for hook, taken in (
            (plain.allreduce_hook, True),
            (plain.fp16_compress_hook, True),
            (power.powerSGD_hook, False),
            (plain.fp16_compress_wrapper(power.powerSGD_hook), False),
            (lambda state, bucket: plain.allreduce_hook(state, bucket), False),
        ):
            wrapped = torch.nn.parallel.DistributedDataParallel(tiny("llama"))
            wrapped.register_comm_hook(None, hook)
            with contextlib.nullcontext() if taken else pytest.raises(ValueError, match="communication hook .* mean"):
                gfast.GEffectMonitor(wrapped)
        wrapped = torch.nn.parallel.DistributedDataParallel(tiny("llama"))
        monitor = gfast.GEffectMonitor(wrapped)
        wrapped.register_comm_hook(None, power.powerSGD_hook)
        with pytest.raises(ValueError, match="communication hook .* mean"):
            monitor.forget(loss(wrapped, FORGET, GA()))
