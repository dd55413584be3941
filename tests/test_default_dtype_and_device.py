"""What gfast computes does not depend on PyTorch's default dtype and device."""

import contextlib

import pytest
import torch
from helpers.geffect_models import batches, tiny
from helpers.losses import ALL, problem, squared
from helpers.training_tiny import collator, datasets, tiny_model

import gfast
from gfast.geffect.conflict import retain_conflict
from gfast.objectives import CEU, ETW, MASC, NLL, PDU, RMU, RR, TPO, WGA, JensUn, Unilogit
from gfast.ops.row_dot import linear_row_dot
from gfast.training.reference import ReferenceCache


@contextlib.contextmanager
def defaults(dtype=None, device=None):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device) if device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


OTHERS = [dict(dtype=torch.float64), dict(dtype=torch.bfloat16), dict(device="meta"), dict(device="cpu")]


def tensors(x):
    """All tensors and numbers in a nest of results, in order."""
    if isinstance(x, torch.Tensor):
        return [x.detach()]
    if isinstance(x, float):
        return [torch.tensor(x, dtype=torch.float64, device="cpu")]
    if isinstance(x, dict):
        x = list(x.values())
    return [y for part in x for y in tensors(part)] if isinstance(x, (list, tuple)) else []


def losses(impl, inputs):
    hidden, weight, bias, labels, ref = inputs
    results = []
    for objective in [*ALL, squared, lambda p, r, s: [0.1] * len(p)]:
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
        options = dict(ref_logp=ref, impl=impl, reduction="sequence_mean")
        out = gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, chunk_rows=9, **options)
        from_logits = gfast.unlearn_loss(h @ w.t(), labels, objective, **options, normalizer=3)
        (out.loss + from_logits.loss).backward()
        results += [*out, *from_logits, h.grad, w.grad, b.grad]
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    kl = gfast.token_kl(h @ w.t(), hidden @ weight.t() * 0.5, labels, impl=impl)
    head_kl = gfast.linear_token_kl(h, w, hidden * 0.5, weight, labels, impl=impl)
    logp = gfast.linear_token_logp(h, w, labels, impl=impl), gfast.token_logp(h @ w.t(), labels, impl=impl)
    (kl + head_kl + logp[0].sum() + logp[1].mean()).backward()
    return [*results, kl, head_kl, *logp, h.grad, w.grad]


def others(inputs):
    hidden, weight, _, labels, _ = inputs
    rows = linear_row_dot(hidden[0], hidden[0] @ weight.t(), weight)
    valid = labels != -100
    values = RMU(layer=1, seed=3).value(hidden, valid), RR(layer=1).value(hidden, hidden * 0.5, valid)
    dots = gfast.grad_dot([hidden, weight], [hidden * 2, weight], groups=[0, 1], num_groups=2)
    return [RMU(layer=1, seed=3).direction(50), rows, dots, *values]


def effects(model, forget, retain):
    given, found = dict(forget=forget, retain=retain), []
    for engine in ("stream", "sample", "gram"):
        effect = gfast.g_effect(model, [WGA(0.7)], engine=engine, **given)[0]
        found += [effect.unlearn, effect.retain]
    samples, rows = gfast.pg_effect(model, **given), gfast.gram_effect(model, **given)
    tokens = gfast.token_effect(model, **given)
    return [*found, samples.unlearn, samples.retain, rows.matrix, tokens.unlearn, tokens.retain]


def of_vocabulary(impl, inputs):
    """Soft targets and statistics of whole rows, and the objectives made of them."""
    hidden, weight, _, labels, _ = inputs
    results = []
    for kind in ("cross_entropy", "kl", "js"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = gfast.linear_soft_target_loss(h, w, hidden * 0.5, weight, labels, beta=2.0, kind=kind, impl=impl)
        from_logits = gfast.soft_target_loss(h @ w.t(), hidden @ weight.t() * 0.5, labels, kind=kind, impl=impl)
        (loss + from_logits).backward()
        results += [loss, from_logits, h.grad, w.grad]
    for objective in (ETW(), PDU(), MASC(rho=0.5, eta=1.0, k=2), TPO(floor=0.0)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = gfast.linear_unlearn_loss(h, w, labels, objective, impl=impl)
        from_logits = gfast.unlearn_loss(h @ w.t(), labels, objective, impl=impl)
        (out.loss + from_logits.loss).backward()
        results += [*out, *from_logits, h.grad, w.grad]
    return [*results, *gfast.token_stats(hidden @ weight.t(), labels, impl=impl)]


def live(model, forget, retain):
    weights = retain_conflict(model, forget=forget, retain=retain)
    monitor = gfast.GEffectMonitor(model, unlearn=True, objective=WGA(0.7))
    monitor.forget(gfast.model_loss(model, forget[0], WGA(0.7)), risk=gfast.model_loss(model, forget[0], NLL()))
    monitor.retain(gfast.model_loss(model, retain[0], NLL()))
    effect = monitor.effect()
    results = [*weights, effect.unlearn, effect.retain]
    for objective in (CEU(), Unilogit(), JensUn(target_ids=(2, 3))):
        results.append(gfast.model_loss(model, forget[0], objective).loss)
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [*results, *gradients]


def from_data(model):
    (forget, _), collate = datasets(), collator()
    cache = ReferenceCache.build(model, forget, collate)
    batch = collate([forget[0], forget[1]])
    return [cache.values, batch, gfast.model_loss(model, batch, WGA(0.5)).loss]


CASES = {  # name: the call, and what makes its arguments
    "reference": (losses, lambda: ("reference", problem(dtype=torch.float32))),
    "fp32": (losses, lambda: ("auto", problem(dtype=torch.float32))),
    "bf16": (losses, lambda: ("auto", problem(dtype=torch.bfloat16))),
    "fp16": (losses, lambda: ("auto", problem(dtype=torch.float16))),
    "fp64": (losses, lambda: ("auto", problem(dtype=torch.float64))),
    "vocabulary": (of_vocabulary, lambda: ("auto", problem(dtype=torch.float32))),
    "vocabulary, reference": (of_vocabulary, lambda: ("reference", problem(dtype=torch.float32))),
    "others": (others, lambda: (problem(dtype=torch.float32),)),
    "effects": (effects, lambda: (tiny("llama", 2, torch.float32).eval(), batches(1), batches(2, 4, (1, 3)))),
    "live": (live, lambda: (tiny("llama", 2, torch.float32).eval(), batches(1), batches(2, 4, (1, 3)))),
    "data": (from_data, lambda: (tiny_model().eval(),)),
}


@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_them(name):
    call, arguments = CASES[name][0], CASES[name][1]()
    expected = tensors(call(*arguments))
    assert expected
    for changed in OTHERS:
        with defaults(**changed):
            found = tensors(call(*arguments))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b), changed
