"""What the G-effect of every step costs: training steps with GEffectMonitor beside the plain step, time and memory."""

from __future__ import annotations

import argparse
import json
import sys

import torch
from cases import batch_pair, random_model
from harness import give_back, interleaved, of_floor, peak_extra_bytes, peak_in_fresh_process
from laws import LIVE, verdict
from machine import Row

import gfast
from gfast.objectives import GA, NLL, TNPO, WGA

OBJECTIVES = {"ga": GA(), "wga": WGA(), "tnpo": TNPO()}
WAYS = ("retain side", "retain side, update", "both sides", "pcgrad:group")


class Steps:
    """Steps of WGA (or another objective) on forget and NLL on retain data by AdamW, measured or not."""

    def __init__(self, settings: Row) -> None:
        where = (settings["device"],)
        self.model = random_model(settings["shape"], settings["dtype"], *where, settings["layers"])
        self.forget, self.retain = batch_pair(settings["shape"], settings["batch"], settings["tokens"], *where)
        self.forget["ref_logp"] = torch.full(self.forget["labels"].shape, -4.0, device=settings["device"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-9)
        self.objective = OBJECTIVES[settings["objective"]]

    def plain(self) -> None:
        gfast.model_loss(self.model, self.forget, self.objective).loss.backward()
        gfast.model_loss(self.model, self.retain, NLL()).loss.backward()

    def monitored(self, way: str):
        both = way == "both sides"
        surgery = way if ":" in way else None
        optimizer = self.optimizer if way.endswith("update") else None
        options = dict(unlearn=both, objective=self.objective, surgery=surgery, optimizer=optimizer)
        monitor = gfast.GEffectMonitor(self.model, **options)

        def gradients() -> None:
            from gfast.training.live import loss_and_risk

            if both and monitor.identity is None:
                count = int((self.forget["labels"][:, 1:] != -100).sum())
                options = dict(normalizer=None, reference="auto")
                out, risk = loss_and_risk(self.model, self.forget, self.objective, count, **options)
                monitor.forget(out, risk=risk)
            else:
                monitor.forget(gfast.model_loss(self.model, self.forget, self.objective))
            monitor.retain(gfast.model_loss(self.model, self.retain, NLL()))
            monitor.effect()
            if optimizer is not None:
                monitor.update_effect()

        gradients.monitor = monitor
        return gradients

    def gradients(self, way: str):
        return self.plain if way == "plain step" else self.monitored(way)

    def whole(self, way: str):
        make = self.gradients(way)

        def step() -> None:
            make()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step


def check(settings: Row) -> None:
    """Exits when a monitored step leaves other gradients than the plain one, or another effect than g_effect."""
    cut = settings if settings["shape"] == "tiny" else settings | {"layers": min(settings["layers"] or 2, 2)}
    steps = Steps(cut)
    steps.plain()
    expected = [p.grad for p in steps.model.parameters()]
    steps.optimizer.zero_grad()
    make = steps.monitored("retain side")
    make()
    if not all(torch.equal(p.grad, grad) for p, grad in zip(steps.model.parameters(), expected, strict=True)):
        sys.exit("a monitored step leaves other gradients than the plain one; nothing was timed")
    effect = make.monitor.effect()
    steps.optimizer.zero_grad()
    truth = gfast.g_effect(steps.model, steps.objective, forget=steps.forget, retain=steps.retain, norms=True)
    off = abs(effect.total("retain") - truth.total("retain"))
    scale = abs(truth.total("retain") / (truth.cosine("retain") or 1.0))
    if not off <= {"fp32": 1e-5, "bf16": 2e-2}[settings["dtype"]] * scale:
        sys.exit(f"a monitored step measures {effect.total('retain')}, and g_effect {truth.total('retain')}")


def measure(description: str) -> int | None:
    settings = json.loads(description)
    steps = Steps(settings)
    make = steps.gradients(settings["way"])
    for _ in range(2):  # the optimizer's state, and an update to measure
        make()
        steps.optimizer.step()
        steps.optimizer.zero_grad()
    give_back()
    return peak_extra_bytes(make, settings["device"])


def peak(settings: Row, way: str) -> int | None:
    description = json.dumps(settings | {"way": way})
    if settings["device"] == "cuda":
        return measure(description)
    return peak_in_fresh_process(
        measure, description, ["live", "torch._dynamo", "transformers.models.llama.modeling_llama"]
    )


def bench(settings: Row, args: argparse.Namespace) -> list[Row]:
    check(settings)
    steps, plain = Steps(settings), "plain step"
    calls = {plain: steps.whole(plain)} | {way: steps.whole(way) for way in WAYS}
    times = interleaved(calls, settings["device"], args.repetitions, warmup=2, budget_s=args.budget)
    largest = max(p.numel() * p.element_size() for p in steps.model.parameters())
    del steps, calls
    memory = {} if args.no_memory else {way: peak(settings, way) for way in (plain, *WAYS)}
    rows = []
    for way in (plain, *WAYS):
        row: Row = {"name": way, **times[way]}
        if way != plain:
            floor = "retain side" if way.endswith("update") else plain
            row |= {"floor": floor, "ratio": round(of_floor(times[way], (1, times[floor])), 4)}
            if way in LIVE:
                row |= verdict(row["ratio"], LIVE[way])
        if memory.get(way) is not None:
            row["peak_extra_mb"] = round(memory[way] / 2**20, 1)
            if way == "retain side" and memory.get(plain) is not None:
                extra = (memory[way] - memory[plain]) / largest
                row["of_memory"] = {"ratio": round(extra, 4), **verdict(extra, 1.0)}
        rows.append(row)
    return rows
