# SPDX-License-Identifier: Apache-2.0
"""Figures of single samples and tokens: which answers an objective still pushes on, and which words do the damage."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath

from gfast.report.runs import Run
from gfast.report.style import (
    Theme,
    linear_threshold,
    run_color,
    run_marker,
    steps_axis,
    symmetric_log,
    wrap,
    zero_line,
)
from gfast.sides import SIDES

WEIGHT_RANGES = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0), (1.0, math.inf))
MAX_POINTS = 600  # above it a scatter is a blot, and the density is drawn instead
MAX_ANSWERS = 6
MAX_HARMFUL = 8
LINE = 672.0  # width of a line of tokens, in points
SIZES = (7.0, 15.0)  # points, for the smallest and the largest weight


def objective_of(run: Run) -> Any:
    """The forget objective of a run, or None where its name is not one."""
    from gfast.objectives.registry import parse_objective

    try:
        return parse_objective(run.objective.split(" + ")[0])
    except ValueError:
        return None


def weighted_samples(run: Run) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(step, weights [S], unlearn effects [S], retain effects [S]) of a run, without samples that have no label or a
    value that is not finite; empty where the objective has no weight a sample or nothing was recorded.
    """
    objective, by_step = objective_of(run), []
    for step, effect in run.effects("sample") if objective is not None else ():
        try:
            weight = effect.weights(objective)
        except ValueError:
            return []
        values = [weight.numpy(), *(effect.total(side).numpy() for side in SIDES)]
        counted = (effect.tokens > 0).numpy() & np.isfinite(values).all(axis=0)
        if counted.any():
            by_step.append((step, *(each[counted] for each in values)))
    return by_step


def last_tokens(run: Run) -> tuple[int, Any] | None:
    """The last step at which the effects of tokens were measured and are finite, and they; None where there is none."""
    for step, effect in reversed(run.effects("token") if run.texts else []):
        parts = [effect.total("retain"), *filter(None, (effect.logp, effect.ref_logp))]
        if all(bool(each.isfinite().all()) for part in parts for each in part):
            return step, effect
    return None


def draw_samples(runs: list[Run], theme: Theme) -> Figure:
    """Mean weight over steps, and the joint distribution of both effects of a sample by the range of its weight."""
    data = [(run, by_step) for run in runs if (by_step := weighted_samples(run))]
    ranges = [r for r in WEIGHT_RANGES if any(_in(w, r).any() for _, by_step in data for _, w, _, _ in by_step)]
    columns = 1 + len(ranges)
    figure = Figure(figsize=(2.5 * columns + 0.8, 2.6 * len(data) + 0.5), layout="constrained")
    grid = figure.subplots(len(data), columns, squeeze=False)
    effects = np.concatenate([np.concatenate((u, r)) for _, by_step in data for _, _, u, r in by_step])
    for i, (row, (run, by_step)) in enumerate(zip(grid, data, strict=True)):
        steps = [step for step, *_ in by_step]
        low, mean, high = (
            [f(w) for _, w, _, _ in by_step]
            for f in (lambda w: np.quantile(w, 0.1), np.mean, lambda w: np.quantile(w, 0.9))
        )
        row[0].fill_between(steps, low, high, color=theme.faint, linewidth=0)
        row[0].plot(steps, mean, color=run_color(theme, i), marker=run_marker(i))
        row[0].set_ylim(0, max(1.05, 1.05 * max(high)))
        row[0].set_ylabel(f"{wrap(run.label)}\nweight of an answer")
        steps_axis(row[0])
        shades = LinearSegmentedColormap.from_list("steps", [theme.faint, run_color(theme, i)])
        for ax, limits in zip(row[1:], ranges, strict=True):
            _joint(ax, by_step, limits, effects, shades, theme)
    for ax, limits in zip(grid[0, 1:], ranges, strict=True):
        title = f"weight above {limits[0]:g}" if math.isinf(limits[1]) else f"weight {limits[0]:g} to {limits[1]:g}"
        ax.set_title(title, fontweight="bold")
    grid[0, 0].set_title("mean weight, 10–90 %", fontweight="bold")
    grid[-1, 0].set_xlabel("optimizer step")
    for ax in grid[-1, 1:]:
        ax.set_xlabel("unlearn effect of an answer")
    for ax in grid[:, 1]:
        ax.set_ylabel("retain effect")
    handles = [
        Line2D([], [], linestyle="", marker="o", color=theme.faint, label="first measured step"),
        Line2D([], [], linestyle="", marker="o", color=theme.ink, label="last"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def draw_answers(runs: list[Run], theme: Theme) -> Figure:
    """Both effects of every answer, and the answers whose unlearning harms the retain set most, by their questions.

    They are of GA, whatever the objective: a folder is shown once, at the last step at which they were measured.
    """
    shown = {run.folder: run for run in runs if run.effect_files("sample") and run.texts}.values()
    figure = Figure(figsize=(9.2, 3.1 * len(shown) + 0.2), layout="constrained")
    grid = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(1, 1))
    for (ax, bars), run in zip(grid, shown, strict=True):
        step, effect = run.effects("sample")[-1]
        unlearn, retain = (effect.total(side).numpy() for side in SIDES)
        there = np.flatnonzero((effect.tokens > 0).numpy() & np.isfinite(unlearn) & np.isfinite(retain))
        zero_line(ax, theme)
        ax.axvline(0, color=theme.ink, linewidth=0.9, zorder=1)
        for axis, values in ((ax.xaxis, unlearn[there]), (ax.yaxis, retain[there])):
            symmetric_log(axis, values, 2)
        ax.scatter(unlearn[there], retain[there], s=10, linewidths=0, color=theme.retain, alpha=0.8, zorder=3)
        ax.set_title(f"{wrap(run.name)}, step {step}: {len(there)} answers", fontweight="bold")
        ax.set_xlabel("unlearn effect of an answer")
        ax.set_ylabel("retain effect")
        worst = there[np.argsort(retain[there], kind="stable")][:MAX_HARMFUL]
        bars.barh(np.arange(len(worst)), retain[worst], color=theme.retain, height=0.6)
        bars.axvline(0, color=theme.ink, linewidth=0.9)
        bars.set_yticks(np.arange(len(worst)), [_ascii(textwrap.shorten(run.texts[s]["question"], 52)) for s in worst])
        bars.invert_yaxis()
        bars.yaxis.tick_right()
        bars.grid(False)
        bars.set_title("lowest retain effect", fontweight="bold")
        bars.set_xlabel("retain effect")
    return figure


def _in(weight: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """A weight of 1, that of an untouched model, belongs to the range that ends there, whatever its rounding."""
    weight = np.round(weight, 4)
    above = weight > 1.0 if limits[0] == 1.0 else weight >= limits[0]
    return above & ((weight < limits[1]) | (limits[1] == 1.0) & (weight == 1.0))


def _joint(
    ax: Axes, by_step: list, limits: tuple[float, float], effects: np.ndarray, shades: Any, theme: Theme
) -> None:
    points = [(k, u[_in(w, limits)], r[_in(w, limits)]) for k, (_, w, u, r) in enumerate(by_step)]
    x, y = (np.concatenate([point[side] for point in points]) for side in (1, 2))
    color = np.concatenate([np.full(len(u), k) for k, u, _ in points]) / max(len(by_step) - 1, 1)
    zero_line(ax, theme)
    ax.axvline(0, color=theme.ink, linewidth=0.9, zorder=1)
    for axis in (ax.xaxis, ax.yaxis):
        symmetric_log(axis, effects, 2)
    if len(x) > MAX_POINTS:
        ax.hexbin(x, y, gridsize=24, mincnt=1, bins="log", cmap=shades, xscale="linear", yscale="linear")
    else:
        ax.scatter(x, y, c=color, cmap=shades, vmin=-0.25, vmax=1, s=9, linewidths=0, zorder=3)
    where = dict(transform=ax.transAxes, ha="right", va="top", fontsize=8, color=theme.ink)
    ax.text(0.97, 0.97, f"{len(x)} answers", **where)


def draw_tokens(runs: list[Run], theme: Theme) -> Figure:
    """Answers with each token coloured by its effect on the retain set and sized by the weight the objective gives it.

    Each run shows the last step at which tokens were measured, and their effects are finite.
    """
    shown = [(run, last, run.texts) for run in runs if (last := last_tokens(run))]
    every = np.concatenate([np.concatenate([t.numpy() for t in e.total("retain")]) for _, (_, e), _ in shown])
    top = np.abs(every).max(initial=1e-12)
    norm = SymLogNorm(linthresh=min(linear_threshold(every), top), vmin=-top, vmax=top)
    # Light boxes with dark ink on light and on dark pages: no colour of the theme, which would be exchanged.
    colors = LinearSegmentedColormap.from_list("harm", ["#d45d01", "#f3b98a", "#f5f5f2", "#8fb3e0", "#0171b1"])
    blocks = [_block(run, step, effect, texts) for run, (step, effect), texts in shown]
    lines = sum(1 + sum(2 + len(answer) for _, answer in block[1]) for block in blocks)
    figure = Figure(figsize=(LINE / 72 / 0.97, 0.27 * lines + 0.9))
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0.015, 0.0, 0.97, 1.0 - 0.75 / figure.get_figheight()))
    ax.set_axis_off()
    ax.set_xlim(0, LINE)
    ax.set_ylim(lines + 0.4, -0.4)
    at = 0.0
    for title, answers in blocks:
        ax.text(0, at, title, fontsize=10, fontweight="bold", va="center")
        at += 1.0
        for question, answer in answers:
            at += 0.4
            ax.text(0, at, question, fontsize=8.5, style="italic", va="center", color=theme.ink)
            at += 1.0
            for line in answer:
                for x, width, text, size, value in line:
                    back = colors(norm(value))
                    dark = 0.299 * back[0] + 0.587 * back[1] + 0.114 * back[2] < 0.5
                    ax.fill_between([x, x + width], at - 0.46, at + 0.46, color=back, linewidth=0)
                    ink = "#fefefe" if dark else "#11151d"
                    ax.text(x + width / 2, at, text, fontsize=size, va="center", ha="center", color=ink)
                at += 1.0
            at += 0.6
    bar = figure.add_axes((0.33, 1.0 - 0.32 / figure.get_figheight(), 0.34, 0.13 / figure.get_figheight()))
    scale = np.linspace(0, 1, 256)[None]
    bar.imshow(colors(scale), aspect="auto", extent=(0, 1, 0, 1))
    bar.set_yticks([])
    end = f"{top:,.0f}" if top >= 100 else f"{top:.2g}"
    bar.set_xticks([0, 0.5, 1], [f"−{end}", "0", end])
    bar.grid(False)
    place = dict(transform=bar.transAxes, va="center", fontsize=8.5)
    bar.text(-0.02, 0.5, "unlearning it raises the retain NLL", ha="right", **place)
    bar.text(1.02, 0.5, "… lowers it (symmetric-log)", ha="left", **place)
    return figure


def _block(run: Run, step: int, effect: Any, texts: list[dict[str, Any]]) -> tuple[str, list[tuple[str, list]]]:
    """A heading, and of each answer its question and its lines of (x, width, text, font size, retain effect)."""
    objective = objective_of(run)
    weights, sized = [np.ones(len(each)) for each in effect.logp], "token"
    if objective is not None:
        try:
            weights, sized = [each.numpy() for each in effect.weights(objective)], "weight"
        except ValueError:
            pass
    retain = [each.numpy() for each in effect.total("retain")]
    top = max((float(np.abs(each).max()) for each in weights if len(each)), default=1.0) or 1.0
    answers = []
    for weight, values, text in list(zip(weights, retain, texts, strict=False))[:MAX_ANSWERS]:
        if len(values):
            answers.append((_ascii(text["question"]), _lines(text["pieces"], np.abs(weight) / top, values)))
    return f"{run.label}, step {step}: size is the {sized}, the largest {top:.2g}", answers


def _lines(pieces: list[str], shares: np.ndarray, values: np.ndarray) -> list[list[tuple]]:
    lines: list[list[tuple]] = [[]]
    x = 0.0
    for piece, share, value in zip(pieces, shares, values, strict=True):
        size = SIZES[0] + (SIZES[1] - SIZES[0]) * float(share)
        # A token that only begins a character has no text of its own.
        text = _ascii(piece).strip() or ("␣" if piece else "…")
        width = TextPath((0, 0), text, size=size).get_extents().width + 5.0
        if x + width > LINE and lines[-1]:
            lines.append([])
            x = 0.0
        lines[-1].append((x, width, text, size, float(value)))
        x += width + 1.5
    return lines


def _ascii(text: str) -> str:
    """Line breaks and other control characters would break the layout: they are shown as symbols."""
    return "".join("⏎" if c == "\n" else c if c.isprintable() else "·" for c in text)
