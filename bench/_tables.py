"""Markdown tables of benchmark results: short ones for the README, whole ones for docs/benchmarks.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from _laws import batch_name, figure, model_name

Data = dict[str, Any]
LEFT_OUT = ("g_effect(WGA), ", "g_effect(GA), ", "plain forward", "pass without dW")  # other engines, and units
MOST_ROWS = 9  # of a README table of losses, a table a device
LOSS_FLOORS = {"logits": "a copy of the logits", "linear": "the bare matrix products"}
OPS = {"logits": "unlearn_loss", "linear": "linear_unlearn_loss"}
MODES = {
    "train": "forward + backward",
    "forward": "forward alone",
    "frozen": "forward + backward, frozen head",
    "nograd": "without gradient",
}
SHORT_LOSS_PEERS = {  # column of the README: provider
    "open-unlearning": "open_unlearning",
    "eager": "eager",
    "torch.compile": "compile",
    "torch chunked": "torch_chunked",
    "TRL": "trl",
    "Liger": "liger",
    "CCE": "cce",
}


def number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:.3g}{unit}" if abs(value) < 100 else f"{value:,.0f}{unit}"


def times(row: Data | None, base: Data) -> str:
    """How many times the base's time another takes; marked where its numbers are not the same."""
    if row is None or "median_ms" not in row:
        return ""
    return f"{row['median_ms'] / base['median_ms']:.2f}x" + (" ≠" if "unequal" in row else "")


def off_by(row: Data) -> str:
    """How far from the exact value, of who is known to approximate it."""
    return f"off by {row['off_by']:.1%}" if "off_by" in row else ""


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Columns without a single value are left out; the first `left` are text."""
    kept = [i for i in range(len(header)) if i < left or any(row[i] for row in rows)]
    header, rows = [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] * left + ["---:"] * (len(header) - left)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def law(row: Data, name: str = "") -> str:
    if "law" not in row:
        return ""
    return f"{figure(name, row['law'])}: {'met' if row['law_met'] else '**missed**'}"


def loss_laws(row: Data) -> str:
    """Of its time, and of its memory where that is judged."""
    memory = f"{law(row['of_memory'])} (memory)" if "of_memory" in row else ""
    return "; ".join(filter(None, [law(row), memory]))


def note(row: Data) -> str:
    """Why a row has no time, or what its numbers lack."""
    for key in ("wrong", "failed", "skipped"):
        if key in row:
            return f"{key}: {row[key]}".replace("|", "/")
    parts = []
    if "unequal" in row:
        parts.append(f"unequal: {off_by(row)}" if "off_by" in row else "not the same numbers")
    if row.get("parameters") == "linear":
        parts.append("Linear layers only")
    return ", ".join(parts)


def where(environments: Iterable[Data]) -> str:
    """A line on device, versions and dates."""
    found: dict[str, dict[str, None]] = {}
    for environment in environments:
        build = environment.get("gfast_build", "?")
        for part, text in (
            ("device", environment["device"]),
            ("threads", f"{environment.get('threads', '?')} threads of {environment.get('cores', '?')} cores"),
            ("torch", f"torch {environment['torch']}"),
            ("build", f"build {build}"),
            ("commit", f"commit {environment['commit'][:10]}{'+changes' * ('+' in environment['commit'])}"),
            ("date", environment["date"][:10]),
        ):
            found.setdefault(part, {})[text] = None
    return ", ".join(" and ".join(texts) for texts in found.values())


def by_case(rows: Iterable[Data]) -> dict[tuple, dict[str, Data]]:
    """(op, objective, mode, batch, dtype, head, shape) -> provider -> row."""
    cases: dict[tuple, dict[str, Data]] = {}
    for row in rows:
        key = (row["op"], row["objective"], row.get("mode", "train"), row.get("batch", "full"), row["dtype"])
        cases.setdefault((*key, row["head"], tuple(row["shape"])), {})[row["provider"]] = row
    return cases


def _place(key: tuple) -> tuple | None:
    """Where a case stands in the README: what people run first; None for what only the whole page shows."""
    op, objective, mode, batch, dtype, _, shape = key
    kinds = [("logits", "wga", "full"), ("linear", "nll", "full"), ("linear", "wga", "full"), ("linear", "wga", "tofu")]
    if mode != "train" or (op, objective, batch) not in kinds:
        return None
    return kinds.index((op, objective, batch)), ["bf16", "fp32", "fp16"].index(dtype)


def short_losses(files: Iterable[Data]) -> str:
    """One table for a device: others in multiples of gfast's time; of each case the head with most of them."""
    kept: dict[tuple, tuple[tuple, dict[str, Data]]] = {}
    for data in files:
        for key, found in by_case(data["rows"]).items():
            place = _place(key)
            if place is None or "median_ms" not in found.get("gfast", {}):
                continue
            if place not in kept or _worth(key, found) > _worth(*kept[place]):
                kept[place] = key, found
    rows = []
    for _, (key, found) in sorted(kept.items()):
        op, objective, _, batch, dtype, head, shape = key
        ours = found["gfast"]
        name = f"`{OPS[op]}` {objective.upper()} {dtype} {' x '.join(map(str, shape))} ({head})"
        peers = [times(found.get(peer), ours) for peer in SHORT_LOSS_PEERS.values()]
        sizes = [found.get(peer, {}).get("peak_extra_mb") for peer in ("gfast", "eager", "compile")]
        cells = [number(ours["median_ms"]), number(ours.get("times_floor"), "x"), *peers, *map(number, sizes)]
        rows.append([name + f", {batch} batch" * (batch != "full"), *cells])
    header = ["", "ms", "floors", *SHORT_LOSS_PEERS, "MB", "eager MB", "compile MB"]
    return table(header, rows[:MOST_ROWS]) if rows else ""


def _worth(key: tuple, found: dict[str, Data]) -> tuple[int, int]:
    """How many were measured, and how large the head is."""
    return sum("median_ms" in row for row in found.values()), math.prod(key[-1])


def losses(data: Data) -> str:
    """All cases of a file in one table, and who could not run."""
    out, absent = [], {}
    for (op, objective, mode, batch, dtype, head, shape), found in by_case(data["rows"]).items():
        case = (
            f"`{OPS[op]}` {objective.upper()} {dtype}, {MODES[mode]}, {' x '.join(map(str, shape))} ({head}), {batch}"
        )
        for name, row in found.items():
            if "skipped" in row:
                absent.setdefault(row["skipped"], {})[f"`{name}`"] = None
                continue
            speed = f"{number(row['gb_per_s'])} GB/s" if "gb_per_s" in row else ""
            speed = f"{number(1e3 * row['tflop_per_s'])} GFLOP/s" if "tflop_per_s" in row else speed
            out.append(
                [
                    case,
                    f"`{name}`",
                    number(row.get("median_ms")),
                    number(row.get("iqr_ms")),
                    str(row.get("repetitions", "")),
                    speed,
                    number(row.get("times_floor"), "x"),
                    loss_laws(row),
                    number(row.get("peak_extra_mb")),
                    "" if row.get("relative_error") is None else f"{row['relative_error']:.1e}",
                    note(row),
                ]
            )
            case = ""  # once is enough
    header = ["case", "provider", "ms", "IQR ms", "times", "speed", "floors", "law", "peak MB", "error", "note"]
    parts = [table(header, out, left=2)]
    parts += [f"Not run: {', '.join(names)} ({why})." for why, names in absent.items()]
    return "\n\n".join(parts)


def geffect_title(data: Data) -> str:
    settings = data["settings"]
    return f"Gradient effects of one batch pair: {model_name(settings)}, {batch_name(settings)}"


def short_geffect(devices: dict[str, Data]) -> str:
    """One table of the results of several devices for the same model and batches."""
    names = dict.fromkeys(
        row["name"]
        for data in devices.values()
        for row in data["rows"]
        if "median_ms" in row and not row["name"].startswith(LEFT_OUT)
    )
    header, rows = [""], [[name] for name in names]
    for device, data in devices.items():
        found = {row["name"]: row for row in data["rows"] if "median_ms" in row}
        one = found["plain pass"]["median_ms"]
        header += [f"{device}: ms", "plain passes", "peak MB"]
        for cells in rows:
            row = found.get(cells[0], {})
            passes = number(row["median_ms"] / one) if row else ""
            unequal = f" ≠ {off_by(row)}".rstrip() if "unequal" in row else ""
            marked = passes + unequal + (" *" if row.get("parameters") == "linear" else "")
            cells += [number(row.get("median_ms")), marked, number(row.get("peak_extra_mb"))]
    first = next(iter(devices.values()))
    text = f"{geffect_title(first)}.\n\n{table(header, rows)}"
    return text + ("\n\n\\* the Linear layers of the blocks only." if "*" in text else "")


GEFFECT_HEADER = ["", "ms", "times", "floor", "law", "peak extra MB", "error", "note"]


def _geffect_rows(rows: Iterable[Data]) -> list[list[str]]:
    out = []
    for row in rows:
        floors = [found for found in (row, row.get("of_passes_without_dw")) if found and "ratio" in found]
        ratio = ", ".join(f"{found['ratio']:.2f} of {found['floor']}" for found in floors)
        verdicts = [(law(found), f" ({found['floor']})" if len(floors) > 1 else "") for found in floors]
        laws = "; ".join(text + of for text, of in verdicts if text)
        error = "" if row.get("error") is None else f"{row['error']:.0e}"
        size, count = number(row.get("peak_extra_mb")), str(row.get("repetitions", ""))
        out.append([row["name"], number(row.get("median_ms")), count, ratio, laws, size, error, note(row)])
    return out


def _against(data: Data) -> str:
    lines = []
    for row in data.get("published") or []:
        line = f"`g_effect` takes {row['times_less']:.1f}x less time"
        line += f" and {row['memory_less']:.1f}x less memory" if "memory_less" in row else ""
        lines.append(f"{line} than the {row['against']}")
    return "; ".join(lines) + "." if lines else ""


def geffect(data: Data) -> str:
    if not data.get("sweep"):
        parts = [f"**{geffect_title(data)}**", table(GEFFECT_HEADER, _geffect_rows(data["rows"])), _against(data)]
        return "\n\n".join(part for part in parts if part)
    values = list(dict.fromkeys(row[data["sweep"]] for row in data["rows"]))
    found: dict[str, dict[int, Data]] = {}
    for row in data["rows"]:
        if "median_ms" in row:
            found.setdefault(row["name"], {})[row[data["sweep"]]] = row
    rows = [[name, *(_time_and_memory(at.get(value)) for value in values)] for name, at in found.items()]
    header = [f"ms / peak MB / law at {data['sweep']}", *map(str, values)]
    return f"**{geffect_title(data)}, over the {data['sweep']}**\n\n" + table(header, rows)


def _time_and_memory(row: Data | None) -> str:
    parts = [] if row is None else [number(row["median_ms"]), number(row.get("peak_extra_mb"))]
    laws = [found for found in (row, (row or {}).get("of_passes_without_dw")) if found and "law" in found]
    if laws:
        parts.append(", ".join("met" if found["law_met"] else f"**{found['ratio']:.2f}**" for found in laws))
    return " / ".join(parts)


def grad_dot(data: Data) -> str:
    rows = [
        [
            f"{row['provider']}, {row['case']}, {row['directions']} direction{'s' * (row['directions'] > 1)}",
            number(row["median_ms"]),
            number(row["bytes"] / 2**20),
            number(row["gb_per_s"]),
            f"{row['of_read_bandwidth']:.0%}",
            law(row, "grad_dot"),
        ]
        for row in data["rows"]
        if row["provider"] != "copy"
    ]
    header = ["gradient:direction dtypes", "ms", "MiB moved", "GB/s", "of read bandwidth", "law"]
    return f"`grad_dot` over the tensors of {data['model']}.\n\n" + table(header, rows)


def overhead(data: Data) -> str:
    rows = [
        [
            f"{row['shape']}, {'never' if row['every'] is None else 'every ' + str(row['every']) + ' steps'}",
            number(row["step_ms"]),
            f"{row['of_plain_step']:.2f}x",
            number(row.get("measurement_ms")),
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            law(row),
        ]
        for row in data["rows"]
    ]
    settings = data["settings"]
    same = any("loop_floor_ms" in row for row in data["rows"])  # older results have the other floor
    place = "made in the same place" if same else "in a loop of their own"
    title = (
        f"Training with `GEffectCallback`, {settings['dtype']}, batches of {settings['batch']} x {settings['tokens']} "
        f"tokens; a measurement's floor: 3 plain passes {place}."
    )
    header = ["measured", "ms a step", "of the plain step", "ms a measurement", "of its floor", "law"]
    return f"{title}\n\n" + table(header, rows)


def profiles(data: Data) -> str:
    parts = []
    for run in data["runs"]:
        name = run.get("op") or run["provider"]
        shape = " x ".join(map(str, run["shape"])) if isinstance(run["shape"], list) else run["shape"]
        rows = [
            [f"`{row['range']}`", str(row["calls"]), number(row["ms"]), number(row["device_ms"]), f"{row['share']:.0%}"]
            for row in run["ranges"]
        ]
        header = ["range, with what runs inside it", "calls", "ms", "ms on the device", "of the step"]
        parts.append(
            f"**Profile of {name}, {shape}, {run['dtype']}: {number(run['step_ms'])} ms**\n\n" + table(header, rows)
        )
    return "\n\n".join(parts)


KINDS: dict[str, Callable[[Data], str]] = {  # kind: its part of docs/benchmarks.md
    "losses": losses,
    "geffect": geffect,
    "grad_dot": grad_dot,
    "overhead": overhead,
    "profile_losses": profiles,
    "profile_geffect": profiles,
}
