"""The effect of an optimizer's last update against the difference of the weights, in fp64."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

pytest.importorskip("transformers")

from helpers.geffect_models import batches, tiny  # noqa: E402

import gfast  # noqa: E402
from gfast.objectives import GA, NLL, WGA  # noqa: E402

FORGET, RETAIN = batches(1, rows=2, sizes=(2,))[0], batches(2, rows=3, sizes=(3,))[0]


def loss(model, batch, objective):
    return gfast.model_loss(model, batch, objective)


def risk_gradient(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model, batch, NLL()).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def two_groups(model):
    """A rate and a decay of their own for the embedding."""
    first, *rest = model.parameters()
    return [{"params": [first], "lr": 1e-4, "weight_decay": 0.3}, {"params": rest}]


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1),
    "adamw, groups": lambda model: torch.optim.AdamW(two_groups(model), lr=3e-3, weight_decay=0.1, betas=(0.5, 0.9)),
    "adamw, maximize": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, maximize=True),
    "adamw, fused": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True),
    "adamw, foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=True),
    "adamw, tensor rate": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(3e-3).double()),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=0.1),
    "adam, decoupled": lambda model: torch.optim.Adam(
        model.parameters(), lr=3e-3, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "sgd, decay": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1
    ),
    "sgd, maximize": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, maximize=True),
    "sgd, fused": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_last_updates_effect_is_that_of_the_weights_difference(kind):
    model = tiny("tied_llama")
    optimizer = OPTIMIZERS[kind](model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    monitor = gfast.GEffectMonitor(model, unlearn=True, objective=WGA(0.7), optimizer=optimizer)
    skipped = model.model.layers[1].mlp.up_proj.weight
    before: dict = {}
    for step in range(4):
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        risks = [risk_gradient(model, batch) for batch in (FORGET, RETAIN)]
        with pytest.raises(ValueError, match="has no graph"):  # a refused call, and a step given up, change nothing
            monitor.forget(torch.zeros(()))
        monitor.forget(loss(model, FORGET, GA()), risk=loss(model, FORGET, NLL()))
        monitor.reset()
        monitor.forget(0.5 * loss(model, FORGET, WGA(0.7)).loss, risk=loss(model, FORGET, NLL()), factor=0.5)
        monitor.retain(2.0 * loss(model, RETAIN, NLL()).loss, factor=2.0)
        found = monitor.update_effect()
        if step == 0:
            assert found is None
        else:
            for side, risk in zip(("unlearn", "retain"), risks, strict=True):
                right = sum(float((risk[n] * (now[n] - before[n])).sum()) for n in now)
                assert found.total(side) == pytest.approx(right, rel=1e-8)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if step == 1:
            skipped.grad = None  # an expert that no token reached
            optimizer.load_state_dict(optimizer.state_dict())  # which makes new groups
        before = now
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("closure", [False, True])
def test_settings_are_those_of_the_step(closure):
    """A schedule that changes betas after it (OneCycleLR), and gradients that are made within it."""
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=6)
    monitor = gfast.GEffectMonitor(model, optimizer=optimizer)
    before = None

    def gradients() -> None:
        nonlocal before
        now = [p.detach().clone() for p in model.parameters()]
        risk = risk_gradient(model, RETAIN).values()
        monitor.forget(loss(model, FORGET, GA()))
        monitor.retain(loss(model, RETAIN, NLL()))
        found = monitor.update_effect()
        if before is None:
            assert found is None
        else:
            right = sum(float((g * (x - y)).sum()) for g, x, y in zip(risk, now, before, strict=True))
            assert found.total("retain") == pytest.approx(right, rel=1e-8)
        before = now

    for _ in range(3):
        if closure:
            optimizer.step(gradients)
        else:
            gradients()
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.parametrize("kind", ["adamw, fused", "sgd, fused"])
def test_a_step_that_a_scaler_skips_has_no_effect(kind):
    """A fused optimizer is called even so, and its state is that of the step before, which a monitor may not know."""
    model = tiny("llama").float()
    optimizer, scaler = OPTIMIZERS[kind](model), torch.amp.GradScaler("cpu", init_scale=16.0)
    monitors = [gfast.GEffectMonitor(model, optimizer=optimizer, scaler=scaler) for _ in range(2)]
    found = []
    for monitor, spoil in zip([monitors[0]] * 3 + [monitors[1]], (False, True, False, False), strict=True):
        monitor.forget(loss(model, FORGET, GA()))
        monitor.retain(loss(model, RETAIN, NLL()))
        found.append(monitor.update_effect())
        if spoil:
            model.lm_head.weight.grad.fill_(torch.inf)
            monitors[1] = gfast.GEffectMonitor(model, optimizer=optimizer, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if spoil:
            monitors[1].forget(loss(model, FORGET, GA()))
            monitors[1].retain(loss(model, RETAIN, NLL()))
            assert monitors[1].update_effect() is None
            optimizer.zero_grad()
    assert found[0] is None and found[1].total("retain") != 0 and found[2] is None and found[3].total("retain") != 0


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_state_that_is_loaded_is_no_update(kind):
    """A loop that goes back to a former step: what the loaded state tells of is not what the optimizer did last."""
    model = tiny("llama")
    optimizer = OPTIMIZERS[kind](model)
    monitor = gfast.GEffectMonitor(model, optimizer=optimizer)
    found = []
    for step in range(3):
        monitor.forget(loss(model, FORGET, GA()))
        monitor.retain(loss(model, RETAIN, NLL()))
        found.append(monitor.update_effect())
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        if step == 1:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
    assert found[0] is None and found[1].total("retain") != 0 and found[2] is None
    monitor.forget(loss(model, FORGET, GA()))
    optimizer.load_state_dict(saved[1])
    with pytest.raises(ValueError, match="loaded after forget"):
        monitor.retain(loss(model, RETAIN, NLL()))


def test_optimizers_whose_update_is_not_in_their_state_are_refused():
    model = tiny("llama")

    class Own(torch.optim.AdamW):
        pass

    for optimizer, why in (
        (torch.optim.SGD(model.parameters(), lr=0.1), "without momentum keeps nothing"),
        (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True), "nesterov"),
        (torch.optim.AdamW(model.parameters(), amsgrad=True), "amsgrad"),
        (torch.optim.Adagrad(model.parameters()), "Adagrad"),
        (torch.optim.Adafactor(model.parameters()), "Adafactor"),
        (Own(model.parameters()), "Own"),
        (torch.optim.AdamW([next(model.parameters())]), "does not have the parameter"),
    ):
        with pytest.raises(ValueError, match=why):
            gfast.GEffectMonitor(model, optimizer=optimizer)
    with pytest.raises(ValueError, match="needs GEffectMonitor"):
        gfast.GEffectMonitor(model).update_effect()


def test_the_optimizer_keeps_nothing_of_a_monitor_that_is_gone():
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = gfast.GEffectMonitor(model, optimizer=optimizer)
    hooks = optimizer._optimizer_step_post_hooks, optimizer._optimizer_load_state_dict_post_hooks
    assert [len(each) for each in hooks] == [1, 1]
    del monitor
    gc.collect()
    assert not any(hooks)
