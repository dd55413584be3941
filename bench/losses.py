"""Time, memory and error of the unlearning losses against what users run today.

    python bench/losses.py                                             # both ops, forward and backward, a small head
    python bench/losses.py --shapes llama-3.2-1b --rows 1024 --dtypes bf16 --json losses_large.json
    python bench/losses.py --modes forward,train,frozen,nograd --batches full,tofu,long
    python bench/losses.py --sweep vocab --json losses_sweep_vocab.json      # or --sweep rows
    python bench/losses.py --device cuda --shapes all --rows 8192 --dtypes bf16 --json losses.json
    python bench/losses.py --list                                      # providers, and why one cannot run here

Before timing, loss and gradients of every provider are compared with fp64 on a few rows (on a CPU of at most 512
hidden features). The limit is twice the error of plain PyTorch on upcast logits plus one rounding. gfast beyond it is
reported as wrong and not timed; so is anyone whose result is no result (an error over 50 %, NaN). Others beyond it, who
round or filter, are timed and marked unequal. "x floor" is the time in floors: a copy of the logits (half a copy where
nothing is written), or the bare matrix products of the mode over the rows that have a label.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, replace

import torch
from _loss_cases import BATCHES, DTYPES, HEADS, MODES, OBJECTIVES, Case, Step, bytes_moved, flops, make_inputs
from _loss_memory import allowed_bytes, of_memory
from _loss_providers import PROVIDERS, plain
from _timing import (
    environment,
    give_back,
    interleaved,
    of_floor,
    peak_extra_bytes,
    peak_in_fresh_process,
    synchronize,
    write_json,
)

CHECK_ROWS = {"full": 64, "tofu": 128, "long": 64}
NO_RESULT = 0.5  # relative error from which a provider computes something else
SWEEPS = {
    "rows": [128, 256, 512, 1024, 2048, 4096],
    "vocab": [8192, 16384, 32768, 65536, 131072, 262144],
}
COPY_LAW = {"cpu": 2.0, "cuda": 1 / 0.85}
PRODUCTS_LAW = 1.15


def law(case: Case, provider: str) -> float | None:
    """How many floors gfast may take; None where nothing is demanded."""
    if provider not in ("gfast", "gfast_inplace", "gfast_logp") or case.mode == "forward":
        return None
    if case.op == "linear":
        return PRODUCTS_LAW
    return COPY_LAW[case.device] if case.mode == "train" else None


def errors(case: Case, names: list[str]) -> tuple[dict[str, float | str], float]:
    """Largest relative error (2-norm) of loss and gradients against fp64, or why there is none; and the limit."""
    width = case.width if case.device == "cuda" else min(case.width, 512)
    small = replace(case, rows=min(case.rows, CHECK_ROWS[case.batch]), width=width)
    inputs = make_inputs(small)
    wide = replace(inputs, tensors=tuple(t.double() for t in inputs.tensors), ref_logp=inputs.ref_logp.double())

    def error(step: Step, truth: tuple[torch.Tensor, ...]) -> float:
        worst = 0.0
        for found, true in zip(step(), truth, strict=True):
            value = float((found.double() - true.double()).norm() / true.double().norm())
            worst = max(worst, value if math.isfinite(value) else math.inf)
        return worst

    # what rounding costs is read off the gradients, also in modes that only return the loss
    whole = small if case.mode in ("train", "frozen") else replace(small, mode="train")
    base = error(plain(whole, inputs, upcast=True), plain(whole, wide)())
    truth = plain(small, wide)()
    found: dict[str, float | str] = {}
    for name in names:
        if PROVIDERS[name].floor:
            continue
        try:
            step = PROVIDERS[name].make(small, inputs)
            if step is not None:
                found[name] = error(step, truth)
        except Exception as problem:
            found[name] = _reason(problem)
    return found, 2 * base + torch.finfo(DTYPES[case.dtype]).eps


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"


def bench(case: Case, names: list[str], args: argparse.Namespace) -> list[dict[str, object]]:
    """One row a provider that applies: timed, wrong (not timed), failed or skipped."""
    missing = {name: why for name in names if (why := PROVIDERS[name].why_not(case.device)) is not None}
    names = [name for name in names if name not in missing]
    found, limit = errors(case, names)
    notes: dict[str, dict[str, object]] = {name: {"failed": why} for name, why in found.items() if isinstance(why, str)}
    for name, error in found.items():
        if not isinstance(error, str) and error > (limit if PROVIDERS[name].ours else NO_RESULT):
            notes[name] = {"wrong": f"error {error:.2e} exceeds {limit:.2e}: not timed", "relative_error": error}
    inputs = make_inputs(case)
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    peers = args.budget if args.peer_budget is None else args.peer_budget
    budget = {name: args.budget if PROVIDERS[name].ours or PROVIDERS[name].floor else peers for name in names}
    for name in names:
        if name in notes or (name not in found and not PROVIDERS[name].floor):
            continue
        try:
            step = PROVIDERS[name].make(case, inputs)
            if step is not None:
                start = time.perf_counter()
                step()
                synchronize(case.device)
                if not compiled(name):  # whose first call compiles
                    first[name] = time.perf_counter() - start
                steps[name] = step
        except Exception as problem:
            notes[name] = {"failed": _reason(problem)}
        if case.device == "cuda":
            torch.cuda.empty_cache()
    judged = case.op == "linear" and not args.no_memory
    allowed = allowed_bytes(case, inputs) if judged else 0
    times = interleaved(steps, case.device, args.repetitions, budget_s=budget, first=first)
    common = {**asdict(case), "shape": case.shape, "valid": inputs.valid}
    rows = []
    for name in steps:
        row = {**common, "provider": name, "relative_error": found.get(name), **times[name]}
        seconds = times[name]["median_ms"] / 1e3
        if case.op == "logits":
            row["gb_per_s"] = round(bytes_moved(case) / seconds / 1e9, 2)
        else:
            row["tflop_per_s"] = round(flops(case, inputs.valid) / seconds / 1e12, 4)
        if "floor" in times:
            row["times_floor"] = round(of_floor(times[name], (1, times["floor"])), 3)
            if (most := law(case, name)) is not None:
                row |= {"law": most, "law_met": row["times_floor"] <= most}
        if found.get(name, 0.0) > limit:
            row["unequal"] = f"error {found[name]:.2e} exceeds {limit:.2e}"
        if not args.no_memory and name != "floor":  # which writes into memory that is there
            try:
                row["peak_extra_mb"] = size = memory(case, name, steps[name])
                if judged and PROVIDERS[name].ours and size is not None:
                    row["of_memory"] = of_memory(size, allowed)
            except RuntimeError as problem:  # too large for the machine, say: the times are not lost with it
                print(f"{name}: {problem}", flush=True)
        rows.append(row)
    rows += [{**common, "provider": name, **note} for name, note in notes.items()]
    rows += [{**common, "provider": name, "skipped": why} for name, why in missing.items() if case.op == "linear"]
    return rows


def compiled(name: str) -> bool:
    return name.startswith("compile") or name == "cce_torch"


def memory(case: Case, name: str, step: Step) -> float | None:
    if case.device == "cuda":
        size = peak_extra_bytes(step, "cuda")
    else:
        description = json.dumps({"provider": name, **asdict(case)})
        size = peak_in_fresh_process(measure, description, ["_loss_providers", "torch._inductor.compile_fx"])
    return None if size is None else round(size / 2**20, 1)


def measure(description: str) -> int | None:
    fields = json.loads(description)
    name = fields.pop("provider")
    case = Case(**fields)
    step = PROVIDERS[name].make(case, make_inputs(case))
    step()  # thread pools, a compiler, and what a matrix library keeps for its products are not a call's memory
    return peak_extra_bytes(step) if give_back() else None


def table(rows: list[dict[str, object]]) -> str:
    """One case's providers as text."""
    case, shape = rows[0], " x ".join(map(str, rows[0]["shape"]))
    speed = "gb_per_s" if case["op"] == "logits" else "tflop_per_s"
    lines = [
        f"\n{case['op']} {case['objective']} {case['mode']}  {case['head']} {shape} {case['dtype']} {case['device']}, "
        f"{case['batch']} ({case['valid']} labels)",
        f"  {'provider':18s} {'ms':>10s} {'iqr':>8s} {'GB/s' if case['op'] == 'logits' else 'TFLOP/s':>9s} "
        f"{'x floor':>8s} {'MB':>9s} {'error':>9s}",
    ]
    for row in rows:
        for note in ("wrong", "failed", "skipped"):
            if note in row:
                lines.append(f"  {row['provider']:18s} {note.upper()}: {row[note]}")
        if "median_ms" not in row:
            continue
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
        size = row.get("peak_extra_mb")
        line = (
            f"  {row['provider']:18s} {row['median_ms']:10.2f} {row['iqr_ms']:8.2f} {row[speed]:9.3g} "
            f"{row.get('times_floor', float('nan')):8.2f} {'' if size is None else size:>9} {error:>9s}"
        )
        if "law" in row:
            line += f"  law {row['law']:.2f}: {'met' if row['law_met'] else 'MISSED'}"
        if found := row.get("of_memory"):
            line += f"  memory {found['ratio']:.2f} of {found['law']:.2f}: {'met' if found['law_met'] else 'MISSED'}"
        lines.append(line + ("  UNEQUAL" if "unequal" in row else ""))
    return "\n".join(lines)


def cases(args: argparse.Namespace) -> list[Case]:
    """All combinations that make sense, an op's shapes together."""
    found = []
    for op in args.ops.split(","):
        default = 4096 if args.device == "cuda" else {"logits": 1024, "linear": 512}[op]
        heads = [(name, *HEADS[name]) for name in args.shapes.split(",")]
        sizes = [(*head, args.rows or default) for head in heads]
        if args.sweep == "rows":
            sizes = [(*heads[0], rows) for rows in args.values or SWEEPS["rows"]]
        elif args.sweep == "vocab":
            width, rows = heads[0][1], args.rows or default
            sizes = [(f"V{vocab}", width, vocab, rows) for vocab in args.values or SWEEPS["vocab"]]
        for name, width, vocab, rows in sizes:
            for dtype in args.dtypes.split(","):
                for objective in args.objectives.split(","):
                    for mode in args.modes.split(","):
                        for batch in args.batches.split(","):
                            if (op, mode) == ("logits", "frozen"):
                                continue
                            case = Case(op, objective, name, width, vocab, rows, dtype, mode, batch, args.device)
                            case.layout  # noqa: B018 - refuses rows that cannot be cut, before any work
                            found.append(case)
    return found


def described(choices: dict[str, str]) -> str:
    """For argparse, to which a percent sign is a place to fill in."""
    return "; ".join(f"{name}: {text}" for name, text in choices.items()).replace("%", "%%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--ops", default="logits,linear")
    parser.add_argument("--shapes", default="small", help="'all' or some of " + ", ".join(HEADS))
    parser.add_argument("--objectives", default="wga,tnpo,npo,nll")
    parser.add_argument("--dtypes", default="bf16,fp32", help="some of " + ", ".join(DTYPES))
    parser.add_argument("--modes", default="train", help=described(MODES))
    parser.add_argument("--batches", default="full", help=described(BATCHES))
    parser.add_argument("--rows", type=int, help="default: 1024 for logits and 512 for linear; 4096 on a GPU")
    parser.add_argument("--sweep", choices=SWEEPS, help="over rows, or over the vocabulary, with the first shape's D")
    parser.add_argument("--values", type=lambda text: [int(v) for v in text.split(",")], help="the sweep's values")
    parser.add_argument("--providers", help="default: all but compile_upcast; some of " + ", ".join(PROVIDERS))
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a provider and case")
    parser.add_argument("--peer-budget", type=float, help="the same for who is neither gfast nor a floor")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", help="file name under bench/results/DEVICE, or a path; written after every case")
    parser.add_argument("--list", action="store_true", help="list the providers and stop")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.list:
        for name, provider in PROVIDERS.items():
            why = provider.why_not(args.device)
            print(f"{name:20}{provider.what}{f' - {why}' if why else ''}")
        return
    if args.shapes == "all":
        args.shapes = ",".join(name for name in HEADS if name != "tiny")  # that one is for tests
    names = args.providers.split(",") if args.providers else [n for n in PROVIDERS if n != "compile_upcast"]
    for kind, given, known in (
        ("op", args.ops.split(","), ("logits", "linear")),
        ("shape", args.shapes.split(","), HEADS),
        ("provider", names, PROVIDERS),
        ("objective", args.objectives.split(","), OBJECTIVES),
        ("dtype", args.dtypes.split(","), DTYPES),
        ("mode", args.modes.split(","), MODES),
        ("batch", args.batches.split(","), BATCHES),
    ):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {kind} {unknown[0]!r}; choose from {', '.join(known)}")
    try:
        work = cases(args)
    except ValueError as problem:
        parser.error(str(problem))
    results: list[dict[str, object]] = []
    for case in work:
        torch.compiler.reset()
        part = bench(case, names, args)
        print(table(part), flush=True)
        results += part
        if args.json:  # at once: a later case that dies loses nothing
            payload = {"environment": environment(args.device), "sweep": args.sweep, "rows": results}
            write_json(args.json, payload)


if __name__ == "__main__":
    main()
