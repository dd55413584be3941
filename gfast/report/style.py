# SPDX-License-Identifier: Apache-2.0
"""The look of the figures: colours for light and dark pages, fonts, and the axes that panels share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator


@dataclass(frozen=True)
class Theme:
    """Colours of one rendering. Gold and navy, and the Okabe-Ito order, stay apart for colour-blind readers."""

    name: str
    paper: str
    ink: str
    faint: str
    unlearn: str
    retain: str
    cycle: tuple[str, ...]


LIGHT = Theme(
    "light", "#ffffff", "#1c2330", "#d9dde4", "#d39b00", "#1d3a7a",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#4d4d4d", "#7a3e9d"),
)  # fmt: skip
DARK = Theme(
    "dark", "#161a22", "#e4e8ef", "#39414f", "#f2c14e", "#8fb3ff",
    ("#56b4e9", "#f0803c", "#2fc79a", "#e59ac6", "#e0c341", "#9fd3ff", "#b9bec7", "#c39be0"),
)  # fmt: skip
MARKERS = "osD^vPX*"


def settings(theme: Theme) -> dict[str, Any]:
    """Matplotlib's settings for a rendering; mathtext is off, so that a dollar sign in a name is a dollar sign."""
    return {
        "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9,
        "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 9, "axes.linewidth": 0.8,
        "figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "savefig.facecolor": theme.paper,
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.titlecolor": theme.ink,
        "axes.edgecolor": theme.faint, "xtick.color": theme.ink, "ytick.color": theme.ink,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
        "grid.color": theme.faint, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
        "text.parse_math": False, "svg.hashsalt": "gfast", "lines.linewidth": 1.7, "lines.markersize": 3.6,
        "xtick.major.size": 3, "ytick.major.size": 0, "axes.unicode_minus": True,
    }  # fmt: skip


def recolor(svg: bytes, old: Theme, new: Theme) -> bytes:
    """An SVG drawn in one theme in the colours of another; colours that belong to no theme stay as they are."""
    colors = dict(zip(_colors(old), _colors(new), strict=True))
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: colors.get(match[0], match[0]), svg.decode()).encode()


def _colors(theme: Theme) -> tuple[str, ...]:
    return (theme.paper, theme.ink, theme.faint, theme.unlearn, theme.retain, *theme.cycle)


def linear_threshold(values: np.ndarray) -> float:
    """Half width of the linear part of a symmetric-log axis: a power of ten, at most five decades under the largest."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if not sizes.size:
        return 1.0
    low = math.floor(math.log10(np.quantile(sizes, 0.1, method="lower")))
    high = math.ceil(math.log10(sizes.max()))
    return 10.0 ** max(low, high - 5)


def power(value: float, _position: int | None = None) -> str:
    if value == 0:
        return "0"
    exponent = round(math.log10(abs(value)))
    sign = "−" if value < 0 else ""
    if -2 <= exponent <= 2:
        return f"{sign}{10.0**exponent:g}"
    return f"{sign}10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def symmetric_log(axis: Axis, values: np.ndarray, strides: int) -> float:
    """A symmetric-log axis for these values, ticks at powers of ten; returns the half width of its linear part."""
    threshold = linear_threshold(values)
    low, high = values.min(initial=0.0), values.max(initial=0.0)
    highest, lowest = math.floor(math.log10(max(-low, high, threshold) * 1.8)), round(math.log10(threshold))
    last = lowest if highest - lowest > 1 else lowest - 1  # labels close to zero would cover its own
    powers = [10.0**k for k in range(highest, last, -max(1, math.ceil((highest - lowest) / strides)))]
    ax, name = axis.axes, axis.axis_name
    getattr(ax, f"set_{name}scale")("symlog", linthresh=threshold, linscale=0.5)
    ax.set(**{f"{name}lim": (low * 1.8 if low < 0 else -threshold, high * 1.8 if high > 0 else threshold)})
    _ticks(axis, [-p for p in powers] + [0.0] + powers, power)
    return threshold


def _ticks(axis: Axis, places: list[float], text: Callable[..., str]) -> None:
    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(text))


def signed_axis(axes: Iterable[Axes], values: np.ndarray, theme: Theme, name: str = "y") -> None:
    """One axis (`name`: y or x) around zero for all of `axes`: linear where the values allow it, else symmetric-log,
    shaded inside.
    """
    low, high = values.min(initial=0.0), values.max(initial=0.0)
    margin = 0.06 * (high - low) or 1.0
    linear = max(-low, high) <= 20 * linear_threshold(values)
    for ax in axes:
        if linear:
            ax.set(**{f"{name}lim": (low - margin, high + margin)})
        else:
            axis, shade = (ax.yaxis, ax.axhspan) if name == "y" else (ax.xaxis, ax.axvspan)
            threshold = symmetric_log(axis, values, 3 if name == "y" else 2)
            shade(-threshold, threshold, color=theme.faint, alpha=0.35, linewidth=0, zorder=0)


def log_axis(ax: Axes, values: np.ndarray) -> None:
    """A logarithmic axis with ticks at powers of ten, or at 1, 2, 5 where it spans little."""
    ax.set_yscale("log")
    low, high = values.min(), values.max()
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 2:
        _ticks(ax.yaxis, [10.0**k for k in range(first, last + 1, math.ceil((last - first) / 5))], power)
    else:
        ticks = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
        _ticks(ax.yaxis, ticks, lambda value, _: f"{value:g}")
    ax.set_ylim(low / 1.25, high * 1.25)


def zero_line(ax: Axes, theme: Theme) -> None:
    ax.axhline(0, color=theme.ink, linewidth=0.9, zorder=1)


def steps_axis(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=2))


def wrap(label: str, width: int = 22) -> str:
    """A label broken into lines that fit over a small panel, at the plus signs of a mixture or after commas.

    >>> print(wrap("NPO(beta=0.1) + 2 KL"))
    NPO(beta=0.1) + 2 KL
    >>> print(wrap("WTNPO(alpha=1.0, beta=1.0) + KL"))
    WTNPO(alpha=1.0,
    beta=1.0) + KL
    """
    lines = [""]
    for part in label.replace(", ", ",\0").replace(" + ", "\0+ ").replace(" · ", "\0· ").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) >= width:
            lines.append(part)
        else:
            lines[-1] = f"{lines[-1]} {part}".strip()
    return "\n".join(lines)


def run_color(theme: Theme, i: int) -> str:
    return theme.cycle[i % len(theme.cycle)]


def run_marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def run_line(i: int) -> str:
    """Dashed where colours and markers come for the second time."""
    return ("-", "--", ":")[i // len(MARKERS) % 3]
