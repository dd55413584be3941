"""Draws the benchmarks' pictures from bench/results/DEVICE/*.json into docs/benchmarks/DEVICE/.

    python bench/plots.py
    python bench/plots.py --root COPY      # results and docs of another folder

Bars: what one call takes beside everybody else's, in floors or passes, and its memory. Lines: how time and memory grow
with the rows, the vocabulary, the batch, the length and the depth.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _laws import batch_name, model_name
from _tables import MODES, OPS, by_case
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from render import PICTURES, ROOT, devices_of, results

from gfast.report.style import LIGHT, MARKERS, log_axis, settings

Data = dict[str, Any]
FLOOR_GREY = "#7a8190"
LOSS_LINES = ["gfast", "gfast_inplace", "open_unlearning", "eager", "compile", "torch_chunked", "trl", "liger", "cce"]
LOSS_NAMES = {
    "gfast_inplace": "gfast, in place",
    "gfast_logp": "gfast, log-probs",
    "open_unlearning": "open-unlearning",
    "upcast": "eager, upcast",
    "compile": "torch.compile",
    "compile_upcast": "torch.compile, upcast",
    "torch_chunked": "torch, chunked",
    "torch_chunked_rows": "torch, chunked, large",
    "liger": "Liger",
    "cce": "CCE",
    "cce_exact": "CCE, unfiltered",
    "cce_torch": "CCE, torch.compile",
    "trl": "TRL",
    "fresh_copy": "copy into new memory",
}
MEASURES = ("floor", "plain pass", "plain forward", "training step", "pass without dW")
GFAST_EFFECTS = ("g_effect", "pg_effect", "gram_effect", "token_effect")


def style(index: int) -> dict[str, Any]:
    """Colour and marker of a line; past eight the colours come again with other markers and dashes."""
    colors = [LIGHT.cycle[1], *LIGHT.cycle[:1], *LIGHT.cycle[2:]]
    return {
        "color": colors[index % len(colors)],
        "marker": MARKERS[(index + index // len(colors)) % len(MARKERS)],
        "linestyle": "--" if index >= len(colors) else "-",
    }


def count(value: float) -> str:
    """1536 as 1.5k: ticks of rows, tokens and vocabularies."""
    return f"{value / 1024:.3g}k" if value >= 1024 else f"{value:g}"


def logarithmic(ax: Axes, values: list[int], label: str, unit: str) -> None:
    """Both axes logarithmic, ticks at the measured values below."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, [count(value) for value in values])
    ax.xaxis.set_minor_locator(NullLocator())
    drawn = np.concatenate([line.get_ydata() for line in ax.lines] or [np.ones(1)])
    log_axis(ax, drawn)
    ax.set_xlabel(label)
    ax.set_ylabel(unit)


def lines(ax: Axes, series: dict[str, list[tuple[int, float]]], names: list[str]) -> None:
    """A line each, always in the look of its place in `names`; a panel without any is left out."""
    ax.set_visible(any(series.values()))
    for name in series:
        points = sorted(series[name])
        if not points:
            continue
        x, y = zip(*points, strict=True)
        if name in MEASURES:
            dashes = "--" if name == "training step" else ":"
            ax.plot(x, y, color=FLOOR_GREY, linestyle=dashes, label=name, zorder=1)
            continue
        wide = name.startswith(("gfast", *GFAST_EFFECTS))
        ax.plot(x, y, **style(names.index(name)), label=LOSS_NAMES.get(name, name), linewidth=2.2 if wide else 1.4)


def save(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path


def legend_below(figure: plt.Figure, grid: np.ndarray) -> None:
    """One legend for all panels, under them, as wide as they are."""
    found: dict[str, Any] = {}
    for ax in grid.flat:
        handles, labels = ax.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(2 * grid.shape[1], len(found)))


def loss_sweep(data: Data, path: Path) -> Path:
    """Time above, memory below; a column an op."""
    by, label = {"rows": ("rows", "rows N"), "vocab": ("vocab", "vocabulary V")}[data["sweep"]]
    rows = [row for row in data["rows"] if "median_ms" in row]
    ops = [op for op in OPS if any(row["op"] == op for row in rows)]
    fields = [("median_ms", "milliseconds")]
    if any(row.get("peak_extra_mb") for row in rows):
        fields.append(("peak_extra_mb", "peak extra MB"))
    figure, grid = plt.subplots(
        len(fields), len(ops), figsize=(4.2 * len(ops), 2.7 * len(fields) + 0.9), layout="constrained", squeeze=False
    )
    for column, op in enumerate(ops):
        some = [row for row in rows if row["op"] == op]
        first = some[0]
        some = [row for row in some if (row["objective"], row["dtype"]) == (first["objective"], first["dtype"])]
        fixed = {"rows": f"V = {first['vocab']}", "vocab": f"N = {first['rows']}"}[data["sweep"]]
        fixed += f", D = {first['width']}" if op == "linear" else ""
        for line, (field, unit) in enumerate(fields):
            ax = grid[line, column]
            series = {
                name: [(row[by], row[field]) for row in some if row["provider"] == name and row.get(field)]
                for name in ["floor"] * (field == "median_ms") + LOSS_LINES
            }
            lines(ax, series, LOSS_LINES)
            logarithmic(ax, sorted({row[by] for row in some}), label, unit)
            if line == 0:
                what = f"{OPS[op]}, {first['objective'].upper()}, {first['dtype']}"
                ax.set_title(f"{what}\n{MODES[first['mode']]}, {fixed}", loc="left")
    legend_below(figure, grid)
    return save(figure, path)


def color(name: str) -> str:
    """gfast, what is no competitor but a measure, and the others."""
    if name in MEASURES:
        return FLOOR_GREY
    return LIGHT.cycle[1] if name.startswith(("gfast", *GFAST_EFFECTS)) else LIGHT.cycle[0]


def bars(ax: Axes, names: list[str], values: list[float | None], colors: list[str], unit: str) -> None:
    """Horizontal bars, the first on top, each with its number; none for what was not measured."""
    places = list(range(len(names)))[::-1]
    ax.barh(places, [value or 0.0 for value in values], color=colors, height=0.7)
    ax.set_yticks(places, names)
    ax.set_xlabel(unit)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0, 1.16 * max(value or 0.0 for value in values))
    for place, value in zip(places, values, strict=True):
        if value is None:
            continue
        text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        ax.text(value, place, f" {text}", va="center", ha="left", fontsize=7.5)


def loss_bars(data: list[Data], path: Path) -> Path | None:
    """Time in floors of everybody, a panel an op: the training case with the most providers."""
    panels = []
    for op in OPS:
        mine = [
            (key, found)
            for one in data
            for key, found in by_case(row for row in one["rows"] if "times_floor" in row).items()
            if key[0] == op and key[2] == "train" and "gfast" in found
        ]
        if mine:
            panels.append(max(mine, key=lambda item: (item[0][1] == "wga", len(item[1]))))
    if not panels:
        return None
    most = max(len(found) for _, found in panels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 0.27 * most + 1.3), layout="constrained", squeeze=False
    )
    for ax, (key, found) in zip(axes[0], panels, strict=True):
        op, objective, mode, batch, dtype, head, shape = key
        names = [name for name in found if name != "fresh_copy"]
        names.sort(key=lambda name: found[name]["times_floor"])
        labels = [LOSS_NAMES.get(name, name) + (" ≠" if "unequal" in found[name] else "") for name in names]
        colors = [color(name) for name in names]
        milliseconds = found["floor"]["median_ms"] if "floor" in found else None
        unit = "time in floors" + (f" (1 = {milliseconds:.3g} ms)" if milliseconds else "")
        bars(ax, labels, [found[name]["times_floor"] for name in names], colors, unit)
        title = f"{OPS[op]}, {objective.upper()}, {dtype}\n{MODES[mode]}, {' x '.join(map(str, shape))}"
        ax.set_title(title, loc="left")
    return save(figure, path)


def effect_bars(data: Data, path: Path) -> Path:
    """Time and memory of every provider of one batch pair."""
    rows = [row for row in data["rows"] if "median_ms" in row]
    memory = any(row.get("peak_extra_mb") for row in rows)
    figure, axes = plt.subplots(
        1, 1 + memory, figsize=(5.2 + 3.2 * memory, 0.27 * len(rows) + 1.3), layout="constrained", squeeze=False
    )
    names = [
        row["name"] + (" ≠" if "unequal" in row else "") + (" *" if row.get("parameters") == "linear" else "")
        for row in rows
    ]
    colors = [color(row["name"]) for row in rows]
    bars(axes[0, 0], names, [row["median_ms"] / 1e3 for row in rows], colors, "seconds")
    used = data["settings"]
    shape = f"{model_name(used)}, {batch_name(used)}"
    axes[0, 0].set_title(f"Gradient effects of a batch pair\n{shape}", loc="left")
    if memory:
        bars(axes[0, 1], [""] * len(rows), [row.get("peak_extra_mb") for row in rows], colors, "peak extra MB")
    if any(name.endswith("*") for name in names):
        figure.supxlabel("* the Linear layers of the blocks only", fontsize=7.5, ha="right", x=0.99)
    return save(figure, path)


def effect_sweeps(data: list[Data], path: Path) -> Path:
    """A column a sweep: time above, memory below."""
    fields = [("median_ms", "milliseconds")]
    if any(row.get("peak_extra_mb") for one in data for row in one["rows"]):
        fields.append(("peak_extra_mb", "peak extra MB"))
    found = dict.fromkeys(row["name"] for one in data for row in one["rows"] if "median_ms" in row)
    names = [name for name in found if name not in ("plain forward", "pass without dW")]
    names.sort(key=lambda name: not name.startswith(GFAST_EFFECTS))
    figure, grid = plt.subplots(
        len(fields), len(data), figsize=(3.5 * len(data), 2.7 * len(fields) + 0.9), layout="constrained", squeeze=False
    )
    units = {"batch": "samples a batch", "length": "tokens a sample", "depth": "decoder blocks"}
    for column, one in enumerate(data):
        rows = [row for row in one["rows"] if "median_ms" in row]
        for line, (field, unit) in enumerate(fields):
            series = {
                name: [(row[one["sweep"]], row[field]) for row in rows if row["name"] == name and row.get(field)]
                for name in names
            }
            lines(grid[line, column], series, [name for name in names if name not in MEASURES])
            logarithmic(grid[line, column], sorted({row[one["sweep"]] for row in rows}), units[one["sweep"]], unit)
        chosen = one["settings"]
        fixed = {"batch": f"{chosen['batch']} samples", "length": f"{chosen['tokens']} tokens"}
        kept = [text for key, text in fixed.items() if key != one["sweep"]]
        grid[0, column].set_title(f"{model_name(chosen)}\n{', '.join(kept)}", loc="left")
    legend_below(figure, grid)
    return save(figure, path)


def draw(root: Path) -> list[Path]:
    """Every picture for which there is a result."""
    plt.switch_backend("Agg")  # no window, no screen needed
    found = results(root)
    drawn: list[Path | None] = []
    with plt.rc_context(settings(LIGHT)):
        for device in devices_of(found):
            folder, here = root / PICTURES / device, [one for one in found if one.device == device]
            plain_losses = [one.data for one in here if one.kind == "losses" and not one.data.get("sweep")]
            if plain_losses:
                drawn.append(loss_bars(plain_losses, folder / "losses.png"))
            sweeps = [one.data for one in here if one.kind == "geffect" and one.data.get("sweep")]
            if sweeps:
                drawn.append(effect_sweeps(sweeps, folder / "geffect_sweeps.png"))
            for one in here:
                if one.kind == "losses" and one.data.get("sweep"):
                    drawn.append(loss_sweep(one.data, folder / f"{one.name}.png"))
                if one.kind == "geffect" and not one.data.get("sweep"):
                    drawn.append(effect_bars(one.data, folder / f"{one.name}.png"))
    return [path for path in drawn if path is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds bench/results and docs")
    for path in draw(parser.parse_args().root):
        print(path)


if __name__ == "__main__":
    main()
