# SPDX-License-Identifier: Apache-2.0
"""`gfast plan`: what a training and its measurements take on a machine, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from gfast.commands.parser import Parser

_EXAMPLES = """examples:
  gfast plan --model ./llama-8b --tokens 2048 --machine A100-40
  gfast plan --model config.json --tokens 4096 --gpus 8 --machine H100 --engine fsdp2 --steps 500
  gfast plan --measure machine.json           # this machine's own rates, and what they miss
  gfast plan --model config.json --tokens 1024 --machine machine.json
"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="gfast plan",
        description="Memory and time of a training, its reference and its measurements, and what fits.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", help="a folder, a config.json, or a name on the Hugging Face hub; no weights are read"
    )
    parser.add_argument(
        "--tokens", type=int, default=2048, help="tokens that a device takes at a time, of both sets (%(default)s)"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a text (%(default)s)")
    parser.add_argument("--gpus", type=int, default=1, help="devices (%(default)s)")
    parser.add_argument("--engine", choices=("fsdp2", "ddp"), help="how several share the model; fsdp2 unless said")
    parser.add_argument(
        "--machine", default="H100", help="H100, H200, A100, A100-40, 4090 (data sheets), or a file (%(default)s)"
    )
    parser.add_argument("--memory", type=float, help="GB of a device, in place of the machine's")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of the weights (%(default)s)"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps: how long the training takes")
    parser.add_argument("--samples", type=int, default=400, help="texts that the reference cache holds (%(default)s)")
    parser.add_argument("--measure", metavar="FILE", help="measure this machine, write its profile to FILE and end")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    options = parser.parse_args(argv)
    if options.measure:
        from gfast.planning.measure import measure

        profile = measure()
        Path(options.measure).write_text(json.dumps(profile, indent=1) + "\n", encoding="utf-8")
        print(f"{options.measure}: {profile['name']}; three training steps are off by {_errors(profile['errors'])}")
        return 0
    if options.model is None:
        raise ValueError("--model is needed: a folder, a config.json, or a name on the hub")
    for name in ("tokens", "length", "gpus", "samples", "steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    if options.memory is not None and not 0 < options.memory < math.inf:
        raise ValueError(f"--memory must be a number of GB above 0, not {options.memory}")
    plan = _plan(options)
    print(json.dumps(plan, indent=1) if options.json else _text(plan))
    return 0


def _plan(options: Any) -> dict[str, Any]:
    import dataclasses

    import torch

    from gfast.planning.plan import ENGINES, RECIPES, SHEETS, Machine, Planner, Work, read_config

    machine = SHEETS.get(options.machine)
    if machine is None:
        if not Path(options.machine).is_file():
            raise ValueError(
                f"--machine {options.machine}: neither a file nor one of {', '.join(SHEETS)}. "
                "gfast plan --measure FILE writes one of the machine that it runs on"
            )
        machine = Machine.load(options.machine)
    if options.memory:
        machine = dataclasses.replace(machine, memory=options.memory * 1e9)
    texts = math.ceil(options.tokens / options.length)
    length = math.ceil(options.tokens / texts)  # all of the tokens, where they make no whole number of texts
    work = Work(texts, length, getattr(torch, options.dtype))
    planner = Planner(read_config(options.model), work, machine, options.gpus, options.engine != "ddp")
    trainings = [planner.training(recipe, checkpoints) for recipe in RECIPES for checkpoints in (False, True)]
    cached = options.samples * min(options.length, options.tokens)
    others = [planner.reference(cached), *(planner.engine(name) for name in ENGINES)]

    def row(estimate: Any) -> dict[str, Any]:
        return {
            "name": estimate.name,
            "gb": {key: value / 1e9 for key, value in estimate.bytes.items()},
            "total_gb": estimate.total / 1e9,
            "fits": estimate.fits(machine.memory) if estimate.bytes else None,
            "seconds": estimate.seconds if estimate.bytes else None,
            "note": estimate.note,
        }

    fitting = next((estimate for estimate in trainings if estimate.fits(machine.memory)), None)
    second = planner.facts.parameters * work.dtype.itemsize / (options.gpus if planner.sharded else 1)
    return {
        "model": options.model,
        "parameters": planner.facts.parameters,
        "tokens": work.tokens,
        "gpus": options.gpus,
        "sharing": None if options.gpus == 1 else "fsdp2" if planner.sharded else "ddp",
        "machine": {"name": machine.name, "source": machine.source, "memory_gb": machine.memory / 1e9},
        "errors": list(machine.errors),
        "training": [row(estimate) for estimate in trainings],
        "others": [row(estimate) for estimate in others],
        "recipe": None if fitting is None else fitting.name,
        "step_seconds": None if fitting is None else fitting.seconds,
        "steps": options.steps,
        "second_model_gb": second / 1e9,
        "whole_model_gb": planner.facts.parameters * work.dtype.itemsize / 1e9,
        "logits_gb": work.tokens * planner.facts.vocab * work.dtype.itemsize / 1e9,
    }


def _text(plan: dict[str, Any]) -> str:
    machine = plan["machine"]
    each = f" on each of {plan['gpus']} ({plan['sharing']})" if plan["gpus"] > 1 else ""
    lines = [
        f"{plan['model']}: {_count(plan['parameters'])} parameters, {plan['tokens']} tokens at a time{each}",
        f"{machine['name']}, {machine['memory_gb']:.0f} GB; rates: {machine['source']}",
        "times are " + (f"off by {_errors(plan['errors'])} at the sizes measured" if plan["errors"] else
                        "the least that these rates allow; measure your machine with --measure for its own"),
        "",
        f"{'':44}{'GB':>8}  fits   seconds",
    ]  # fmt: skip
    for title, rows in (("a training step", plan["training"]), ("beside it", plan["others"])):
        lines.append(title)
        for row in rows:
            if row["fits"] is None:
                lines.append(f"  {row['name']:<42}{row['note']}")
                continue
            says = "yes" if row["fits"] else "no"
            lines.append(
                f"  {row['name']:<42}{_gb(row['total_gb']):>8}  {says:<5}{row['seconds']:9.3g}  {row['note']}".rstrip()
            )
    lines.append("")
    if plan["recipe"] is None:
        lines.append("No way to train fits. Fewer --tokens, more --gpus, or a smaller model.")
    else:
        lines.append(
            f"It fits with: {plan['recipe']}; the original's values from a reference cache (a second model would take "
            f"{_gb(plan['second_model_gb'])} GB more), the fused head (logits and their gradient, "
            f"{_gb(2 * plan['logits_gb'])} GB, are never whole)."
        )
        if plan["sharing"] == "fsdp2":
            lines.append(_before_sharding(plan["whole_model_gb"]))
        if plan["steps"]:
            lines.append(f"{plan['steps']} steps of it take {_duration(plan['steps'] * plan['step_seconds'])}.")
    return "\n".join(lines)


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e8 else f"{parameters / 1e6:.3g} million"


def _gb(size: float) -> str:
    """A small model's memory is no 0.0."""
    return f"{size:.1f}" if size >= 0.95 else f"{size:.2g}"


def _before_sharding(whole: float) -> str:
    return (
        f"No device ever has the whole model: gfast unlearn loads it in host memory, {_gb(whole)} GB of a machine with "
        f"fsdp_cpu_ram_efficient_loading and of each process without, and computes the reference cache once it is "
        f"sharded. The figures are of weights in their dtype; mixed precision (--bf16) trains fp32 copies of them."
    )


def _errors(errors: Any) -> str:
    return ", ".join(f"{100 * error:+.0f}%" for error in errors)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
