# SPDX-License-Identifier: Apache-2.0
"""The figures of a report, drawn for print (PNG) and for light and dark pages (SVG).

Every axis that is compared between objectives is shared between their panels, so that a small curve is a small effect.
Values are spread over many orders of magnitude: shared axes are symmetric-log, linear around zero.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from gfast.report.effects import draw_answers, draw_samples, draw_tokens, last_tokens, weighted_samples
from gfast.report.matched import match
from gfast.report.runs import TEXTS, Run
from gfast.report.style import (
    DARK,
    LIGHT,
    Theme,
    linear_threshold,
    log_axis,
    power,
    recolor,
    run_color,
    run_line,
    run_marker,
    settings,
    signed_axis,
    steps_axis,
    wrap,
    zero_line,
)
from gfast.report.tables import summarize
from gfast.sides import SIDES

MAX_PANEL_GROUPS = 8
PANELS_PER_BAND = 5
DPI = 160


class Pictures(NamedTuple):
    """One figure as PNG for print, and as SVG for light and for dark pages."""

    png: bytes
    light: bytes
    dark: bytes

    def uris(self) -> dict[str, str]:
        """ "light" and "dark", as a page holds them within itself."""
        svgs = {"light": self.light, "dark": self.dark}
        return {name: "data:image/svg+xml;base64," + base64.b64encode(svg).decode() for name, svg in svgs.items()}


@dataclass(frozen=True)
class Drawing:
    """A figure by name, its title and caption for the page, and how to draw it."""

    name: str
    title: str
    caption: str
    draw: Callable[[list[Run], Theme], Figure]

    def render(self, runs: list[Run]) -> Pictures:
        """The pictures of these runs; the same records give the same bytes."""
        with matplotlib.rc_context(settings(LIGHT)):
            figure = self.draw(runs, LIGHT)
            # Laying out is the slow part: once is enough for both formats. The figure of tokens places them itself.
            if figure.get_layout_engine() is not None:
                figure.get_layout_engine().execute(figure)
                figure.set_layout_engine("none")
            png, svg = io.BytesIO(), io.BytesIO()
            # Without a date and a tool version the same records give the same file.
            figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
            figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        return Pictures(png.getvalue(), svg.getvalue(), recolor(svg.getvalue(), LIGHT, DARK))


def drawings(runs: list[Run]) -> list[Drawing]:
    """The figures that these runs have data for, in the order of the page."""
    groups = all_groups(runs)
    once, few = all(run.once for run in runs), len(groups) <= MAX_PANEL_GROUPS

    def there(run: Run, *key: str) -> int:
        return len(_finite(*run.series(*key))[0])

    drawn = {
        "geffect-once": _draw_once if groups and once else None,
        "geffect": _draw_totals if groups and not once else None,
        "geffect-groups": None if not groups or once and few else _draw_groups if few else _draw_heat,
        "training": _draw_training if any(there(run, name) for run in runs for name in _TRAINING) else None,
        "nll": _draw_nll if any(there(run, "risk", side) > 1 for run in runs for side in SIDES) else None,
        "pareto": draw_pareto if any(len(summarize(run)["course"]) > 1 for run in runs) else None,
        "samples": draw_samples if any(weighted_samples(run) for run in runs) else None,
        "answers": draw_answers if any(run.effect_files("sample") and run.texts for run in runs) else None,
        "tokens": draw_tokens if any(map(last_tokens, runs)) else None,
    }
    return [Drawing(name, **TEXTS["figures"][name], draw=draw) for name, draw in drawn.items() if draw is not None]


def all_groups(runs: list[Run]) -> list[str]:
    """Groups of all runs in the order of the first run that has each."""
    return list(dict.fromkeys(group for run in runs for group in run.groups))


def _finite(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = np.isfinite(values)
    return steps[keep], values[keep]


def _values(runs: Iterable[Run], keys: Collection[tuple[str, str, str]]) -> np.ndarray:
    """Of the lines and of their bands."""
    parts = []
    for run in runs:
        for key in keys:
            steps, low, high = run.band(*key)
            parts += [_finite(*run.series(*key))[1], _finite(steps, low)[1], _finite(steps, high)[1]]
    return np.concatenate(parts) if parts else np.zeros(0)


def _sides(ax: Axes, run: Run, theme: Theme, quantity: str, group: str) -> None:
    for side, color, marker in (("unlearn", theme.unlearn, "o"), ("retain", theme.retain, "s")):
        steps, values = _finite(*run.series(quantity, side, group))
        ax.plot(steps, values, color=color, marker=marker, clip_on=True, zorder=3)
        _band(ax, run, color, quantity, side, group)


def _band(ax: Axes, run: Run, color: str, quantity: str, side: str, group: str = "") -> None:
    """From the lowest seed to the highest, where there are several: a deviation would reach below 0 on a log axis."""
    steps, low, high = run.band(quantity, side, group)
    if len(steps):
        ax.fill_between(steps, low, high, color=color, alpha=0.22, linewidth=0, zorder=2)


def _side_legend(figure: Figure, theme: Theme) -> None:
    handles = [
        Line2D([], [], color=theme.unlearn, marker="o", label="unlearn: effect on the forget set (wanted below 0)"),
        Line2D([], [], color=theme.retain, marker="s", label="retain: effect on the retain set (wanted at or above 0)"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2 if figure.get_figwidth() > 8 else 1)


def _draw_totals(runs: list[Run], theme: Theme) -> Figure:
    columns = min(len(runs), PANELS_PER_BAND)
    bands = math.ceil(len(runs) / PANELS_PER_BAND)
    keys = {name: [(name, side, "total") for side in SIDES] for name in ("g_effect", "cosine")}
    cosines = np.abs(_values(runs, keys["cosine"]))
    shown = ["g_effect", "cosine"] if cosines.size else ["g_effect"]
    figure = Figure(figsize=(max(2.35 * columns + 0.6, 6.4), 2.45 * bands * len(shown) + 0.35), layout="constrained")
    grid = figure.subplots(bands * len(shown), columns, squeeze=False, sharex=True, sharey="row")
    for i, run in enumerate(runs):
        band, column = divmod(i, columns)
        panels = grid[band * len(shown) : (band + 1) * len(shown), column]
        for ax, quantity in zip(panels, shown, strict=True):
            zero_line(ax, theme)
            _sides(ax, run, theme, quantity, "total")
            if not _values([run], keys[quantity]).size:
                where = dict(transform=ax.transAxes, ha="center", fontsize="small")
                ax.text(0.5, 0.72, "norm not measured", color=theme.ink, **where)
            steps_axis(ax)
            ax.tick_params(labelbottom=ax is panels[-1])
        panels[0].set_title(wrap(run.label), fontweight="bold")
        panels[-1].set_xlabel("optimizer step")
    signed_axis(grid[:: len(shown)].flat, _values(runs, keys["g_effect"]), theme)
    limit = 1.05 if cosines.max(initial=1.0) > 0.5 else max(1.15 * cosines.max(), 1e-6)
    for ax in grid[1 :: len(shown)].flat if cosines.size else ():
        ax.set_ylim(-limit, limit)
    for row, ax in enumerate(grid[:, 0]):
        ax.set_ylabel(("G-effect\n⟨∇NLL, ∇objective⟩", "cosine\n(∇NLL, ∇objective)")[row % len(shown)])
    for ax in grid.flat:
        ax.set_visible(bool(ax.lines))  # the last band may have places to spare
    _side_legend(figure, theme)
    return figure


def _draw_once(runs: list[Run], theme: Theme) -> Figure:
    """Objectives of models as they stand: a line an objective, a panel for the total and for every layer group."""
    groups = all_groups(runs)
    runs = [run for run in runs if run.groups]
    panels = ["total", *(groups if len(groups) <= MAX_PANEL_GROUPS else ())]
    cosine = [("cosine", side, "total") for side in SIDES]
    count = len(panels) + bool(_values(runs, cosine).size)
    figure = Figure(figsize=(max(2.1 * count + 1.6, 6.4), 0.5 * len(runs) + 1.5), layout="constrained")
    row = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for ax, group in zip(row, [*panels, "cosine of the total"][:count], strict=True):
        quantity, of = ("g_effect", group) if group in panels else ("cosine", "total")
        ax.axvline(0, color=theme.ink, linewidth=0.9, zorder=1)
        for side, color, marker, shift in (("unlearn", theme.unlearn, "o", -0.14), ("retain", theme.retain, "s", 0.14)):
            for i, run in enumerate(runs):
                for value in _finite(*run.series(quantity, side, of))[1]:
                    ax.plot([0, value], [i + shift] * 2, color=color, linewidth=2.2, solid_capstyle="butt", zorder=2)
                    ax.plot([value], [i + shift], color=color, marker=marker, markersize=5, zorder=3)
        ax.set_title(group, fontweight="bold")
        ax.grid(True, axis="x")
        ax.grid(False, axis="y")
    row[0].set_yticks(range(len(runs)), [wrap(run.label) for run in runs])
    row[0].set_ylim(len(runs) - 0.5, -0.5)
    keys = [("g_effect", side, group) for side in SIDES for group in panels]
    signed_axis(row[: len(panels)], _values(runs, keys), theme, "x")
    for ax in row[len(panels) :]:
        ax.set_xlim(-1.05, 1.05)
    figure.supxlabel("G-effect ⟨∇NLL, ∇objective⟩", fontsize=9)
    _side_legend(figure, theme)
    return figure


def _draw_groups(runs: list[Run], theme: Theme) -> Figure:
    groups = all_groups(runs)
    figure = Figure(figsize=(2.1 * len(groups) + 1.5, 1.55 * len(runs) + 0.9), layout="constrained")
    grid = figure.subplots(len(runs), len(groups), squeeze=False, sharex=True, sharey=True)
    for row, run in zip(grid, runs, strict=True):
        for ax, group in zip(row, groups, strict=True):
            zero_line(ax, theme)
            _sides(ax, run, theme, "g_effect", group)
            steps_axis(ax)
            ax.tick_params(labelbottom=ax in grid[-1])
        row[-1].annotate(
            wrap(run.label),
            (1.04, 0.5),
            xycoords="axes fraction",
            va="center",
            ha="left",
            fontsize=9.5,
            fontweight="bold",
        )
    for ax, group in zip(grid[0], groups, strict=True):
        ax.set_title(group, fontweight="bold")
    for ax in grid[-1]:
        ax.set_xlabel("optimizer step")
    keys = [("g_effect", side, group) for side in SIDES for group in groups]
    signed_axis(grid.flat, _values(runs, keys), theme)
    figure.supylabel("G-effect ⟨∇NLL, ∇objective⟩", fontsize=9)
    _side_legend(figure, theme)
    return figure


def _draw_heat(runs: list[Run], theme: Theme) -> Figure:
    """Many groups (one a layer): a map of group by step, one pair an objective."""
    from matplotlib.colors import LinearSegmentedColormap, SymLogNorm

    groups = all_groups(runs)
    height = max(1.9, 0.11 * len(groups) + 0.5)
    figure = Figure(figsize=(8.4, height * len(runs) + 0.8), layout="constrained")
    grid = figure.subplots(len(runs), 2, squeeze=False)
    values = _values(runs, [("g_effect", side, group) for side in SIDES for group in groups])
    top = np.abs(values).max(initial=1e-12)
    norm = SymLogNorm(linthresh=linear_threshold(values), vmin=-top, vmax=top)
    colors = LinearSegmentedColormap.from_list("gold-navy", ["#a86f00", "#f2c14e", "#ffffff", "#7f9fe0", "#1d3a7a"])
    mesh = None
    for row, run in zip(grid, runs, strict=True):
        for ax, side in zip(row, SIDES, strict=True):
            steps = run.series("g_effect", side, "total")[0]
            cells = np.full((len(groups), len(steps)), np.nan)
            for i, group in enumerate(groups):
                at, effects = run.series("g_effect", side, group)
                cells[i, np.searchsorted(steps, at)] = effects
            mesh = ax.pcolormesh(np.arange(len(steps) + 1), np.arange(len(groups) + 1), cells, norm=norm, cmap=colors)
            shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 6)).astype(int))
            ax.set_xticks(shown + 0.5, [str(steps[i]) for i in shown])
            named = np.unique(np.linspace(0, len(groups) - 1, min(len(groups), 12)).astype(int))
            ax.set_yticks(named + 0.5, [groups[i] for i in named])
            ax.grid(False)
            ax.set_title(f"{wrap(run.label)}\n{side}", fontweight="bold", loc="left")
    for ax in grid[-1]:
        ax.set_xlabel("optimizer step")
    bar = figure.colorbar(mesh, ax=list(grid.flat), fraction=0.04, pad=0.02)
    exponent = math.floor(math.log10(top))
    bar.set_ticks([-(10.0**exponent), 0, 10.0**exponent], labels=[power(-(10.0**exponent)), "0", power(10.0**exponent)])
    bar.set_label("G-effect (below zero:\na step raises this set's NLL)")
    return figure


_TRAINING = {
    "loss": "loss (the objective's own value)",
    "mean_weight": "mean weight",
    "mean_inverse_confidence": "mean inverse confidence 1/p",
}


def _objective_lines(ax: Axes, runs: list[Run], theme: Theme, quantity: str, side: str = "") -> None:
    for i, run in enumerate(runs):
        steps, values = _finite(*run.series(quantity, side))
        ax.plot(steps, values, run_line(i), color=run_color(theme, i), marker=run_marker(i))
        _band(ax, run, run_color(theme, i), quantity, side)
    steps_axis(ax)
    ax.set_xlabel("optimizer step")


def _objective_legend(figure: Figure, runs: list[Run], theme: Theme, has: Callable[[Run], bool]) -> None:
    """Of the runs that the figure has something of."""
    handles = [
        Line2D([], [], linestyle=run_line(i), color=run_color(theme, i), marker=run_marker(i), label=run.label)
        for i, run in enumerate(runs)
        if has(run)
    ]
    inches = 0.085 * max(len(str(handle.get_label())) for handle in handles) + 0.65  # of an entry
    columns = max(1, min(len(handles), int(figure.get_figwidth() / inches)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)


def _draw_training(runs: list[Run], theme: Theme) -> Figure:
    present = [name for name in _TRAINING if any(len(_finite(*run.series(name))[0]) for run in runs)]
    figure = Figure(figsize=(max(3.6 * len(present), 6.4), 3.5), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(present), squeeze=False)[0], present, strict=True):
        _objective_lines(ax, runs, theme, name)
        values = _values(runs, [(name, "", "")])
        if name == "mean_inverse_confidence" and values.min() > 0:
            log_axis(ax, values)
        elif name == "loss":
            zero_line(ax, theme)
            signed_axis([ax], values, theme)
        else:
            ax.set_ylim(bottom=min(0.0, values.min() * 1.05))
        ax.set_title(_TRAINING[name], fontweight="bold")
    _objective_legend(
        figure, runs, theme, lambda run: bool(_values([run], [(quantity, "", "") for quantity in present]).size)
    )
    return figure


def _draw_nll(runs: list[Run], theme: Theme) -> Figure:
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    forget, retain = figure.subplots(1, 2)
    values = _values(runs, [("risk", side, "") for side in SIDES])
    logarithmic = values.min() > 0 and values.max() > 20 * values.min()
    for ax, side, title in (
        (forget, "unlearn", "forget set: wanted up"),
        (retain, "retain", "retain set: wanted flat"),
    ):
        _objective_lines(ax, runs, theme, "risk", side)
        ax.set_title(title, fontweight="bold")
        if logarithmic:
            log_axis(ax, values)
    forget.set_ylabel("NLL (nats per answer token)")
    _objective_legend(
        figure, runs, theme, lambda run: bool(_values([run], [("risk", each, "") for each in SIDES]).size)
    )
    return figure


def draw_pareto(runs: list[Run], theme: Theme, level: float | None = None) -> Figure:
    """Retain NLL against forget NLL along each run, and where all have forgotten as much (or `level`)."""
    summaries = [summarize(run) for run in runs]
    match(summaries, level)
    figure = Figure(figsize=(7.6, 5.2), layout="constrained")
    ax = figure.subplots()
    seen: list[float] = []
    for i, (run, summary) in enumerate(zip(runs, summaries, strict=True)):
        color = run_color(theme, i)
        for course, width, alpha in (
            *((summarize(seed_run)["course"], 0.8, 0.45) for seed_run in run.seeds),
            (summary["course"], 1.9, 1.0),
        ):
            if len(course) < 2:
                continue
            _, forget, retain = np.array(course).T
            ax.plot(forget, retain, run_line(i), color=color, linewidth=width, alpha=alpha, zorder=2 + width)
            seen += [*forget, *retain]
        if summary["course"]:
            ax.plot(*summary["course"][-1][1:], color=color, marker=run_marker(i), markersize=7, zorder=5)
        if summary["matched"]:
            level = summary["matched"]["forget_nll"]
            ax.plot(level, summary["matched"]["retain_nll"], color=color, marker="D", markersize=5, zorder=6)
    if level is not None:
        ax.axvline(level, color=theme.ink, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        ax.annotate(f"equal forgetting\n({level:.3g})", (level, 0.985), xycoords=("data", "axes fraction"), va="top",
                    ha="right", xytext=(-5, 0), textcoords="offset points", fontsize="small")  # fmt: skip
    values = np.array(seen)
    ax.set_xlabel("forget NLL (right: forgotten)")
    ax.set_ylabel("retain NLL (up: damage)")
    if values.min() > 0 and values.max() > 20 * values.min():
        log_axis(ax, values)
        ax.set_xscale("log")
        ax.set_xlim(ax.get_ylim())
        ax.xaxis.set_major_locator(FixedLocator(ax.yaxis.get_majorticklocs()))
        ax.xaxis.set_major_formatter(ax.yaxis.get_major_formatter())
        ax.xaxis.set_minor_locator(NullLocator())
    drawn = {run.label for run, summary in zip(runs, summaries, strict=True) if summary["course"]}
    _objective_legend(figure, runs, theme, lambda run: run.label in drawn)
    return figure
