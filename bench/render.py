"""Writes README.md's measured tables and docs/benchmarks.md from bench/results; nothing is typed by hand.

python bench/render.py            # rewrites README.md between the results markers, and docs/benchmarks.md
python bench/render.py --check    # exits 1 when either is not what the JSON says

A result is bench/results/DEVICE/KIND.json or KIND_MORE.json. Pictures are those of bench/plots.py, where they exist.
The words are those of bench/_texts.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _laws import LAWS, Check, cell, checks, demanded, figure, worst_first
from _tables import KINDS, LOSS_FLOORS, OPS, geffect_title, short_geffect, short_losses, table, where
from _texts import INTRODUCTION, REASONS, UNKNOWN

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
DOCUMENT = Path("docs") / "benchmarks.md"
PICTURES = Path("docs") / "benchmarks"
README_PICTURES = ("losses", "geffect")
NO_GPU = "NVIDIA GPU"  # the column that waits for one
TITLES = {
    "losses": "Losses",
    "geffect": "Gradient effects",
    "grad_dot": "Dot products",
    "overhead": "Training with measurements",
    "profile_losses": "Where the time of a loss goes",
    "profile_geffect": "Where the time of a gradient effect goes",
}


@dataclass(frozen=True)
class Result:
    """A file of bench/results."""

    device: str
    kind: str
    name: str
    data: dict[str, Any]


def kind_of(stem: str) -> str | None:
    kinds = [kind for kind in KINDS if stem == kind or stem.startswith(kind + "_")]
    return max(kinds, key=len) if kinds else None


def results(root: Path) -> list[Result]:
    """All of them, a device's together, GPUs last, in the order of the page."""
    found = []
    for path in (root / "bench" / "results").glob("*/*.json"):
        if (kind := kind_of(path.stem)) is not None:
            found.append(Result(path.parent.name, kind, path.stem, json.loads(path.read_text())))
    order = list(KINDS)
    return sorted(found, key=lambda r: (is_gpu(r.device), r.device, order.index(r.kind), r.name))


def is_gpu(device: str) -> bool:
    return not device.startswith("cpu-")


def devices_of(found: list[Result]) -> list[str]:
    return list(dict.fromkeys(result.device for result in found))


def law_checks(found: list[Result]) -> dict[str, dict[str, list[Check]]]:
    """law -> device -> its cases."""
    out: dict[str, dict[str, list[Check]]] = {law: {} for law in LAWS}
    for result in found:
        for check in checks(result.kind, result.data):
            out[check.law].setdefault(result.device, []).append(check)
    return out


def laws(found: list[Result]) -> str:
    """A row a law, a column a device."""
    devices = devices_of(found)
    waiting = [] if any(map(is_gpu, devices)) else [NO_GPU]
    rows = []
    for law, by_device in law_checks(found).items():
        if any(by_device.values()):
            every = [check for some in by_device.values() for check in some]
            cells = [cell(law, by_device.get(device, [])) for device in devices]
            rows.append([LAWS[law][0], demanded(law, every), *cells, *[""] * len(waiting)])
    header = ["what", "law", *(f"`{device}`" for device in devices), *waiting]
    head, rule, *body = table(header, rows, left=2 + len(devices)).split("\n")
    if waiting and body:  # a column without a value, which `table` leaves out
        head, rule = f"{head} {NO_GPU} |", f"{rule}---|"
        body = [f"{line}  |" for line in body]
    return "\n".join([head, rule, *body])


def devices_text(found: list[Result]) -> str:
    lines = []
    for device in devices_of(found):
        lines.append(f"`{device}`: {where(r.data['environment'] for r in found if r.device == device)}")
    return "<sub>" + "<br>\n".join(lines) + "</sub>" if lines else ""


def readme(root: Path) -> str:
    """The part between the markers: what is met, then gfast beside others, a short table a device."""
    found = results(root)
    parts = [
        "What gfast must reach, and how many of the measured cases do, with the range of the figures:",
        laws(found),
    ]
    parts.append(devices_text(found))
    for device in devices_of(found):
        files = [r.data for r in found if (r.device, r.kind) == (device, "losses") and not r.data.get("sweep")]
        if text := short_losses(files):
            floors = "; ".join(f"of `{OPS[op]}` {floor}" for op, floor in LOSS_FLOORS.items())
            title = f"Losses, forward + backward, on `{device}` (floor {floors})"
            parts += [f"{title}:", text]
    same: dict[str, dict[str, Any]] = {}
    for result in found:
        if result.name == "geffect":
            same.setdefault(geffect_title(result.data), {})[result.device] = result.data
    parts += [short_geffect(devices) for devices in same.values()]
    if found:
        newest = max(found, key=lambda r: (is_gpu(r.device), r.data["environment"]["date"])).device
        for name in README_PICTURES:
            picture = PICTURES / newest / f"{name}.png"
            if (root / picture).is_file():
                parts.append(f"![{name} on {newest}]({picture.as_posix()})")
    parts.append(
        f"Every case, provider, sweep and profile, what the columns mean, what is missed and why: "
        f"[{DOCUMENT.name}]({DOCUMENT.as_posix()})."
    )
    return "\n\n".join(part for part in parts if part)


def missed(found: list[Result]) -> str:
    """Law by law, why it is missed, and every case that misses it."""
    parts = []
    for law, by_device in law_checks(found).items():
        rows = [
            [f"`{device}`", check.case, figure(law, check.value), figure(law, check.demanded)]
            for device, some in by_device.items()
            for check in worst_first(law, [check for check in some if not check.met])
        ]
        if rows:
            parts += [
                f"**{LAWS[law][0]}**: {REASONS.get(law, UNKNOWN)}",
                table(["device", "case", "measured", "law"], rows, left=2),
            ]
    return "\n\n".join(parts) or "Nothing."


def document(root: Path) -> str:
    """docs/benchmarks.md: everything."""
    found = results(root)
    parts = [INTRODUCTION, "## What is met", laws(found), "## What is missed, and why", missed(found)]
    last: tuple[str, str] = ("", "")
    for result in found:
        if result.device != last[0]:
            parts.append(f"## On `{result.device}`")
        if (result.device, result.kind) != last:
            last = (result.device, result.kind)
            parts.append(f"### {TITLES[result.kind]}")
            for picture in sorted((root / PICTURES / result.device).glob("*.png")):
                if kind_of(picture.stem) == result.kind:
                    what = picture.stem.replace("_", " ")
                    parts.append(f"![{what} on {result.device}]({PICTURES.name}/{result.device}/{picture.name})")
        parts += [f"#### {result.name}", where([result.data["environment"]]), KINDS[result.kind](result.data)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when something is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    page, report = args.root / "README.md", args.root / DOCUMENT
    before, rest = page.read_text().split(BEGIN)
    wanted = {page: f"{before}{BEGIN}\n{readme(args.root)}\n{END}{rest.split(END)[1]}", report: document(args.root)}
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    if args.check:
        for path in changed:
            print(f"{path.relative_to(args.root)} is not what bench/results says: run python bench/render.py")
        return int(bool(changed))
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
