"""Writes the measured tables of README.md from the JSON files in bench/results/; nothing in them is typed by hand.

python bench/render.py            # rewrites README.md between the results markers
python bench/render.py --check    # exits 1 when README.md is not what the JSON says
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
LOSS_FLOORS = {"logits": "a copy of the logits", "linear": "three bare GEMMs"}


def number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:.3g}{unit}" if value < 100 else f"{value:,.0f}{unit}"


def times(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}x" if value and base else ""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def where(environment: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in environment.items() if isinstance(value, (str, int)) and value)


def losses(data: dict[str, Any]) -> str:
    cases: dict[tuple, dict[str, dict]] = {}
    for row in data["rows"]:
        key = (row["op"], row["head"], tuple(row["shape"]), row["dtype"], row["objective"])
        cases.setdefault(key, {})[row["provider"]] = row
    parts = []
    for op, name in (("logits", "unlearn_loss"), ("linear", "linear_unlearn_loss")):
        rows = []
        for (kind, head, shape, dtype, objective), found in cases.items():
            ours = found.get("gfast")
            if kind != op or ours is None or "median_ms" not in ours:
                continue
            eager, compiled = found.get("eager", {}), found.get("compile", {})
            twice = found.get("open_unlearning", {})
            rows.append(
                [
                    f"{objective.upper()}, {dtype}, {' x '.join(map(str, shape))} ({head})",
                    number(ours["median_ms"]),
                    times(twice.get("median_ms"), ours["median_ms"]),
                    times(eager.get("median_ms"), ours["median_ms"]),
                    times(compiled.get("median_ms"), ours["median_ms"]),
                    number(ours.get("times_floor"), "x"),
                    number(ours.get("peak_extra_mb")),
                    number(eager.get("peak_extra_mb")),
                    number(compiled.get("peak_extra_mb")),
                ]
            )
        if rows:
            header = [
                "forward + backward",
                "ms",
                "open-unlearning takes",
                "eager takes",
                "torch.compile takes",
                "of the floor",
                "peak MB",
                "eager MB",
            ]
            parts.append(f"`{name}`; floor: {LOSS_FLOORS[op]}.\n\n" + table([*header, "compile MB"], rows))
    return "\n\n".join(parts)


def geffect(data: dict[str, Any]) -> str:
    settings = data["settings"]
    rows = [
        [row["name"], number(row["median_ms"]), f"{row['ratio']:.2f} of {row['floor']}", number(row["peak_extra_mb"])]
        for row in data["rows"]
    ]
    title = (
        f"`g_effect` of one batch pair: {settings['shape']}-shaped model, {settings['dtype']}, "
        f"{settings['batch']} x {settings['tokens']} tokens a batch."
    )
    return f"{title}\n\n" + table(["", "ms", "ratio", "peak extra MB"], rows)


def grad_dot(data: dict[str, Any]) -> str:
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


def rendered() -> str:
    parts = []
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        data = json.loads(path.read_text())
        kind = path.stem.split("_cpu")[0].split("_cuda")[0]
        body = {"losses": losses, "geffect": geffect, "grad_dot": grad_dot}.get(kind)
        if body is not None:
            parts.append(f"{body(data)}\n\n<sub>{path.name}: {where(data['environment'])}</sub>")
    return "\n\n".join(parts)


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}\n{rendered()}\n{END}{after}"
    if "--check" in sys.argv:
        return int(wanted != text)
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
