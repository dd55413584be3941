"""Surgery on the gradients of a step against its formulas, literally, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from helpers.geffect_models import batches, literal_group, tiny  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect import Surgery  # noqa: E402
from gfast.objectives import GA, KL, NLL, WGA  # noqa: E402

LAYERS = 4
# several seeds, so that some units conflict and some do not
DATA = [(batches(seed, rows=2, sizes=(2,))[0], batches(50 + seed, rows=3, sizes=(3,))[0]) for seed in (1, 2)]


def unit(name: str, scope: str) -> str:
    return {"tensor": name, "group": literal_group(name, LAYERS, False), "global": ""}[scope]


def literal(kind, scope, us, rs, averages, moving, adds=True):
    """What the optimizer should get, from lists of gradients by name."""
    if kind == "sago":
        return {n: torch.where(us[n] * rs[n] < 0, rs[n] if adds else 0 * rs[n], us[n]) for n in us}
    if kind == "gru":
        for n in rs:
            averages[n] = moving * rs[n] + (1 - moving) * averages.get(n, torch.zeros_like(rs[n]))
    vs = averages if kind == "gru" else rs
    out = {}
    for one in {unit(n, scope) for n in us}:
        names = [n for n in us if unit(n, scope) == one]
        u, r, v = (torch.cat([x[n].flatten() for n in names]) for x in (us, rs, vs))
        forget, kept = u, r
        if u @ v < 0:
            forget = u - (u @ v) / (v @ v) * v
            if kind == "pcgrad":
                kept = r - (u @ r) / (u @ u) * u
        merged = forget + kept if adds else forget
        out |= dict(zip(names, merged.split([us[n].numel() for n in names]), strict=True))
    return {n: out[n].view_as(us[n]) for n in us}


def parts(model, forget, retain, objective, risk):
    grads = []
    for batch, one in ((forget, objective), (retain, risk)):
        model.zero_grad()
        gfast.model_loss(model, batch, one).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    model.zero_grad()
    return grads


RULES = [f"{kind}:{scope}" for kind in ("pcgrad", "retain", "gru") for scope in ("tensor", "group", "global")]


@pytest.mark.parametrize("rule", [*RULES, "gru:global:0.3", "sago"])
def test_equals_its_formula(rule):
    model = tiny("llama", LAYERS)
    surgery = Surgery.parse(rule)
    monitor = gfast.GEffectMonitor(model, objective=WGA(0.7), surgery=rule)
    averages, removed = {}, 0
    for forget, retain in DATA:
        us, rs = parts(model, forget, retain, WGA(0.7), NLL())
        expected = literal(surgery.kind, surgery.scope, us, rs, averages, surgery.moving)
        monitor.forget(gfast.model_loss(model, forget, WGA(0.7)))
        monitor.retain(gfast.model_loss(model, retain, NLL()))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-11, atol=1e-14)
            removed += not torch.equal(p.grad, us[name] + rs[name])
        truth = gfast.g_effect(model, WGA(0.7), forget=forget, retain=retain)
        effect, step = monitor.effect(), monitor.effect(of="step")
        assert effect.retain == pytest.approx(truth.retain, rel=1e-9)  # of the forget loss, whatever becomes of it
        assert effect.measured["surgery"] == str(surgery)
        after = sum(float((rs[n] * expected[n]).sum()) for n in rs)
        norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
        assert step.total("retain") == pytest.approx(after, rel=1e-9, abs=1e-12 * norm)
        assert step.measured["step_norm"] == pytest.approx(norm, rel=1e-9)
        model.zero_grad()
    assert removed


def test_where_nothing_conflicts_the_step_is_the_plain_one_to_the_bit():
    model = tiny("llama", LAYERS, dtype=torch.float32)
    forget, _ = DATA[0]
    for rule in ("pcgrad:tensor", "retain:group", "gru"):
        us, rs = parts(model, forget, forget, NLL(), NLL())
        monitor = gfast.GEffectMonitor(model, surgery=rule)
        monitor.forget(gfast.model_loss(model, forget, NLL()))
        monitor.retain(gfast.model_loss(model, forget, NLL()))
        assert all(torch.equal(p.grad, us[n] + rs[n]) for n, p in model.named_parameters())
        model.zero_grad()


@pytest.mark.parametrize("rule", ["gru", "retain:tensor", "pcgrad:tensor", "sago"])
def test_without_a_retain_loss_the_risk_is_spared_but_not_descended(rule):
    model = tiny("llama", LAYERS)
    forget, retain = DATA[0]
    us, rs = parts(model, forget, retain, GA(), NLL())
    surgery = Surgery.parse(rule)
    expected = literal(surgery.kind, surgery.scope, us, rs, {}, surgery.moving, adds=False)
    monitor = gfast.GEffectMonitor(model, objective=GA(), surgery=rule)
    monitor.forget(gfast.model_loss(model, forget, GA()))
    monitor.retain(None, risk=gfast.model_loss(model, retain, NLL()))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-11, atol=1e-14)
    model.zero_grad()
    monitor = gfast.GEffectMonitor(model, objective=GA(), surgery=rule)
    monitor.forget(gfast.model_loss(model, forget, GA()))
    for share, last in ((0.25, False), (0.75, True)):  # a risk in two micro-batches
        monitor.retain(None, risk=share * gfast.model_loss(model, retain, NLL()).loss, last=last)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-13)
    truth = gfast.g_effect(model, GA(), forget=forget, retain=retain)
    assert monitor.effect().total("retain") == pytest.approx(truth.total("retain"), rel=1e-9)
    assert monitor.effect().risks["retain"] == pytest.approx(truth.risks["retain"], rel=1e-9)
    model.zero_grad()
    monitor.forget(gfast.model_loss(model, forget, GA()))
    monitor.retain(None, risk=gfast.model_loss(model, retain, NLL()), last=False)
    with pytest.raises(ValueError, match="in every retain.. or in none"):
        monitor.retain(gfast.model_loss(model, retain, NLL()))


def test_surgery_works_on_the_retain_loss_and_on_all_its_micro_batches():
    model = tiny("llama", LAYERS)
    forget, retain = DATA[0]
    own = {**retain, "ref_hidden": torch.randn(3, retain["labels"].shape[1], 16, dtype=torch.float64)}
    own["ref_head"] = torch.randn(61, 16, dtype=torch.float64)
    us, rs = parts(model, forget, own, GA(), KL())
    expected = literal("pcgrad", "tensor", us, rs, {}, 1.0)
    monitor = gfast.GEffectMonitor(model, objective=GA(), surgery="pcgrad:tensor")
    monitor.forget(gfast.model_loss(model, forget, GA()))
    monitor.retain(
        0.5 * gfast.model_loss(model, own, KL()).loss, last=False, risk=gfast.model_loss(model, retain, NLL())
    )
    monitor.retain(0.5 * gfast.model_loss(model, own, KL()).loss)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-13)
    model.zero_grad()
    truth = gfast.g_effect(model, GA(), forget=forget, retain=retain)
    assert monitor.effect().retain == pytest.approx(truth.retain, rel=1e-9)


@pytest.mark.parametrize(
    "text", ["pc", "pcgrad:layer", "sago:group", "gru:global:2", "gru:global:x", "retain:group:1", ""]
)
def test_an_unknown_rule_is_refused_with_those_there_are(text):
    with pytest.raises(ValueError, match="surgery .*there is pcgrad, retain, gru, sago|surgery .*must be in"):
        gfast.GEffectMonitor(tiny("llama"), surgery=text)


def reached(model, batch, objective, layer):
    """A loss that does not reach what follows a layer."""
    if layer is None:
        return gfast.model_loss(model, batch, objective).loss
    return model(**batch, output_hidden_states=True).hidden_states[layer].square().sum() * 3.0


@pytest.mark.parametrize("sides", [(None, 2), (2, None), (1, 3)], ids=str)
@pytest.mark.parametrize("rule", RULES + ["sago"])
def test_a_gradient_that_a_parameter_does_not_get_is_zero(rule, sides):
    model = tiny("llama", LAYERS)
    surgery = Surgery.parse(rule)
    for sign in (1.0, -1.0):  # units that conflict, and units that do not
        averages: dict = {}
        monitor = gfast.GEffectMonitor(model, surgery=rule)
        for step, (forget, retain) in enumerate(DATA):
            # in the second step retain reaches less than in the first, which the averages remember
            layers = (sides[0], 1 if step and sides[1] else sides[1])
            losses = [
                lambda: sign * reached(model, forget, GA(), layers[0]),  # noqa: B023
                lambda: reached(model, retain, NLL(), layers[1]),  # noqa: B023
            ]
            found = []
            for one in losses:
                model.zero_grad()
                one().backward()
                grads = ((n, p, p.grad) for n, p in model.named_parameters())
                found.append({n: torch.zeros_like(p) if g is None else g for n, p, g in grads})
            model.zero_grad()
            expected = literal(surgery.kind, surgery.scope, *found, averages, surgery.moving)
            monitor.forget(losses[0]())
            monitor.retain(losses[1]())
            for name, p in model.named_parameters():
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-13)
            model.zero_grad()


@pytest.mark.parametrize("rule", RULES)
def test_parallel_gradients(rule):
    """u = -r: the forget gradient is removed whole, both are under pcgrad; u = r: they add up."""
    model = tiny("llama", LAYERS, dtype=torch.float32)
    _, retain = DATA[0]
    _, rs = parts(model, retain, retain, NLL(), NLL())
    for objective, share in ((GA(), 0.0 if rule.startswith("pcgrad") else 1.0), (NLL(), 2.0)):
        monitor = gfast.GEffectMonitor(model, surgery=rule)
        monitor.forget(gfast.model_loss(model, retain, objective))
        monitor.retain(gfast.model_loss(model, retain, NLL()))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, share * rs[name], rtol=1e-5, atol=1e-5 * float(rs[name].abs().max()))
        model.zero_grad()


def gru_steps(model, monitor, factors):
    """What gru makes of a forget loss that pulls against the retain losses; the retain batches take turns."""
    out = []
    for index, factor in factors:
        monitor.forget(gfast.model_loss(model, DATA[0][1], GA()))
        monitor.retain(gfast.model_loss(model, DATA[index][1], NLL()).loss * factor)
        out.append({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
    return out


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("scope", ["tensor", "group", "global"])
def test_a_step_that_is_dropped_or_broken_off_leaves_grus_average_as_it_was(scope):
    model = tiny("llama", LAYERS)
    monitor = gfast.GEffectMonitor(model, surgery=f"gru:{scope}")
    *_, expected = gru_steps(model, monitor, [(0, 1.0), (1, 1.0)])
    monitor = gfast.GEffectMonitor(model, surgery=f"gru:{scope}")
    gru_steps(model, monitor, [(0, 1.0), (0, math.nan), (1, math.inf)])
    assert monitor.dropped is not None
    monitor.forget(gfast.model_loss(model, DATA[0][1], GA()))
    broken = gfast.model_loss(model, DATA[1][1], NLL()).loss
    handle = model.model.embed_tokens.weight.register_hook(lambda grad: 1 / 0)  # after all others
    with pytest.raises(ZeroDivisionError):
        monitor.retain(broken)
    handle.remove()
    assert same(gru_steps(model, monitor, [(1, 1.0)])[0], expected)


def test_grus_average_does_not_see_the_loss_scale():
    model = tiny("llama", LAYERS, dtype=torch.float32)
    steps = [(0, 1.0), (1, 1.0), (0, 0.5)]
    expected = gru_steps(model, gfast.GEffectMonitor(model, surgery="gru"), steps)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))  # it is set up at its first loss
    monitor = gfast.GEffectMonitor(model, surgery="gru", scaler=scaler)
    for exponent, step, right in zip((10, 3, 16), steps, expected, strict=True):
        scaler.update(2.0**exponent)
        (found,) = gru_steps(model, monitor, [step])
        for name, value in right.items():
            torch.testing.assert_close(found[name] / 2.0**exponent, value, rtol=1e-5, atol=1e-6)


def test_grus_state_goes_on_in_another_monitor():
    model = tiny("llama", LAYERS)
    (fresh,) = gru_steps(model, gfast.GEffectMonitor(model, surgery="gru:group"), [(1, 1.0)])
    monitor = gfast.GEffectMonitor(model, surgery="gru:group")
    assert monitor.state_dict() == {}
    gru_steps(model, monitor, [(0, 1.0)])
    state = {name: value.clone() for name, value in monitor.state_dict().items()}
    assert set(state) == {name for name, _ in model.named_parameters()}
    (expected,) = gru_steps(model, monitor, [(1, 1.0)])
    again = gfast.GEffectMonitor(model, surgery="gru:group")
    again.load_state_dict(state)
    assert same(gru_steps(model, again, [(1, 1.0)])[0], expected) and not same(fresh, expected)
    for surgery, wrong, words in (
        ("pcgrad", state, "averages of gru, and the monitor's surgery is pcgrad:global"),
        ("gru", {"model.none": torch.zeros(2)}, "'model.none' \\(2,\\), which is no parameter"),
        ("gru", {"lm_head.weight": torch.zeros(2)}, "'lm_head.weight' \\(2,\\), which is no parameter"),
    ):
        with pytest.raises(ValueError, match=words):
            gfast.GEffectMonitor(model, surgery=surgery).load_state_dict(wrong)


@pytest.mark.parametrize("rule", [*RULES, "sago"])
def test_sparse_gradients(rule):
    """Those of torch.nn.Embedding(sparse=True), on either side: what the optimizer gets is dense."""
    torch.manual_seed(0)
    table, head = torch.nn.Embedding(9, 4, sparse=True).double(), torch.nn.Linear(4, 1).double()
    model = torch.nn.ModuleDict({"table": table, "head": head})
    losses = [
        lambda: -head(table(torch.tensor([1, 2]))).exp().sum(),
        lambda: head(table(torch.tensor([2, 3]))).exp().sum(),
    ]
    found = []
    for one in losses:
        model.zero_grad()
        one().backward()
        found.append({n: p.grad.to_dense() for n, p in model.named_parameters()})
    model.zero_grad()
    surgery = Surgery.parse(rule)
    monitor = gfast.GEffectMonitor(model, lambda name: "all", surgery=surgery)
    monitor.forget(losses[0]())
    monitor.retain(losses[1]())
    scope = "tensor" if surgery.scope == "tensor" else "global"
    expected = literal(surgery.kind, scope, *found, {}, surgery.moving)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-11, atol=1e-14)
    assert monitor.effect().total("retain") == pytest.approx(
        sum(float((found[0][n] * g).sum()) for n, g in found[1].items())
    )
