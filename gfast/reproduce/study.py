# SPDX-License-Identifier: Apache-2.0
"""A study from its recipe to its page."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from gfast.commands.common import say, show_log
from gfast.files import require_writable
from gfast.locks import claimed
from gfast.reproduce.plan import RUNS, Plan
from gfast.reproduce.recipe import load_recipe
from gfast.reproduce.steps import Step, Steps


def study(name: str, changes: Sequence[str], out: Path | None, redo: Sequence[str], only_plan: bool) -> int:
    """Run what is to be run of a recipe, and write its page."""
    recipe = load_recipe(name, changes)
    out = require_writable(out or Path(f"gfast-{Path(name).stem}"), model=True)
    show_log()
    transformers.utils.logging.disable_progress_bar()
    with claimed(out):
        plan = Plan(recipe, out)
        steps = Steps(plan.steps, plan.checksum, redo)
        if only_plan:
            for step in steps.steps:
                kind, why = steps.state(step)
                print(f"{kind:<8}{step.name}: {step.what}" + (f" ({why})" if why else ""))
                if step.command:
                    print(f"        {step.command}")
            return 0
        program = shlex.split(recipe.launch)[0] if recipe.launch else None
        if program is not None and shutil.which(program) is None:
            raise ValueError(f"launch: there is no program {program} here (is its environment active?)")
        started = time.perf_counter()
        try:
            steps.run(_said(steps, plan))
            _drop(plan, steps, len(steps.steps))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Stopped. What is finished stays in {out}; the same command goes on from there."
            ) from None
        from gfast.reproduce.page import write_page  # draws: seconds of import that only the end needs

        page = write_page(plan, steps)
    say(f"Finished in {(time.perf_counter() - started) / 60:.1f} min")
    print(f"Open {page.resolve()}")
    return 0


def _said(steps: Steps, plan: Plan) -> Any:
    """What is said of each step as its turn comes; weights of runs that nothing needs any more go."""

    def said(step: Step, kind: str, number: int) -> None:
        if kind != "done":
            say(f"[{number + 1}/{len(steps.steps)}] {step.name}: {step.what}")
        _drop(plan, steps, number)

    return said


def _drop(plan: Plan, steps: Steps, number: int) -> None:
    """The weights of runs among the first steps, where the recipe does not keep them."""
    for step in steps.steps[:number] if not plan.recipe.keep_models else ():
        if step.name.startswith(RUNS):
            steps.drop(step.name)
