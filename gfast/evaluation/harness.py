# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-eval (the Language Model Evaluation Harness), asked of a model that is loaded already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gfast.files import read_json, write_json
from gfast.metrics.values import required
from gfast.words import did_you_mean

FILE = "lm_eval.json"


def require_tasks(tasks: Sequence[str]) -> None:
    """ImportError, saying what to install, without lm-eval; ValueError for a task that it does not have."""
    required("lm_eval", "lm-eval", "--lm_eval")
    known = required("lm_eval.tasks", "lm-eval", "--lm_eval").TaskManager().all_tasks
    for task in tasks:
        if task not in known:
            raise ValueError(
                f"gfast: lm-eval has no task {task!r}{did_you_mean(task, known)} (`lm_eval ls tasks` lists them)"
            )


def evaluated(model: nn.Module, tokenizer: Any, tasks: Sequence[Any], batch_size: int, folder: Path) -> str:
    """The tasks' numbers as Markdown, and in `folder`/lm_eval.json; those that are there already are not measured
    again.
    """
    path = folder / FILE
    record = read_json(path, "delete it, and the tasks are run again") if path.exists() else {}
    if record.get("tasks") != list(tasks):
        harness = required("lm_eval", "lm-eval", "--lm_eval")
        wrap = required("lm_eval.models.huggingface", "lm-eval", "--lm_eval").HFLM
        training = model.training
        wrapped = wrap(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size)
        results = harness.simple_evaluate(model=wrapped, tasks=list(tasks), log_samples=False)
        model.train(training)
        version = getattr(harness, "__version__", None)
        record = {"tasks": list(tasks), "results": results["results"], "version": version}
        write_json(path, record)
    lines = ["| Task | Metric | Value |", "|---|---|---:|"]
    for task, values in record["results"].items():
        for metric, value in values.items():
            # a metric's name ends with its filter's, "acc,none"; counts of samples stand beside it
            if isinstance(value, (int, float)) and "," in metric and "stderr" not in metric:
                lines.append(f"| {task} | {metric.removesuffix(',none')} | {value:.4f} |")
    return "\n".join(lines) + "\n"
