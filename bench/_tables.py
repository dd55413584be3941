"""Markdown tables of benchmark results: short ones for the README, whole ones for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Data = dict[str, Any]
MOST_ROWS = 10  # of a README table: with its head and title about 12 lines
LOSS_FLOORS = {"logits": "a copy of the logits", "linear": "the bare matrix products"}
OPS = {"logits": "unlearn_loss", "linear": "linear_unlearn_loss"}
MODES = {
    "train": "forward + backward",
    "forward": "forward alone",
    "frozen": "forward + backward, frozen head",
    "nograd": "without gradient",
}
SHORT_MODES = {"train": "", "frozen": "frozen head", "nograd": "no gradient"}
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


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns without a single value are left out."""
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    header, rows = [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def law(row: Data) -> str:
    if "law" not in row:
        return ""
    return f"{row['law']:.2f}: {'met' if row['law_met'] else 'missed'}"


def note(row: Data) -> str:
    """Why a row has no time, or what its numbers lack."""
    for key in ("wrong", "failed", "skipped"):
        if key in row:
            return f"{key}: {row[key]}".replace("|", "/")
    parts = ["not the same numbers"] if "unequal" in row else []
    if row.get("parameters") == "linear":
        parts.append("Linear layers only")
    return ", ".join(parts)


def where(environment: Data) -> str:
    """A line on device, versions and date."""
    parts = [
        environment["device"],
        f"{environment.get('threads', '?')} threads of {environment.get('cores', '?')} cores",
    ]
    parts += [f"torch {environment['torch']}", f"build {environment.get('gfast_build', '?')}"]
    parts += [f"commit {environment['commit'][:10]}{'+changes' * ('+' in environment['commit'])}"]
    return ", ".join([*parts, environment["date"][:10]])


def by_case(rows: Iterable[Data]) -> dict[tuple, dict[str, Data]]:
    """(op, objective, mode, batch, dtype, head, shape) -> provider -> row."""
    cases: dict[tuple, dict[str, Data]] = {}
    for row in rows:
        key = (row["op"], row["objective"], row.get("mode", "train"), row.get("batch", "full"), row["dtype"])
        cases.setdefault((*key, row["head"], tuple(row["shape"])), {})[row["provider"]] = row
    return cases


def short_losses(data: Data) -> str:
    parts = []
    for op, name in OPS.items():
        rows = []
        for (kind, objective, mode, batch, dtype, head, shape), found in by_case(data["rows"]).items():
            ours = found.get("gfast", {})
            if kind != op or mode not in SHORT_MODES or "median_ms" not in ours:
                continue
            what = [f"{objective.upper()} {dtype} {' x '.join(map(str, shape))} ({head})"]
            what += [SHORT_MODES[mode]] * (mode != "train") + [f"{batch} batch"] * (batch != "full")
            peers = [times(found.get(peer), ours) for peer in SHORT_LOSS_PEERS.values()]
            sizes = [found.get(peer, {}).get("peak_extra_mb") for peer in ("gfast", "eager", "compile")]
            cells = [number(ours["median_ms"]), number(ours.get("times_floor"), "x"), *peers, *map(number, sizes)]
            # what people run first: training on whole batches
            rows.append(((mode != "train", batch != "full"), [", ".join(what), *cells]))
        rows = [cells for _, cells in sorted(rows, key=lambda item: item[0])][:MOST_ROWS]
        if rows:
            head = ["", "ms", "floors", *SHORT_LOSS_PEERS, "peak MB", "eager MB", "compile MB"]
            parts.append(f"`{name}`, forward + backward; floor: {LOSS_FLOORS[op]}.\n\n" + table(head, rows))
    return "\n\n".join(parts)


def losses(data: Data) -> str:
    parts = []
    for (op, objective, mode, batch, dtype, head, shape), found in by_case(data["rows"]).items():
        rows = [
            [
                f"`{name}`",
                number(row.get("median_ms")),
                number(row.get("iqr_ms")),
                number(row.get("gb_per_s") or row.get("tflop_per_s")),
                number(row.get("times_floor"), "x"),
                law(row),
                number(row.get("peak_extra_mb")),
                "" if row.get("relative_error") is None else f"{row['relative_error']:.1e}",
                note(row),
            ]
            for name, row in found.items()
        ]
        speed = "GB/s" if op == "logits" else "TFLOP/s"
        title = f"{OPS[op]} {objective.upper()}, {MODES[mode]}: {head}, {' x '.join(map(str, shape))}, {dtype}, {batch}"
        header = ["", "ms", "IQR ms", speed, "floors", "law", "peak MB", "error", "note"]
        parts.append(f"**{title}**\n\n" + table(header, rows))
    return "\n\n".join(parts)


def model_name(settings: Data) -> str:
    """The shape, and how deep where that is not the shape's own depth."""
    return settings["shape"] + (f" cut to {settings['layers']} blocks" if settings.get("layers") else "")


def _geffect_title(data: Data) -> str:
    settings = data["settings"]
    return (
        f"Gradient effects of one batch pair: {model_name(settings)}, {settings['dtype']}, "
        f"{settings['batch']} x {settings['tokens']} tokens a batch"
    )


def _geffect_rows(rows: Iterable[Data]) -> list[list[str]]:
    out = []
    for row in rows:
        ratio = f"{row['ratio']:.2f} of {row['floor']}" if "ratio" in row else ""
        error = "" if row.get("error") is None else f"{row['error']:.0e}"
        size = number(row.get("peak_extra_mb"))
        out.append([row["name"], number(row.get("median_ms")), ratio, law(row), size, error, note(row)])
    return out


GEFFECT_HEADER = ["", "ms", "floor", "law", "peak extra MB", "error", "note"]


def _against(data: Data) -> str:
    lines = []
    for row in data.get("published") or []:
        line = f"`g_effect` takes {row['times_less']:.1f}x less time"
        line += f" and {row['memory_less']:.1f}x less memory" if "memory_less" in row else ""
        lines.append(f"{line} than the {row['against']}")
    return "; ".join(lines) + "." if lines else ""


def short_geffect(data: Data) -> str:
    rows = [row for row in data["rows"] if "median_ms" in row and not row["name"].startswith("g_effect(WGA), ")]
    parts = [f"{_geffect_title(data)}.", table(GEFFECT_HEADER, _geffect_rows(rows)), _against(data)]
    return "\n\n".join(part for part in parts if part)


def geffect(data: Data) -> str:
    if not data.get("sweep"):
        parts = [f"**{_geffect_title(data)}**", table(GEFFECT_HEADER, _geffect_rows(data["rows"])), _against(data)]
        return "\n\n".join(part for part in parts if part)
    values = list(dict.fromkeys(row[data["sweep"]] for row in data["rows"]))
    found: dict[str, dict[int, Data]] = {}
    for row in data["rows"]:
        if "median_ms" in row:
            found.setdefault(row["name"], {})[row[data["sweep"]]] = row
    rows = [
        [
            name,
            *(
                f"{number(at.get(v, {}).get('median_ms'))} / {number(at.get(v, {}).get('peak_extra_mb'))}"
                for v in values
            ),
        ]
        for name, at in found.items()
    ]
    header = [f"ms / peak MB at {data['sweep']}", *map(str, values)]
    return f"**{_geffect_title(data)}, over the {data['sweep']}**\n\n" + table(header, rows)


def grad_dot(data: Data) -> str:
    rows = [
        [
            f"{row['provider']}, {row['case']}, {row['directions']} direction{'s' * (row['directions'] > 1)}",
            number(row["median_ms"]),
            number(row["bytes"] / 2**20),
            number(row["gb_per_s"]),
            f"{row['of_read_bandwidth']:.0%}",
        ]
        for row in data["rows"]
        if row["provider"] != "copy"
    ]
    header = ["gradient:direction dtypes", "ms", "MiB moved", "GB/s", "of read bandwidth"]
    return f"`grad_dot` over the tensors of {data['model']}.\n\n" + table(header, rows)


def short_grad_dot(data: Data) -> str:
    rows = [row for row in data["rows"] if row["provider"] in ("gfast", "torch.dot")]
    return grad_dot({**data, "rows": rows[:MOST_ROWS]})


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
    title = (
        f"Training with `GEffectCallback`, {settings['dtype']}, batches of {settings['batch']} x {settings['tokens']} "
        "tokens; a measurement's floor: 3 plain passes and 2 forwards."
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


KINDS: dict[str, tuple[Callable[[Data], str] | None, Callable[[Data], str]]] = {  # kind: README, docs
    "geffect": (short_geffect, geffect),
    "losses": (short_losses, losses),
    "grad_dot": (short_grad_dot, grad_dot),
    "overhead": (overhead, overhead),
    "profile_losses": (None, profiles),
    "profile_geffect": (None, profiles),
}
