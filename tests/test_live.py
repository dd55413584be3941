"""GEffectMonitor against g_effect and literal gradients in fp64; the plain step's gradients to the bit."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.geffect_models import batches, tiny  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect import Effect, GEffect  # noqa: E402
from gfast.objectives import GA, KL, NLL, NPO, RMU, TNPO, WGA  # noqa: E402

FORGET, RETAIN = batches(1, rows=2, sizes=(2,))[0], batches(2, rows=3, sizes=(3,))[0]


def loss(model, batch, objective, **options):
    return gfast.model_loss(model, batch, objective, **options)


def plain(model, *losses) -> dict[str, torch.Tensor]:
    """Gradients of the plain step: one backward after the other."""
    model.zero_grad()
    for one in losses:
        one().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_step(model, expected) -> None:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_effect(found: GEffect, truth: GEffect, sides=("unlearn", "retain"), rtol=1e-10) -> None:
    for side in sides:
        scale = max(map(abs, getattr(truth, side).values()))
        for values, right in ((getattr(found, side), getattr(truth, side)), (found.norms[side], truth.norms[side])):
            assert values == pytest.approx(right, rel=rtol, abs=rtol * scale)
        assert found.cosine(side) == pytest.approx(truth.cosine(side), rel=rtol)
        assert found.risks[side] == pytest.approx(truth.risks[side], rel=rtol)


def adapted(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config).double()


def checkpointed(model, reentrant: bool):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


MODELS = {
    "llama": lambda: tiny("llama"),
    "tied": lambda: tiny("tied_llama"),
    "gpt2": lambda: tiny("gpt2").eval(),
    "adapters": lambda: adapted(tiny("llama")),
    "checkpointed": lambda: checkpointed(tiny("tied_llama"), False),
    "reentrant": lambda: checkpointed(tiny("tied_llama"), True),
}


@pytest.mark.parametrize(
    ("kind", "objective"),
    [("llama", one) for one in (GA(), WGA(0.7), NPO(0.3))] + [(kind, TNPO()) for kind in MODELS],
    ids=lambda value: str(value),
)
def test_matches_g_effect_and_leaves_the_plain_steps_gradients(kind, objective):
    if kind == "adapters":
        pytest.importorskip("peft")
    torch.manual_seed(0)
    model = MODELS[kind]()
    expected = plain(
        model,
        lambda: 0.6 * loss(model, FORGET, objective).loss,
        lambda: 1.7 * loss(model, RETAIN, NLL()).loss,
    )
    truth = gfast.g_effect(model, objective, forget=FORGET, retain=RETAIN, norms=True)
    monitor = gfast.GEffectMonitor(model, unlearn=True, objective=objective)
    for _ in range(2):
        risk = None if isinstance(objective, GA) else (lambda: loss(model, FORGET, NLL()))
        monitor.forget(0.6 * loss(model, FORGET, objective).loss, risk=risk, factor=0.6)
        monitor.retain(1.7 * loss(model, RETAIN, NLL()).loss, factor=1.7)
        assert_same_step(model, expected)
        assert_effect(monitor.effect(), truth)
        of_step = monitor.effect(of="step")
        square = {g: n**2 for g, n in truth.norms["retain"].items()}
        assert of_step.retain == pytest.approx(
            {g: 0.6 * e + 1.7 * square[g] for g, e in truth.retain.items()}, rel=1e-9
        )
        total = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
        assert monitor.effect().measured["step_norm"] == pytest.approx(total, rel=1e-10)
        clipped = monitor.effect(max_norm=total / 2)
        assert clipped.retain == pytest.approx({g: e / 2 for g, e in truth.retain.items()}, rel=1e-5)
        assert clipped.cosine("retain") == pytest.approx(truth.cosine("retain"))
        model.zero_grad()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_the_risk_shares_the_loss_forward_and_retain_losses_may_be_no_risk():
    from gfast.model import output_loss
    from gfast.model_output import model_output

    model = tiny("llama")
    own = {**RETAIN, "ref_hidden": torch.randn(3, RETAIN["labels"].shape[1], 16, dtype=torch.float64)}
    own["ref_head"] = torch.randn(61, 16, dtype=torch.float64)
    truth = gfast.g_effect(model, WGA(0.7), forget=FORGET, retain=RETAIN, norms=True)
    for retain in (KL(), None):
        losses = [lambda: loss(model, FORGET, WGA(0.7)).loss, lambda: loss(model, own, KL()).loss]
        expected = plain(model, *losses[: 1 if retain is None else 2])
        monitor = gfast.GEffectMonitor(model, unlearn=True, objective=WGA(0.7))
        output = model_output(model, FORGET)
        monitor.forget(output_loss(output, FORGET, WGA(0.7)), risk=output_loss(output, FORGET, NLL()))
        risk = loss(model, RETAIN, NLL())
        monitor.retain(None if retain is None else losses[1](), risk=risk)
        assert_same_step(model, expected)
        assert_effect(monitor.effect(), truth)
        assert monitor.effect().measured["retain"] == "a backward of the risk"
        total = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
        assert monitor.effect().measured["step_norm"] == pytest.approx(total, rel=1e-10)
        model.zero_grad()


@pytest.mark.parametrize("accumulate", ["first", "exact"])
def test_micro_batches(accumulate):
    model = tiny("llama")
    forgets, retains = batches(1), batches(2)
    n_u, n_r = (sum(int((b["labels"][:, 1:] != -100).sum()) for b in some) for some in (forgets, retains))
    losses = [lambda b=b: loss(model, b, WGA(0.7), normalizer=n_u).loss for b in forgets]
    losses += [lambda b=b: loss(model, b, NLL(), normalizer=n_r).loss for b in retains]
    expected = plain(model, *losses)
    monitor = gfast.GEffectMonitor(model, objective=WGA(0.7), accumulate=accumulate)
    for one in losses[:2]:
        monitor.forget(one())
    first = int((retains[0]["labels"][:, 1:] != -100).sum()) / n_r
    for last, one in enumerate(losses[2:]):
        monitor.retain(one(), last=bool(last), factor=first if accumulate == "first" else 1.0)
    if accumulate == "first":
        assert_same_step(model, expected)
    else:
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-15)
    model.zero_grad()
    measured = retains[:1] if accumulate == "first" else retains
    truth = gfast.g_effect(model, WGA(0.7), forget=forgets, retain=measured, norms=True)
    assert_effect(monitor.effect(), truth, ["retain"])
    which = "all" if accumulate == "exact" else "the first"
    assert monitor.effect().measured["retain"].endswith(f"on {which} of 2 micro-batches")


def test_a_scaled_loss_and_a_lower_precision():
    """fp16's scaler: effects are those of the losses; autocast changes what the step computes, not what is measured."""
    model = tiny("llama", dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    monitor = gfast.GEffectMonitor(model, unlearn=True, objective=GA(), scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        truth = gfast.g_effect(model, GA(), forget=FORGET, retain=RETAIN, norms=True)
        forget, retain = loss(model, FORGET, GA()), loss(model, RETAIN, NLL())
    monitor.forget(forget)
    monitor.retain(retain)
    assert_effect(monitor.effect(), truth, rtol=1e-5)
    before = copy.deepcopy(model.state_dict())
    next(model.parameters()).grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gradients_on_one_side_alone_and_the_result_on_disk(tmp_path):
    model = tiny("llama")
    rmu = RMU(layer=2)
    monitor = gfast.GEffectMonitor(model, "layer", objective=rmu)
    monitor.forget(loss(model, FORGET, rmu))
    monitor.retain(loss(model, RETAIN, NLL()))
    effect = monitor.effect()
    assert effect.retain["layer_4"] == 0.0 != effect.retain["layer_1"] and effect.norms["objective"]["lm"] == 0.0
    assert effect.sides == ["retain"] and math.isnan(effect.total("unlearn"))
    assert "unlearn   not measured" in str(effect) and "nan" not in str(effect)
    assert {row["side"] for row in effect.rows()} == {"retain", ""}
    for again in (GEffect.from_json(effect.to_json()), Effect.from_parquet(effect.to_parquet(tmp_path / "e.parquet"))):
        assert again.retain == effect.retain and again.measured == effect.measured and again.sides == ["retain"]


def test_a_step_that_is_not_finite_is_dropped_and_said_so(caplog):
    model = tiny("llama")
    monitor = gfast.GEffectMonitor(model)
    monitor.forget(loss(model, FORGET, GA()).loss * math.inf)
    monitor.retain(loss(model, RETAIN, NLL()))
    assert all(p.grad is None for p in model.parameters())
    assert "is not finite" in monitor.dropped and "the step was dropped" in caplog.text
    with pytest.raises(ValueError, match="the step was dropped"):
        monitor.effect()
    monitor.forget(loss(model, FORGET, GA()))
    monitor.retain(loss(model, RETAIN, NLL()))
    assert monitor.dropped is None and math.isfinite(monitor.effect().total("retain"))


def test_every_retain_micro_batch_counts_whatever_parameters_it_reaches():
    """An expert that the last one sends no token to, a loss that ends at a layer."""
    model = tiny("llama")
    truth = gfast.g_effect(model, WGA(0.7), forget=FORGET, retain=RETAIN, norms=True)
    monitor = gfast.GEffectMonitor(model, objective=WGA(0.7), accumulate="exact")
    monitor.forget(loss(model, FORGET, WGA(0.7)))
    monitor.retain(loss(model, RETAIN, NLL()), last=False)
    monitor.retain(0.0 * model.model.embed_tokens.weight.sum())
    found = monitor.effect()
    assert found.retain == pytest.approx(truth.retain, rel=1e-10)
    assert found.norms["retain"] == pytest.approx(truth.norms["retain"], rel=1e-10)


@pytest.mark.parametrize("accumulate", ["first", "exact"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_retain_micro_batch_that_is_not_finite_drops_the_step(accumulate, which):
    model = tiny("llama")
    monitor = gfast.GEffectMonitor(model, accumulate=accumulate)
    monitor.forget(loss(model, FORGET, GA()))
    for index in range(2):
        monitor.retain(loss(model, RETAIN, NLL()).loss * (math.nan if index == which else 1.0), last=index == 1)
    assert "is not finite" in monitor.dropped and all(p.grad is None for p in model.parameters())


def test_a_retain_loss_that_is_not_finite_drops_the_step_where_a_risk_was_measured():
    model = tiny("llama")
    monitor = gfast.GEffectMonitor(model)
    monitor.forget(loss(model, FORGET, GA()))
    monitor.retain(loss(model, RETAIN, WGA()).loss * math.inf, risk=loss(model, RETAIN, NLL()))
    assert "is not finite" in monitor.dropped and all(p.grad is None for p in model.parameters())


def test_factors_may_be_negative_and_not_zero():
    model = tiny("llama")
    truth = gfast.g_effect(model, GA(), forget=FORGET, retain=RETAIN, norms=True)
    monitor = gfast.GEffectMonitor(model, unlearn=True, objective=GA())
    monitor.forget(-0.5 * loss(model, FORGET, GA()).loss, factor=-0.5)
    monitor.retain(-2.0 * loss(model, RETAIN, NLL()).loss, factor=-2.0)
    assert_effect(monitor.effect(), truth)
    model.zero_grad()
    for call in (lambda: monitor.forget(loss(model, FORGET, GA()), factor=0.0), lambda: monitor.retain(None, factor=0)):
        with pytest.raises(ValueError, match="factor=0|before forget"):
            call()
    monitor.forget(2.0 * loss(model, FORGET, GA()).loss, factor=2.0)
    with pytest.raises(ValueError, match="factor=1. after factor=2"):
        monitor.forget(loss(model, FORGET, GA()))
    monitor.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_any_dtype_the_gradients_are_the_plain_steps_to_the_bit(dtype):
    model = tiny("tied_llama", dtype=dtype)
    losses = [lambda: loss(model, FORGET, WGA(0.7)).loss, lambda: loss(model, RETAIN, NLL()).loss]
    expected = plain(model, *losses)
    for _ in range(2):  # two monitors on one model, one after the other
        monitor = gfast.GEffectMonitor(model, objective=WGA(0.7))
        monitor.forget(losses[0]())
        monitor.retain(losses[1]())
        assert_same_step(model, expected)
        truth = gfast.g_effect(model, WGA(0.7), forget=FORGET, retain=RETAIN)
        assert monitor.effect().retain == pytest.approx(truth.retain, rel=1e-5, abs=1e-6)
        model.zero_grad()


def test_what_leaves_the_gradients_alone_may_come_between():
    model = tiny("llama")
    truth = gfast.g_effect(model, GA(), forget=FORGET, retain=RETAIN)
    one, other = gfast.GEffectMonitor(model), gfast.GEffectMonitor(model)
    one.forget(loss(model, FORGET, GA()))
    gc.collect()
    assert gfast.g_effect(model, GA(), forget=FORGET, retain=RETAIN).retain == truth.retain
    with pytest.raises(ValueError, match="has a gradient before the step begins"):
        other.forget(loss(model, FORGET, GA()))
    one.retain(loss(model, RETAIN, NLL()))
    assert one.effect().retain == pytest.approx(truth.retain, rel=1e-10)
