"""Runs one of the benchmarks; README.md says more of each.

python bench/run.py losses --heads llama-3.2-1b --rows 1024 --dtypes bf16 --json losses_large.json
python bench/run.py geffect --model tiny
python bench/run.py losses --profile --objectives wga     # where the time goes: traces for Perfetto
python bench/run.py NAME --help
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import cases
import geffect
import losses
import torch
from harness import line
from machine import Row, environment, write_json


def listed(known: object, separator: str = ",") -> Callable[[str], list[str]]:
    """An argparse type: names of ``known``; "all" is every one but the tests' "tiny"."""

    def parse(text: str) -> list[str]:
        names = [name for name in known if name != "tiny"] if text == "all" else text.split(separator)
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; choose from {separator.join(known)}")
        return names

    return parse


def integers(text: str) -> list[int]:
    return [int(value) for value in text.split(",")]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = top.add_subparsers(
        dest="benchmark",
        required=True,
        metavar="losses|soft_targets|geffect|grad_dot|host|overhead|live|evaluate|tiles|counters",
    )

    def benchmark(name: str, main: Callable, repetitions: int = 0) -> argparse.ArgumentParser:
        command = benchmarks.add_parser(name)
        command.set_defaults(main=main, fail=command.error)
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        command.add_argument("--threads", type=int)
        command.add_argument("--json", help="file name under bench/results/DEVICE, or a path; written after every case")
        if repetitions:
            command.add_argument(
                "--repetitions", type=int, default=repetitions, help="rounds, as far as the budget goes"
            )
        return command

    def measured(command: argparse.ArgumentParser, providers: object, separator: str, sweeps: object, budget: float):
        command.add_argument("--providers", type=listed(providers, separator), help="default: all")
        command.add_argument("--sweep", choices=sweeps)
        command.add_argument("--values", type=integers, help="the sweep's values")
        command.add_argument("--budget", type=float, default=budget, help="seconds a provider and case")
        command.add_argument("--no-memory", action="store_true")
        command.add_argument(
            "--profile", action="store_true", help="a trace with named ranges, of gfast or --providers"
        )
        command.add_argument("--traces", type=Path, default=Path("runs") / "traces", help="folder of the traces")

    command = benchmark("losses", run_losses, repetitions=15)
    command.add_argument("--ops", type=listed(("logits", "linear", "kl")), default="logits,linear")
    command.add_argument("--heads", type=listed(cases.HEADS), default="small", help=", ".join(cases.HEADS) + " or all")
    command.add_argument("--rows", type=integers, help="default: 1024 from logits and 512 for linear; 4096 on a GPU")
    command.add_argument("--objectives", type=listed(cases.OBJECTIVES), default="wga,tnpo,npo,nll")
    command.add_argument("--dtypes", type=listed(cases.DTYPES), default="bf16,fp32")
    command.add_argument("--modes", type=listed(cases.MODES), default="train", help=", ".join(cases.MODES))
    command.add_argument("--batches", type=listed(cases.BATCHES), default="full", help=", ".join(cases.BATCHES))
    command.add_argument("--peer-budget", type=float, help="the budget of who is neither gfast nor a floor")
    measured(command, losses.PROVIDERS, ",", losses.SWEEPS, 20.0)

    command = benchmark("soft_targets", run_soft_targets, repetitions=15)
    command.add_argument("--ops", type=listed(("logits", "linear")), default="logits,linear")
    command.add_argument("--heads", type=listed(cases.HEADS), default="small", help=", ".join(cases.HEADS) + " or all")
    command.add_argument("--rows", type=int, help="default: 1024 from logits and 512 for linear; 4096 on a GPU")
    command.add_argument("--dtypes", type=listed(cases.DTYPES), default="bf16,fp32")
    command.add_argument("--no-memory", action="store_true")

    command = benchmark("geffect", run_geffect, repetitions=9)
    command.add_argument("--model", choices=cases.MODELS, default="smollm2-135m")
    command.add_argument("--layers", type=int, help="cut the model to this depth")
    command.add_argument("--dtype", choices=geffect.TOLERANCE, default="fp32")
    command.add_argument("--batch", type=int, default=8, help="samples a batch")
    command.add_argument("--tokens", type=int, default=72, help="tokens a sample")
    measured(command, geffect.PROVIDERS, ";", geffect.SWEEPS, 40.0)

    command = benchmark("grad_dot", run_grad_dot, repetitions=15)
    command.add_argument("--model", choices=cases.MODELS, help="default: llama-2-7b on a GPU, else smollm2-135m")
    command.add_argument("--pairs", default="bf16:bf16,bf16:fp32,fp32:fp32", help="dtypes of gradient:direction")
    command.add_argument("--directions", type=integers, default="1,2")

    benchmark("host", run_host, repetitions=40)

    command = benchmark("overhead", run_overhead)
    command.add_argument("--models", type=listed(cases.MODELS), default="tiny,smollm2-135m")
    command.add_argument("--dtype", choices=geffect.TOLERANCE, default="fp32")
    command.add_argument("--batch", type=int, default=4, help="samples a batch")
    command.add_argument("--tokens", type=int, default=72, help="tokens a sample")
    command.add_argument("--steps", type=int, default=10, help="optimizer steps a run, a multiple of 10")
    command.add_argument("--rounds", type=int, default=2, help="runs of each kind")

    command = benchmark("live", run_live, repetitions=15)
    command.add_argument("--model", choices=cases.MODELS, default="smollm2-135m")
    command.add_argument("--layers", type=int, help="cut the model to this depth")
    command.add_argument("--dtype", choices=geffect.TOLERANCE, default="fp32")
    command.add_argument("--objective", choices=("ga", "wga", "tnpo"), default="wga")
    command.add_argument("--batch", type=int, default=4, help="samples a batch")
    command.add_argument("--tokens", type=int, default=72, help="tokens a sample")
    command.add_argument("--budget", type=float, default=60.0, help="seconds a way")
    command.add_argument("--no-memory", action="store_true")

    command = benchmark("evaluate", run_evaluate)
    command.add_argument("--model", required=True, help="folder of a model with its tokenizer, such as SmolLM2-135M's")
    command.add_argument("--data", required=True, help="folder of TOFU's files")
    command.add_argument("--open-unlearning", help="a checkout of open-unlearning, whose evaluator is measured too")
    command.add_argument("--config", default="forget05_perturbed")
    command.add_argument("--rows", type=int, default=0, help="the first so many; default: all")
    command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--no-memory", action="store_true")

    for name, main in (("tiles", run_tiles), ("counters", run_counters)):
        command = benchmark(name, main)
        command.add_argument("--head", choices=cases.HEADS, default="llama-3.1-8b")
        command.add_argument("--rows", type=int, default=8192)
        command.add_argument(
            "--model", choices=cases.MODELS, default="llama-2-7b", help="whose tensors grad_dot is given"
        )
    command.add_argument("--one", help="call this op between the profiler's start and stop, and do nothing else")
    return top


def write(args: argparse.Namespace, **payload: object) -> None:
    """At once, after every case: a later one that dies loses nothing."""
    if args.json:
        write_json(args.json, {"environment": environment(args.device), **payload})


def run_losses(args: argparse.Namespace) -> None:
    try:
        work = losses.combinations(args)
    except ValueError as problem:
        args.fail(str(problem))
    rows: list[Row] = []
    for case in work:
        if "torch._dynamo" in sys.modules:  # else there is nothing to forget, and importing it takes seconds
            torch.compiler.reset()
        name = f"{case.op} {case.objective} {case.mode}, {case.head} {' x '.join(map(str, case.shape))} {case.dtype}"
        print(f"\n{name}, {case.batch} batch, {case.device}", flush=True)
        if args.profile:
            for provider in args.providers or ["gfast"]:
                rows += profile_loss(args, case, provider)
            write(args, runs=rows)
            continue
        part = losses.bench(case, args.providers or list(losses.PROVIDERS), args)
        print("\n".join(line(row["provider"], row) for row in part), flush=True)
        rows += part
        write(args, sweep=args.sweep, rows=rows)


def run_soft_targets(args: argparse.Namespace) -> None:
    import soft_targets

    rows: list[Row] = []
    for op, head, dtype in itertools.product(args.ops, args.heads, args.dtypes):
        print(f"\n{op}, {head}, {dtype}, {args.device}", flush=True)
        part = soft_targets.bench(args, op, head, dtype)
        print("\n".join(line(row["provider"], row) for row in part), flush=True)
        rows += part
        write(args, rows=rows)


def profile_loss(args: argparse.Namespace, case: cases.Case, name: str) -> list[Row]:
    from traces import profiled

    provider = losses.PROVIDERS[name]
    step = None if (why := provider.why_not(case.device)) else provider.make(case, cases.make_inputs(case))
    if step is None:
        print(f"{name}: {why or 'does not apply'}")
        return []
    trace = f"losses_{case.op}_{case.objective}_{case.mode}_{case.head}_{case.dtype}_{name}"
    profile = profiled(step, losses.RANGES, args, trace)
    return [{**asdict(case), "shape": case.shape, "provider": name, **profile}]


def run_geffect(args: argparse.Namespace) -> None:
    if args.batch < geffect.CHECK_ROWS and args.sweep != "batch":
        args.fail(f"--batch must be at least {geffect.CHECK_ROWS}: that many rows are checked")
    settings = {key: getattr(args, key) for key in ("dtype", "batch", "tokens", "layers", "device")}
    settings = {"shape": args.model, **settings}
    if args.profile:
        return profile_effects(args, settings)
    names = args.providers or (geffect.SWEPT if args.sweep else list(geffect.PROVIDERS))
    key = {"batch": "batch", "length": "tokens", "depth": "layers"}.get(args.sweep)
    rows: list[Row] = []
    for value in (args.values or geffect.SWEEPS[args.sweep]) if args.sweep else [None]:
        at = settings if value is None else settings | {key: value}
        print(f"\n{at['shape']}, {at['dtype']}, {at['batch']} x {at['tokens']} tokens, {at['device']}", flush=True)
        part = geffect.bench(at, names, args)
        print("\n".join(line(row["name"], row) for row in part), flush=True)
        rows += part if value is None else [{args.sweep: value, **row} for row in part]
        record = settings | {"parameters": geffect.parameters(settings)}
        write(args, settings=record, sweep=args.sweep, rows=rows)


def profile_effects(args: argparse.Namespace, settings: Row) -> None:
    from traces import profiled

    model, forget, retain = geffect.setup(settings)
    rows: list[Row] = []
    for name in args.providers or ["g_effect(WGA)"]:
        provider = geffect.PROVIDERS[name]
        if (why := provider.why_not(model, forget)) is not None:
            print(f"{name}: {why}")
            continue
        words = "".join(letter if letter.isalnum() else "_" for letter in name).strip("_")
        step = partial(provider.run, model, forget, retain)
        profile = profiled(step, geffect.RANGES, args, f"geffect_{words}_{args.model}")
        rows.append({**settings, "provider": name, **profile})
        write(args, runs=rows)


def run_grad_dot(args: argparse.Namespace) -> None:
    import grad_dot

    model = args.model or ("llama-2-7b" if args.device == "cuda" else "smollm2-135m")
    print(f"{model}, {args.device}")
    rows: list[Row] = []
    for pair in args.pairs.split(","):
        for count in args.directions:
            part = grad_dot.bench(model, pair, count, args)
            print("\n".join(line(f"{pair} x{count} {row['provider']}", row) for row in part), flush=True)
            rows += part
            write(args, model=model, rows=rows)


def run_host(args: argparse.Namespace) -> None:
    import host

    rows = host.bench(args)
    for row in rows:
        print(f"  {row['provider']:<36}{row.get('skipped') or str(row['us_a_call']) + ' us'}")
    write(args, rows=rows)


def run_overhead(args: argparse.Namespace) -> None:
    import overhead

    if args.steps % 10 or args.steps < 10:
        args.fail("--steps must be a multiple of 10, so that measurements at every 1, 5 and 10 steps come out even")
    settings = {key: getattr(args, key) for key in ("dtype", "batch", "tokens", "steps", "rounds")}
    rows: list[Row] = []
    for model in args.models:
        print(f"\n{model}, {args.dtype}, batches of {args.batch} x {args.tokens} tokens, {args.device}")
        part = overhead.bench(args, model)
        every = {None: "never", 1: "every step"}
        print("\n".join(line(every.get(row["every"], f"every {row['every']} steps"), row) for row in part), flush=True)
        rows += part
        write(args, settings=settings, rows=rows)


def run_live(args: argparse.Namespace) -> None:
    import live

    settings = {key: getattr(args, key) for key in ("dtype", "objective", "batch", "tokens", "layers", "device")}
    settings = {"shape": args.model, **settings}
    print(f"\n{args.model}, {args.dtype}, {args.batch} x {args.tokens} tokens, {args.device}", flush=True)
    rows = live.bench(settings, args)
    print("\n".join(line(row["name"], row) for row in rows), flush=True)
    write(args, settings=settings, rows=rows)


def run_evaluate(args: argparse.Namespace) -> None:
    import evaluate

    settings = {key: getattr(args, key) for key in ("config", "dtype", "rounds")}
    settings |= {"model": Path(args.model).name, "batch": evaluate.BATCH, "their_batch": evaluate.THEIR_BATCH}
    rows = evaluate.bench(args)
    print("\n".join(line(row["provider"], row) for row in rows), flush=True)
    write(args, settings=settings, rows=rows)


def run_tiles(args: argparse.Namespace) -> None:
    import tiles

    rows: list[Row] = []
    for row in tiles.bench(args):
        print(line(row["name"], row), flush=True)
        rows.append(row)
        write(args, head=args.head, rows=rows)


def run_counters(args: argparse.Namespace) -> None:
    import counters

    if args.one:
        return counters.profiled(args.one, args)
    rows: list[Row] = []
    for row in counters.bench(args):
        print(line(row["op"], row), flush=True)
        rows.append(row)
        write(args, head=args.head, model=args.model, rows=rows)
    if not any("kernels" in row for row in rows):
        print(rows[-1]["failed"])
        sys.exit(77)  # bench/on_gpu.py: it cannot run here


def main() -> None:
    args = parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.main(args)


if __name__ == "__main__":
    main()
