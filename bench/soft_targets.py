"""Soft targets over the vocabulary beside token_kl, from logits and from hidden states: time, memory and error."""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable

import torch
from cases import DTYPES, HEADS, Case, Inputs, Step, make_inputs, step_of
from harness import give_back, interleaved, of_floor, peak_extra_bytes, peak_in_fresh_process
from laws import MEMORY, SOFT, verdict
from machine import Row
from torch import Tensor

import gfast

FLOOR = "token_kl"
KINDS = {  # beta, kind; of the model's own logits where the name says so
    "UNDIAL": (10.0, "cross_entropy"),
    "CEU": (math.inf, "cross_entropy"),
    "JSD": (0.0, "js"),
}
OWN = ("CEU",)
CHECK_ROWS = 64


def case_of(op: str, head: str, rows: int, dtype: str, device: str) -> Case:
    width, vocab = HEADS[head]
    return Case(
        {"logits": "kl", "linear": "linear"}[op], "nll", head, width, vocab, rows, dtype, "train", "full", device
    )


def inputs_of(case: Case) -> tuple[Inputs, tuple[Tensor, ...]]:
    """A case's inputs, and the target's: logits, or hidden states and a head."""
    inputs = make_inputs(case)
    if case.op == "kl":
        return inputs, (inputs.ref_logits,)
    return inputs, tuple(t.roll(1, 0) for t in inputs.tensors)


def step(case: Case, inputs: Inputs, reference: tuple[Tensor, ...], name: str) -> Step:
    linear = case.op == "linear"
    if name == FLOOR:
        op: Callable[..., Tensor] = gfast.linear_token_kl if linear else gfast.token_kl
    else:
        beta, kind = KINDS[name]
        op = functools.partial(
            gfast.linear_soft_target_loss if linear else gfast.soft_target_loss, beta=beta, kind=kind
        )
        reference = (None,) * len(reference) if name in OWN else reference
    return step_of(case, inputs, lambda *leaves: op(*leaves, *reference, inputs.labels))


def plain(case: Case, inputs: Inputs, reference: tuple[Tensor, ...], name: str, dtype: torch.dtype) -> Step:
    """By torch's own functions, logits of a dtype widened to fp32 at least."""
    wide = Inputs(tuple(t.to(dtype) for t in inputs.tensors), inputs.labels, inputs.ref_logp)

    def logits(tensors: tuple[Tensor, ...]) -> Tensor:
        z = torch.nn.functional.linear(*tensors) if len(tensors) > 1 else tensors[0]
        return z if z.dtype == torch.float64 else z.float()

    def loss(*leaves: Tensor) -> Tensor:
        z = logits(leaves)
        x = z.detach() if name in OWN else logits(tuple(t.to(dtype) for t in reference))
        beta, kind = (0.0, "kl") if name == FLOOR else KINDS[name]
        label = torch.nn.functional.one_hot(inputs.labels, z.shape[-1]).bool()
        q, log_p = torch.where(label, x - beta, x).softmax(-1), z.log_softmax(-1)
        if kind == "js":
            p = log_p.exp()
            log_m = ((p + q) / 2).log()
            return 0.5 * (p * (log_p - log_m) + q * (q.log() - log_m)).sum(-1).mean()
        value = -(q * log_p).sum(-1).mean()
        return value + torch.xlogy(q, q).sum(-1).mean() if kind == "kl" else value

    return step_of(case, wide, loss)


def error(case: Case, name: str) -> tuple[float, float]:
    """Largest relative error of loss and gradients on a few rows, and what is allowed: twice plain PyTorch's of that
    dtype and one rounding."""
    few = case_of("linear" if case.op == "linear" else "logits", case.head, CHECK_ROWS, case.dtype, case.device)
    inputs, reference = inputs_of(few)
    truth = plain(few, inputs, reference, name, torch.float64)()
    theirs = plain(few, inputs, reference, name, DTYPES[case.dtype])()

    def worst(values: tuple[Tensor, ...]) -> float:
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(values, truth, strict=True))

    rounded = worst(tuple(t.to(DTYPES[case.dtype]) for t in truth))
    return worst(step(few, inputs, reference, name)()), 2 * max(worst(theirs), rounded) + torch.finfo(
        DTYPES[case.dtype]
    ).eps


def bench(args: argparse.Namespace, op: str, head: str, dtype: str) -> list[Row]:
    rows = args.rows or (4096 if args.device == "cuda" else {"logits": 1024, "linear": 512}[op])
    case = case_of(op, head, rows, dtype, args.device)
    errors = {name: error(case, name) for name in (FLOOR, *KINDS)}
    wrong = [
        f"{name}: error {measured:.2e} exceeds {most:.2e}"
        for name, (measured, most) in errors.items()
        if measured > most
    ]
    if wrong:
        sys.exit(f"nothing was timed: {'; '.join(wrong)}")
    inputs, reference = inputs_of(case)
    steps = {name: step(case, inputs, reference, name) for name in errors}
    times = interleaved(steps, args.device, args.repetitions)
    peaks = {} if args.no_memory else {name: peak_mb(case, op, name, steps[name]) for name in steps}
    measured = []
    for name in steps:
        row: Row = {"op": op, "provider": name, "head": head, "shape": case.shape, "dtype": dtype}
        row |= {"relative_error": errors[name][0], **times[name]}
        if peaks.get(name) is not None:
            row["peak_extra_mb"] = peaks[name]
        if name != FLOOR:
            row["ratio"] = round(of_floor(times[name], (1, times[FLOOR])), 3)
            row |= verdict(row["ratio"], SOFT)
            if peaks.get(name) and peaks.get(FLOOR):
                ratio = round(peaks[name] / peaks[FLOOR], 3)
                row["of_memory"] = {"ratio": ratio, **verdict(ratio, MEMORY)}
        measured.append(row)
    return measured


def peak_mb(case: Case, op: str, name: str, here: Step) -> float | None:
    if case.device == "cuda":
        size = peak_extra_bytes(here, "cuda")
    else:
        description = json.dumps([op, case.head, case.rows, case.dtype, case.device, name])
        size = peak_in_fresh_process(measure, description, ["soft_targets"])
    return None if size is None else round(size / 2**20, 1)


def measure(description: str) -> int | None:
    """Peak of a described case, in the fresh process."""
    *fields, name = json.loads(description)
    case = case_of(*fields)
    call = step(case, *inputs_of(case), name)
    call()
    return peak_extra_bytes(call) if give_back() else None
