"""One of several processes that step with a GEffectMonitor, and what one process measures on the batches of all."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from torch import distributed

import gfast
from gfast.objectives import NLL, TNPO, WGA
from gfast.wrappers import unwrap_name
from helpers.wrappers_parallel import WRAPPERS, batch_of, joined

OBJECTIVE = TNPO()
CASES = ("plain", "unlearn", "risk", "exact", "no_sync", "pcgrad:tensor", "pcgrad:group", "pcgrad", "gru", "sago")
CASES += ("pcgrad, risk",)
SMALL = 1e-6  # of a retain loss whose norm is lost beside the forget loss's


def step(monitor, model, forget, retain, case: str, alone: bool) -> None:
    """One step; the literal one of all batches where `alone`."""
    ddp = monitor.processes.replicated
    silent = ddp.no_sync if case == "no_sync" and ddp is not None else contextlib.nullcontext
    loss = lambda batch, objective: gfast.model_loss(model, batch, objective)  # noqa: E731
    with silent():
        out = loss(forget, OBJECTIVE)
        risk = (lambda: loss(forget, NLL())) if case == "unlearn" else None
        monitor.forget(out, risk=risk)
    if case.endswith("risk"):
        monitor.retain(lambda: loss(retain, WGA()), risk=lambda: loss(retain, NLL()))
    elif case == "exact":
        monitor.retain(lambda: gfast.model_loss(model, retain, NLL()).loss * 0.25 * SMALL, last=False)
        monitor.retain(lambda: gfast.model_loss(model, retain, NLL()).loss * 0.75 * SMALL, factor=SMALL)
    else:
        monitor.retain(loss(retain, NLL()))


def run(model, forget, retain, case: str) -> tuple[list, dict[str, torch.Tensor]]:
    options = dict(unlearn=case == "unlearn", accumulate="exact" if case == "exact" else "first")
    surgery, _, _ = case.partition(",")
    surgery = surgery if surgery.partition(":")[0] in ("pcgrad", "gru", "sago") else None
    monitor = gfast.GEffectMonitor(model, objective=OBJECTIVE, surgery=surgery, **options)
    effects = []
    for _ in range(2 if surgery == "gru" else 1):
        model.zero_grad()
        step(monitor, model, forget, retain, case, alone=False)
        effects += [monitor.effect()] + ([monitor.effect(of="step")] if not case.endswith("risk") else [])
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            found[unwrap_name(name)] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
    model.zero_grad()
    return effects, found


def check(name: str, rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    make, wrap = WRAPPERS[name]
    single, model = make().eval(), wrap(make().eval())
    if name == "ddp":
        with pytest.raises(ValueError, match="is inside a DistributedDataParallel"):
            gfast.GEffectMonitor(model.module).forget(gfast.model_loss(model, batch_of(rank), NLL()))
        model.zero_grad()
    with torch.no_grad():  # after an evaluation, which leaves weights of FSDP2's root gathered
        gfast.model_logp(model, batch_of(rank))
    batches = [(batch_of(rank), batch_of(10 + rank)) for rank in range(world)]
    forget, retain = (joined(list(some)) for some in zip(*batches, strict=True))
    for case in CASES:
        expected, merged = run(single, forget, retain, case)
        effects, found = run(model, *batches[rank], case)
        assert found.keys() == merged.keys(), case
        for key, grad in merged.items():
            torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-12, msg=lambda t: f"{name}, {case}: {t}")  # noqa: B023
        for effect, truth in zip(effects, expected, strict=True):
            for side in truth.sides:
                a, b = getattr(effect, side), getattr(truth, side)
                scale = max(map(abs, b.values()))
                for group in b:
                    assert abs(a[group] - b[group]) <= 1e-9 * scale, (name, case, side, group, a, b)
                if side in effect.norms:
                    assert abs(effect.cosine(side) - truth.cosine(side)) < 1e-7, (name, case, side)
            assert abs(effect.measured["step_norm"] / truth.measured["step_norm"] - 1) < 1e-9
            assert abs(effect.risks["retain"] / truth.risks["retain"] - 1) < 1e-9
            one_sided = {"retain"} if name.startswith("ddp") and case.endswith("risk") else set()
            if one_sided:
                assert effect.norms.keys() == truth.norms.keys() - one_sided, (name, case)
            elif case != "unlearn":
                assert effect.norms.keys() == truth.norms.keys(), (name, case)
    if name == "ddp":
        check_unreached(single, make().eval(), batches, rank)
    distributed.destroy_process_group()


def check_unreached(single, inner, batches, rank: int) -> None:
    """Micro-batches without a reduction, of which the last does not reach what those before it have reached."""
    model = torch.nn.parallel.DistributedDataParallel(inner, find_unused_parameters=True)
    forget, retain = (joined(list(some)) for some in zip(*batches, strict=True))

    def hidden(model, batch):
        ids = batch["input_ids"]
        return lambda: model(input_ids=ids, output_hidden_states=True).hidden_states[1].square().mean()

    for surgery, risk in ((None, False), ("retain", False), ("retain", True)):
        found = []
        for each, mine in ((single, (forget, retain)), (model, batches[rank])):
            monitor = gfast.GEffectMonitor(each, objective=OBJECTIVE, surgery=surgery)
            each.zero_grad()
            with contextlib.nullcontext() if each is single or risk else model.no_sync():
                monitor.forget(gfast.model_loss(each, mine[0], OBJECTIVE))
                if surgery is not None and not risk:
                    monitor.retain(hidden(each, mine[1]), last=False)
            nll = partial(gfast.model_loss, each, mine[1], NLL()) if risk else None
            monitor.retain(hidden(each, mine[1]), risk=nll)
            found.append([p.grad.clone() for p in each.parameters()])
        for ours, right in zip(*reversed(found), strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)
