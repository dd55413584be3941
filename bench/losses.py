"""Time, memory and error of the unlearning losses beside what users run today."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import asdict, replace

import torch
from cases import DTYPES, HEADS, MARGINS, Case, Inputs, Step, bytes_moved, flops, make_inputs
from harness import give_back, interleaved, of_floor, peak_extra_bytes, peak_in_fresh_process, reason, synchronize
from laws import COPIES, PRODUCTS, verdict
from machine import Row
from memory import allowed_bytes, of_memory
from peers_losses import PROVIDERS, plain

CHECK_ROWS = 128  # a multiple of what the tiles of other projects' kernels take
NO_RESULT = 0.5  # relative error from which a provider computes something else
SWEEPS = {"rows": [128, 256, 512, 1024, 2048, 4096], "vocab": [8192, 16384, 32768, 65536, 131072, 262144]}
RANGES = {  # of a profile: what is wrapped in which name
    "gfast.ops.head:ChunkedHead.logits": "gfast::chunk/head GEMM",
    "gfast.ops.vocab_parallel:Shard.fold": "gfast::head GEMM in tiles, folded",
    "gfast.ops.head:ChunkedHead.add_gradients": "gfast::chunk/dH and dW GEMMs",
    "gfast.ops.head:_accumulate_product": "gfast::chunk/dW GEMM",
    "gfast.ops.head:ChunkedHead.gradients": "gfast::gradients put together",
    "gfast.ops.linear_unlearn_loss:weighted_rows": "gfast::chunk/row kernel",
    "gfast.ops.vocab_parallel:Shard.logp_rows": "gfast::chunk/row kernel, log-probs",
    "gfast.ops.vocab_parallel:Shard.logp_rows_grad": "gfast::chunk/row kernel, gradient",
    "gfast.ops.linear_unlearn_loss:sequence_weights": "gfast::sequence weights",
    "gfast.ops.unlearn_loss:weighted_rows": "gfast::row kernel",
    "gfast.ops.token_logp:logp_rows": "gfast::row kernel, log-probs",
    "gfast.ops.token_logp:logp_rows_grad": "gfast::row kernel, gradient",
}


def law(case: Case, provider: str) -> float | None:
    """How many floors gfast may take; None where nothing is demanded."""
    if not PROVIDERS[provider].ours or case.mode == "forward" or case.objective in MARGINS:
        return None
    if case.op == "linear":
        return PRODUCTS
    if case.op == "kl" and case.device == "cpu":
        return None
    return COPIES[case.device] if case.mode == "train" else None


def errors(case: Case, names: list[str]) -> tuple[dict[str, float | str], float]:
    """Largest relative error (2-norm) of loss and gradients against fp64, or why there is none; and the limit."""
    width = case.width if case.device == "cuda" else min(case.width, 512)
    small = replace(case, rows=min(case.rows, CHECK_ROWS), width=width)
    inputs = make_inputs(small)
    wide = replace(inputs, tensors=tuple(t.double() for t in inputs.tensors), ref_logp=inputs.ref_logp.double())
    if inputs.ref_logits is not None:
        wide = replace(wide, ref_logits=inputs.ref_logits.double())

    def error(step: Step, truth: tuple[torch.Tensor, ...]) -> float:
        worst = 0.0
        for errors_of, true in zip(step(), truth, strict=True):
            value = float((errors_of.double() - true.double()).norm() / true.double().norm())
            worst = max(worst, value if math.isfinite(value) else math.inf)
        return worst

    # what rounding costs is read off the gradients, also in modes that only return the loss
    whole = small if case.mode in ("train", "frozen") else replace(small, mode="train")
    base = error(plain(whole, inputs, upcast=True), plain(whole, wide)())
    truth = plain(small, wide)()
    errors_of: dict[str, float | str] = {}
    for name in names:
        if PROVIDERS[name].floor:
            continue
        try:
            step = PROVIDERS[name].make(small, inputs)
            if step is not None:
                errors_of[name] = error(step, truth)
        except Exception as problem:
            errors_of[name] = reason(problem)
    return errors_of, 2 * base + torch.finfo(DTYPES[case.dtype]).eps


def bench(case: Case, names: list[str], args: argparse.Namespace) -> list[Row]:
    """One row a provider that applies: timed, wrong (not timed), failed or skipped."""
    missing = {name: why for name in names if (why := PROVIDERS[name].why_not(case.device)) is not None}
    names = [name for name in names if name not in missing]
    error_of, limit = errors(case, names)
    notes: dict[str, Row] = {name: {"failed": why} for name, why in error_of.items() if isinstance(why, str)}
    for name, error in error_of.items():
        if not isinstance(error, str) and error > (limit if PROVIDERS[name].ours else NO_RESULT):
            notes[name] = {"wrong": f"error {error:.2e} exceeds {limit:.2e}: not timed", "relative_error": error}
    inputs = make_inputs(case)
    wanted = [name for name in names if name not in notes and (name in error_of or PROVIDERS[name].floor)]
    steps, first = first_calls(case, inputs, wanted, notes)
    peers = args.budget if args.peer_budget is None else args.peer_budget
    budget = {name: args.budget if PROVIDERS[name].ours or PROVIDERS[name].floor else peers for name in steps}
    judged = case.op == "linear" and not args.no_memory
    allowed = allowed_bytes(case, inputs) if judged else 0
    times = interleaved(steps, case.device, args.repetitions, budget_s=budget, first=first)
    common = {**asdict(case), "shape": case.shape, "valid": inputs.valid}
    rows = []
    for name in steps:
        row = {**common, "provider": name, "relative_error": error_of.get(name), **times[name]}
        seconds = times[name]["median_ms"] / 1e3
        if case.op != "linear":
            row["gb_per_s"] = round(bytes_moved(case) / seconds / 1e9, 2)
        else:
            row["tflop_per_s"] = round(flops(case, inputs.valid) / seconds / 1e12, 4)
        if "floor" in times:
            row["times_floor"] = round(of_floor(times[name], (1, times["floor"])), 3)
            if (most := law(case, name)) is not None:
                row |= verdict(row["times_floor"], most)
        if "wga" in times and name == "gfast":
            row["times_wga"] = round(of_floor(times[name], (1, times["wga"])), 3)
        if error_of.get(name, 0.0) > limit:
            row["unequal"] = f"error {error_of[name]:.2e} exceeds {limit:.2e}"
        if not args.no_memory and name not in ("floor", "wga"):  # the floor writes into memory that is there
            try:
                row["peak_extra_mb"] = size = peak_mb(case, name, steps[name])
                if judged and PROVIDERS[name].ours and size is not None:
                    row["of_memory"] = of_memory(size, allowed)
            except RuntimeError as problem:  # too large for the machine, say: the times are not lost with it
                print(f"{name}: {problem}", flush=True)
        rows.append(row)
    rows += [{**common, "provider": name, **note} for name, note in notes.items()]
    rows += [{**common, "provider": name, "skipped": why} for name, why in missing.items() if case.op == "linear"]
    return rows


def first_calls(
    case: Case, inputs: Inputs, names: list[str], notes: dict[str, Row]
) -> tuple[dict[str, Step], dict[str, float]]:
    """Steps of those that apply, each called once, and the seconds of that call; who fails gets a note."""
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    for name in names:
        try:
            step = PROVIDERS[name].make(case, inputs)
            if step is not None:
                start = time.perf_counter()
                step()
                synchronize(case.device)
                if not PROVIDERS[name].compiles:
                    first[name] = time.perf_counter() - start
                steps[name] = step
        except Exception as problem:
            notes[name] = {"failed": reason(problem)}
        if case.device == "cuda":
            torch.cuda.empty_cache()
    return steps, first


def peak_mb(case: Case, name: str, step: Step) -> float | None:
    if case.device == "cuda":
        size = peak_extra_bytes(step, "cuda")
    else:
        description = json.dumps({"provider": name, **asdict(case)})
        size = peak_in_fresh_process(measure, description, ["losses", "torch._inductor.compile_fx"])
    return None if size is None else round(size / 2**20, 1)


def measure(description: str) -> int | None:
    """Peak of a described case, in the fresh process."""
    fields = json.loads(description)
    name = fields.pop("provider")
    case = Case(**fields)
    step = PROVIDERS[name].make(case, make_inputs(case))
    step()  # thread pools, a compiler, and what a matrix library keeps for its products are not a call's memory
    return peak_extra_bytes(step) if give_back() else None


def combinations(args: argparse.Namespace) -> list[Case]:
    """All combinations that make sense, an op's shapes together."""
    cases = []
    for op in args.ops:
        default = 4096 if args.device == "cuda" else {"logits": 1024, "linear": 512, "kl": 1024}[op]
        sizes = [(name, *HEADS[name], rows) for name in args.heads for rows in args.rows or [default]]
        if args.sweep == "rows":
            sizes = [(*sizes[0][:3], rows) for rows in args.values or SWEEPS["rows"]]
        elif args.sweep == "vocab":
            _, width, _, rows = sizes[0]
            sizes = [(f"V{vocab}", width, vocab, rows) for vocab in args.values or SWEEPS["vocab"]]
        objectives = ["kl"] if op == "kl" else args.objectives
        for size, *chosen in itertools.product(sizes, args.dtypes, objectives, args.modes, args.batches):
            dtype, objective, mode, batch = chosen
            if op == "linear" or mode != "frozen":
                cases.append(Case(op, objective, *size, dtype, mode, batch, args.device))
    for case in cases:
        case.layout  # noqa: B018 - refuses rows that cannot be cut, before any work
    return cases
