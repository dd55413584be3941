# SPDX-License-Identifier: Apache-2.0
"""The page of an evaluation: its table, the truth ratios that forget quality compares, and what the model says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from gfast.files import write_whole
from gfast.metrics import EvaluationLog, probability, truth_ratio
from gfast.report.figures import Drawing
from gfast.report.html import flatten, rendered
from gfast.report.style import Theme, run_color

# Samples of each set whose generations are on the page.
SHOWN = 8


def write_page(
    folder: str | os.PathLike[str],
    log: EvaluationLog,
    retain_log: EvaluationLog | None,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[Mapping[str, str]],
    lines: Sequence[str],
    settings: Mapping[str, Any],
) -> Path:
    """Write evaluation.html to `folder`; it holds everything that it shows, and needs no network."""
    logs = [log] if retain_log is None else [log, retain_log]
    figures = [{"drawing": drawing, **drawing.render(logs).uris()} for drawing in drawings(log, retain_log)]
    page = rendered(
        "evaluation.html.j2",
        title=f"Evaluation of {log.run}",
        columns=columns,
        rows=rows,
        lines=lines,
        figures=figures,
        samples={name: list(log_set.text)[:SHOWN] for name, log_set in log.sets.items() if log_set.text},
        settings=flatten(dict(settings)),
    )
    return write_whole(Path(folder) / "evaluation.html", page)


def drawings(log: EvaluationLog, retain_log: EvaluationLog | None) -> list[Drawing]:
    """The figures that these logs have data for."""
    drawn = [
        Drawing(
            "probability",
            "How likely the right answers are",
            "Share of a set's samples whose answer is at most as likely (probability per token, geometric mean): a set "
            "that is known rises at the right, one that is forgotten at the left.",
            _probabilities,
        )
    ]
    if "forget" in log.sets and "average_perturb_loss" in log.sets["forget"].values:
        against = " of both models: forget quality is the p-value of the largest vertical gap" if retain_log else ""
        drawn.append(
            Drawing(
                "truth-ratio",
                "Truth ratios of the forget set",
                f"Share of the forget set's samples with at most this truth ratio R{against}. Left of 1 the model "
                "prefers the right answer to the wrong ones.",
                _ratios,
            )
        )
    return drawn


def _probabilities(logs: list[EvaluationLog], theme: Theme) -> Figure:
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    ax = figure.subplots()
    for at, (name, values) in enumerate(probability(logs[0], per_sample=True).items()):
        _steps(ax, values, run_color(theme, at), name)
    ax.set_xlim(0, 1)
    return _finished(figure, ax, "probability of the answer, per token")


def _ratios(logs: list[EvaluationLog], theme: Theme) -> Figure:
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    ax = figure.subplots()
    for at, log in enumerate(logs):
        forget_alone = EvaluationLog(log.run, {"forget": log.sets["forget"]})
        _steps(
            ax,
            truth_ratio(forget_alone, per_sample=True)["forget"],
            run_color(theme, at),
            log.run if at == 0 else "retain log",
        )
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else range(1, 10)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.axvline(1, color=theme.ink, linewidth=0.9, zorder=1)
    return _finished(figure, ax, "truth ratio R, geometric mean")


def _steps(ax: Any, values: np.ndarray, color: str, label: str) -> None:
    """From 0 on: a single sample, or samples of one value, are a line too."""
    ordered = np.sort(values)
    shares = np.arange(len(ordered) + 1) / len(ordered)
    ax.step(np.append(ordered[:1], ordered), shares, where="post", color=color, label=label)


def _finished(figure: Figure, ax: Any, label: str) -> Figure:
    ax.set_ylim(0, 1.02)
    ax.set_xlabel(label)
    ax.set_ylabel("share of samples")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure
