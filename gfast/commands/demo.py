# SPDX-License-Identifier: Apache-2.0
"""`gfast demo`: what it is asked. What it does is `gfast/demo.py`, which is also an example of the library."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from gfast.commands.parser import Parser
from gfast.demo_plan import QUICK, Plan
from gfast.files import read_json, require_writable, write_json
from gfast.locks import RUN_LOCK, claimed


def begin(out: Path, plan: Plan) -> None:
    """Take an empty folder, or one with a demo of the same plan; ValueError for a folder that holds anything else."""
    marker, wanted = out / "demo.json", asdict(plan)
    if marker.exists():
        there = read_json(marker)
        differ = [f"{k} is {there.get(k)} there and {v} here" for k, v in wanted.items() if there.get(k) != v]
        if differ:
            raise ValueError(f"{out} holds a demo with other settings: {', '.join(differ)}. Give another --out")
    elif any(path.name != RUN_LOCK for path in out.iterdir()):
        raise ValueError(f"{out} holds something else than a demo. Give another --out, or an empty folder")
    else:
        write_json(marker, wanted)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="gfast demo", description="Learn, unlearn and measure; ends with report.html.")
    parser.add_argument("--out", type=Path, default=Path("gfast-demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Plan.seed, help="seed of everything (default: %(default)s)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of a run (default: {Plan.steps})")
    parser.add_argument("--learning_rate", type=float, help=f"of every run (default: {Plan.learning_rate:g})")
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer questions and steps: a smoke test")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    options = parser.parse_args(argv)
    given = {
        name: value for name in ("seed", "steps", "learning_rate") if (value := getattr(options, name)) is not None
    }
    plan = Plan(**(QUICK if options.quick else {}) | given)
    if plan.steps < 1 or not plan.learning_rate > 0:
        parser.error("--steps and --learning_rate must be positive")
    require_writable(options.out, model=True)
    with claimed(options.out):
        begin(options.out, plan)
        from gfast.demo import run  # transformers' trainer: seconds of import, which an error above does without

        return run(plan, options.out, options.cpu)
