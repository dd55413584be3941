"""The pictures of docs/performance.md, drawn from results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from laws import LAWS, Data, Result, batch_name, law_checks, model_name

from gfast.report.style import LIGHT, MARKERS, log_axis, settings

OPS = {"logits": "unlearn_loss", "linear": "linear_unlearn_loss", "kl": "token_kl"}
NAMES = {  # providers, where a reader knows them by another name
    "gfast_inplace": "gfast, in place",
    "open_unlearning": "open-unlearning",
    "upcast": "eager, upcast",
    "compile": "torch.compile",
    "torch_chunked": "torch, chunked",
    "torch_chunked_rows": "torch, chunked, large",
    "liger": "Liger",
    "liger_cute": "Liger, CuTe",
    "quack": "quack",
    "cce": "CCE",
    "cce_exact": "CCE, unfiltered",
    "cce_torch": "CCE, torch.compile",
    "trl": "TRL",
}
GREY = "#7a8190"
SWEEPS = ("losses_sweep_vocab", "geffect_sweep_length")
UNITS = ("floor", "plain pass", "plain forward", "training step", "pass without dW")
OURS = ("gfast", "g_effect", "pg_effect", "gram_effect", "token_effect")


def draw(results: list[Result], folder: Path) -> list[Path]:
    """Every picture that there is a result for; but for the laws, of the device last measured for it, a GPU first."""
    plt.switch_backend("Agg")  # no window, no screen needed
    if not results:
        return []
    newest_last = sorted(
        results, key=lambda result: (not result.device.startswith("cpu-"), result.data["environment"]["date"])
    )
    by_device: dict[str, dict[str, Data]] = {}
    for result in reversed(newest_last):
        by_device.setdefault(result.device, {})[result.name] = result.data

    def of_newest(figure_of: Callable[[dict[str, Data]], Any]) -> Any:
        for device, here in by_device.items():
            figure = figure_of(here)
            if figure is not None:
                figure.suptitle(device, x=0.01, ha="left", fontsize=9, color=GREY)
                return figure
        return None

    drawn = []
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(settings(LIGHT)):
        figures = {
            "laws": law_dots(results),
            "losses": of_newest(lambda here: loss_bars(losses_of(here))),
            "geffect": of_newest(lambda here: effect_bars(here.get("geffect"))),
            "geffect_peers": of_newest(lambda here: effect_bars(here.get("geffect_peers"))),
            "sweeps": of_newest(lambda here: sweep_lines([here[name] for name in SWEEPS if name in here])),
        }
        for name, figure in figures.items():
            path = folder / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            figure.savefig(path, dpi=110, metadata={"Software": None})
            plt.close(figure)
            drawn.append(path)
    return drawn


def losses_of(here: dict[str, Data]) -> list[Data]:
    return [data for name, data in sorted(here.items()) if name.startswith("losses") and not data.get("sweep")]


def grid(rows: int, columns: int, width: float, height: float):
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def law_dots(results: list[Result]):
    """A line a law, a dot a case: how much of what is allowed it takes."""
    known = {law: by_device for law, by_device in law_checks(results).items() if by_device}
    if not known:
        return None
    names = [LAWS[law].what.replace("`", "") for law in known]
    figure, ((ax,),) = grid(1, 1, 9.5, 0.25 * len(known) + 1.0)
    devices = list(dict.fromkeys(result.device for result in results))
    for index, device in enumerate(devices):
        dots = [
            (check.share, place + 0.6 * ((index + 0.5) / len(devices) - 0.5))
            for place, by_device in enumerate(known.values())
            for check in by_device.get(device, [])
        ]
        if dots:
            look = {"marker": MARKERS[index], "color": LIGHT.cycle[index], "alpha": 0.75, "s": 18, "linewidths": 0}
            ax.scatter(*zip(*dots, strict=True), label=device, zorder=2, **look)
    ax.axvline(1.0, color=LIGHT.ink, linewidth=1.0)
    ax.set_yticks(range(len(known)), names, fontsize=8)
    ax.invert_yaxis()
    ax.grid(axis="x")
    ax.set_xlim(left=0)
    ax.set_xlabel("share of what the law allows; left of the line it is met")
    ax.legend(loc="lower right")
    return figure


def marked(name: str, row: Data) -> str:
    """A provider's name; marked where its numbers are not the same, and where it sees the Linear layers only."""
    off = f" {row['off_by']:.0%} off" if "off_by" in row and "unequal" in row else ""
    return NAMES.get(name, name) + " ≠" * ("unequal" in row) + off + " *" * (row.get("parameters") == "linear")


def bars(ax: Any, names: list[str], rows: list[Data], field: str, unit: str) -> None:
    """Horizontal bars, the first on top, each with its number; none for what was not measured."""
    values = [row.get(field) for row in rows]
    colors = [GREY if name in UNITS else LIGHT.cycle[1] if name.startswith(OURS) else LIGHT.cycle[0] for name in names]
    ax.barh(range(len(names)), [value or 0.0 for value in values], color=colors, height=0.7)
    ax.set_yticks(range(len(names)), [marked(name, row) for name, row in zip(names, rows, strict=True)])
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0, 1.16 * max(value or 0.0 for value in values))
    for place, value in enumerate(values):
        if value is not None:
            text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            ax.text(value, place, f" {text}", va="center", ha="left", fontsize=7.5)


def loss_bars(data: list[Data]):
    """Time in floors of everybody, a panel an op: the training case with the most providers."""
    panels = []
    for op in OPS:
        cases: dict[tuple, dict[str, Data]] = {}
        for row in (row for result in data for row in result["rows"] if "times_floor" in row):
            if (row["op"], row.get("mode", "train"), row.get("batch", "full")) == (op, "train", "full"):
                if row["provider"] not in ("fresh_copy", "wga"):
                    key = row["objective"], row["dtype"], tuple(row["shape"])
                    cases.setdefault(key, {})[row["provider"]] = row
        if cases:
            panels.append((op, *max(cases.items(), key=lambda case: (case[0][0] == "wga", len(case[1])))))
    most = max((len(rows) for _, _, rows in panels), default=0)
    # of both ops, and not gfast and its floor alone: nobody to compare with
    if len(panels) < 2 or min(len(rows) for _, _, rows in panels) < 3:
        return None
    figure, axes = grid(1, len(panels), 5.0 * len(panels), 0.27 * most + 1.5)
    for ax, (op, (objective, dtype, shape), rows) in zip(axes[0], panels, strict=True):
        names = sorted(rows, key=lambda name: rows[name]["times_floor"])
        unit = f"time in floors (1 = {rows['floor']['median_ms']:.3g} ms)" if "floor" in rows else "time in floors"
        bars(ax, names, [rows[name] for name in names], "times_floor", unit)
        ax.set_title(f"{OPS[op]}, {objective.upper()}, {dtype}, {' x '.join(map(str, shape))}", loc="left")
    return figure


def effect_bars(data: Data | None):
    """Time and memory of every provider of one batch pair."""
    rows = [row for row in data["rows"] if "median_ms" in row] if data else []
    if not rows:
        return None
    memory = any(row.get("peak_extra_mb") for row in rows)
    figure, axes = grid(1, 1 + memory, 5.8 + 3.4 * memory, 0.27 * len(rows) + 1.6)
    names = [row["name"] for row in rows]
    bars(axes[0, 0], names, rows, "median_ms", "milliseconds")
    axes[0, 0].set_title(f"{model_name(data['settings'])}, {batch_name(data['settings'])}", loc="left")
    if memory:
        bars(axes[0, 1], names, rows, "peak_extra_mb", "peak extra MB")
        axes[0, 1].set_yticks([])
    return figure


def sweep_lines(sweeps: list[Data]):
    """A row a sweep: time, and memory where it was measured."""
    if not sweeps:
        return None
    figure, axes = grid(len(sweeps), 2, 9.5, 2.9 * len(sweeps) + 0.3)
    colors = [LIGHT.cycle[1], LIGHT.cycle[0], *LIGHT.cycle[2:]]
    for line, data in zip(axes, sweeps, strict=True):
        by, losses = data["sweep"], "settings" not in data
        rows = [row for row in data["rows"] if "median_ms" in row and row.get("op") in (None, "linear")]
        names = dict.fromkeys(row["provider" if losses else "name"] for row in rows)
        names = [name for name in names if name not in ("plain forward", "pass without dW")]
        names.sort(key=lambda name: not name.startswith(OURS))
        for ax, field, unit in zip(
            line, ("median_ms", "peak_extra_mb"), ("milliseconds", "peak extra MB"), strict=True
        ):
            for index, name in enumerate(names):
                points = [(row[by], row[field]) for row in rows if name in row.values() and row.get(field)]
                if points:
                    look = {"color": colors[index % len(colors)], "marker": MARKERS[index % len(MARKERS)]}
                    if name in UNITS:
                        look = {"color": GREY, "linestyle": "--" if name == "training step" else ":"}
                    ax.plot(*zip(*sorted(points), strict=True), label=NAMES.get(name, name), **look)
            ax.set_visible(bool(ax.lines))
            if ax.lines:
                ax.set_xscale("log", base=2)
                values = sorted({row[by] for row in rows})
                ax.set_xticks(values, [f"{v // 1024}k" if v >= 1024 else str(v) for v in values], minor=False)
                log_axis(ax, np.concatenate([drawn.get_ydata() for drawn in ax.lines]))
                ax.set_xlabel({"vocab": "vocabulary", "length": "tokens a sample"}.get(by, by))
                ax.set_ylabel(unit)
        first = rows[0]
        title = f"linear_unlearn_loss, {first['objective'].upper()}, {first['dtype']}" if losses else ""
        line[0].set_title(title or model_name(data["settings"]), loc="left")
        line[1].legend(*line[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
